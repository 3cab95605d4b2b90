"""The commands that make, fill and maintain galleries.

The settings of the commands that make, fill and look after galleries.

Descriptions of stores and galleries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xbt.backfill.merge_file import MERGE
from xbt.cli.output import Outcome, read_lines
from xbt.config import require_local
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, XbtError
from xbt.index import Gallery
from xbt.serve.export import open_source
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore, find_faults
from xbt.store.layout import MANIFEST, read_record


@dataclass
class CreateConfig:
    """Make a gallery: of a store that is there, or an empty one for the vectors of an encoder."""

    gallery: str
    """Its directory, which must be empty or not exist."""
    store: str | None = None
    """A store, or a folder that clip-retrieval wrote, whose items become the gallery's first ones. It is read
    where it is and must stay there."""
    encoder: str | None = None
    """The encoder whose vectors the gallery is for; needed unless the store says it."""
    modality: Literal["image", "text"] | None = None
    """What the vectors are of; needed only for a clip-retrieval folder that holds both."""
    index: str = "Flat"
    """A string of FAISS's index_factory: Flat (exact), IVF1024,Flat, HNSW32, ..."""
    tuning: str = ""
    """Search parameters of the index, such as nprobe=64 or efSearch=128."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the vectors on disk that are added later."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If nothing says of which space the vectors are, or the gallery is a URL.
        """
        require_local(self.gallery, "--gallery")
        if self.store is None and self.encoder is None:
            raise ConfigError("give --store, or --encoder for an empty gallery of its space")


@dataclass
class AddConfig:
    """Add a store's items to a gallery: to its part of the same space, with ids and metadata."""

    gallery: str
    """The gallery's directory."""
    store: str
    """The store (xbt embed makes one), whose vectors are copied."""
    existing: Literal["error", "skip", "replace"] = "error"
    """What to do with items that the gallery has already: refuse and add nothing, leave them as they are, or
    put the store's in their place. After a kill, skip goes on."""
    batch_size: int = 65_536
    """Items per write."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If the batch size is below 1.
        """
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size must be at least 1, got {self.batch_size}")


@dataclass
class RemoveConfig:
    """Remove items from a gallery; all of them or, if one is not there, none."""

    gallery: str
    """The gallery's directory."""
    ids: str | list[str] = field(default_factory=list)
    """The items' ids."""
    file: str | None = None
    """A file with an id on each line; - is standard input."""


@dataclass
class GalleryConfig:
    """Look at a gallery or store as a whole."""

    gallery: str
    """The directory of a gallery or, to look at it, of a store."""


def describe_store(store: EmbeddingStore) -> dict[str, Any]:
    """A store: where it is, how many vectors of what, and its columns."""
    return {
        "store": str(store.path),
        "items": len(store),
        "modality": store.modality,
        "dtype": store.dtype,
        "columns": store.columns,
        "bytes": size_of(store.path),
        **describe_space(store.space, store.dim),
    }


def describe_gallery(gallery: Gallery, path: Path) -> dict[str, Any]:
    """A gallery on disk: its parts, how far it is backfilled, its index, and how its parts are merged."""
    merge = path / MERGE
    return {
        "gallery": str(path),
        "items": len(gallery),
        "fraction_backfilled": gallery.fraction_backfilled,
        "index": gallery.plan.factory,
        "tuning": gallery.plan.tuning,
        "merge": read_record(merge).get("kind") if merge.is_file() else None,
        "bytes": size_of(path),
        "parts": [
            {
                "name": part.name,
                "items": part.count,
                "modality": part.modality,
                "dtype": part.dtype,
                **describe_space(part.space, part.dim),
            }
            for part in gallery.parts
        ],
    }


def describe_space(space: EmbeddingSpace | None, dim: int) -> dict[str, Any]:
    """The model that made vectors; unknown for a folder that clip-retrieval wrote."""
    model, revision = (None, None) if space is None else (space.model, space.revision)
    return {"dim": dim, "model": model, "revision": revision}


def size_of(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def as_text(about: dict[str, Any]) -> str:
    """A description for people: a line for each figure, and a block for each part."""
    plain = {name: value for name, value in about.items() if name != "parts"}
    blocks = [_lines(plain), *(_lines(part, "  ") for part in about.get("parts", ()))]
    return "\n".join(line for block in blocks for line in block)


def _lines(figures: dict[str, Any], indent: str = "") -> list[str]:
    width = max(map(len, figures))
    return [f"{indent}{name.ljust(width)}  {_shown(name, value)}" for name, value in figures.items()]


def _shown(name: str, value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    if name == "fraction_backfilled":
        return f"{100 * value:.1f} %"
    if name == "bytes":
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)


def create(config: CreateConfig) -> Outcome:
    """Make a gallery."""
    space = None if config.encoder is None else load_encoder(config.encoder).space
    gallery = Gallery.create(
        config.gallery,
        space=space,
        store=config.store,
        modality=config.modality,
        index=config.index,
        tuning=config.tuning,
        dtype=config.dtype,
    )
    return _described(gallery)


def add(config: AddConfig) -> Outcome:
    """Adds a store's items; each batch is in the gallery once it is written."""
    gallery, store = Gallery.open(config.gallery), EmbeddingStore.open(config.store)
    added = replaced = 0
    with gallery.writing():
        known = {name for name in store.ids if name in gallery}
        if known and config.existing == "error":
            raise DataError(
                f"{len(known)} of the {len(store)} items of {store.path} are in {config.gallery} already, "
                f"first {next(name for name in store.ids if name in known)!r}; leave them as they are with "
                "--existing skip, or put the store's in their place with --existing replace"
            )
        for start in range(0, len(store), config.batch_size):
            stop = min(start + config.batch_size, len(store))
            names = store.ids[start:stop]
            there = [name for name in names if name in known]
            rows = [row for row, name in enumerate(names) if name not in known or config.existing != "skip"]
            if not rows:
                continue
            metadata = store.metadata(None, start, stop).take(rows) if store.columns else None
            vectors = store.read(start, stop)[rows]
            if there and config.existing == "replace":
                gallery.remove(there)
                replaced += len(there)
            gallery.add(vectors, [names[row] for row in rows], store.space, metadata)
            added += len(rows)
    skipped = len(store) - added
    about = {"gallery": config.gallery, "added": added, "replaced": replaced, "skipped": skipped}
    text = (
        f"added {added} items to {config.gallery}, {replaced} of them in place of others; {skipped} were "
        f"there already; it has {len(gallery)} now"
    )
    return Outcome({**about, "items": len(gallery)}, text)


def remove(config: RemoveConfig) -> Outcome:
    """Removes items."""
    names = [config.ids] if isinstance(config.ids, str) else list(config.ids)
    if config.file is not None:
        names += read_lines(config.file, "ids")
    if not names:
        raise DataError(
            f"nothing is to be removed from {config.gallery}; give ids, or --file with one on each line"
        )
    gallery = Gallery.open(config.gallery)
    gallery.remove(names)
    about = {"gallery": config.gallery, "removed": len(names), "items": len(gallery)}
    return Outcome(about, f"removed {len(names)} items from {config.gallery}; it has {len(gallery)} now")


def verify(config: GalleryConfig) -> Outcome:
    """Looks for damage; the status says whether there is any."""
    path = Path(config.gallery).expanduser()
    is_gallery = Gallery.exists(path)
    try:
        if is_gallery:
            faults = Gallery.open(path, read_only=True).verify()
        else:
            faults = find_faults(path, EmbeddingStore.open(path).modality)
    except XbtError as error:
        if not (is_gallery or (path / MANIFEST).is_file()):
            raise
        faults = [str(error)]  # too damaged to be opened
    text = "\n".join(faults) if faults else f"{config.gallery} is whole: every byte is as it was written"
    return Outcome(
        {"gallery": config.gallery, "whole": not faults, "faults": faults}, text, int(bool(faults))
    )


def compact(config: GalleryConfig) -> Outcome:
    """Free the disk space of removed and moved items."""
    path = Path(config.gallery).expanduser()
    gallery = Gallery.open(path)
    before = size_of(path)
    gallery.compact()
    gallery.close()
    after = size_of(path)
    about = {"gallery": config.gallery, "bytes_before": before, "bytes": after}
    return Outcome(about, f"{config.gallery} took {before:,} bytes and takes {after:,} now")


def info(config: GalleryConfig) -> Outcome:
    """Describes a gallery or a store."""
    found = open_source(config.gallery)
    if isinstance(found, Gallery):
        return _described(found)
    assert isinstance(found, EmbeddingStore)
    about = describe_store(found)
    return Outcome(about, as_text(about))


def _described(gallery: Gallery) -> Outcome:
    assert gallery.path is not None  # those on disk have one
    about = describe_gallery(gallery, gallery.path)
    return Outcome(about, as_text(about))
