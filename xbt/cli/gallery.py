"""The commands ``xbt gallery …``: create, fill, check and describe galleries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xbt.backfill.target import MERGE
from xbt.cli.output import CommandResult, read_lines
from xbt.config import require_local
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, XbtError
from xbt.index.gallery import Gallery
from xbt.serve.export import open_source
from xbt.space import EmbeddingSpace
from xbt.store.layout import MANIFEST, read_record
from xbt.store.store import EmbeddingStore, find_faults


@dataclass
class CreateConfig:
    """Create a gallery from a store, or an empty one for the vectors of an encoder."""

    gallery: str
    """Directory of the gallery, which must be empty or not exist."""
    store: str | None = None
    """Store or clip-retrieval folder with the first items; it is read in place, so do not move it."""
    encoder: str | None = None
    """Encoder of the gallery's vectors; needed unless the store records it."""
    modality: Literal["image", "text"] | None = None
    """Modality of the vectors; needed only for a clip-retrieval folder that holds both."""
    index: str = "Flat"
    """A string of FAISS's index_factory: Flat (exact), IVF1024,Flat, HNSW32, ..."""
    tuning: str = ""
    """Search parameters of the index, such as nprobe=64 or efSearch=128."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type on disk of vectors that are added later."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If the space of the vectors is not given, or the gallery is a URL.
        """
        require_local(self.gallery, "--gallery")
        if self.store is None and self.encoder is None:
            raise ConfigError("give --store, or --encoder for an empty gallery of its space")


@dataclass
class AddConfig:
    """Add the items of a store to the gallery's part of the same space, with ids and metadata."""

    gallery: str
    """Directory of the gallery."""
    store: str
    """Store (made by xbt embed) whose vectors are copied."""
    existing: Literal["error", "skip", "replace"] = "error"
    """For items that the gallery already has: error adds nothing, skip keeps them, replace takes the store's.
    After a kill, skip continues."""
    batch_size: int = 65_536
    """Items per write."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If the batch size is below 1.
        """
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size must be at least 1, got {self.batch_size}")


@dataclass
class RemoveConfig:
    """Remove items from a gallery; if one is missing, none is removed."""

    gallery: str
    """Directory of the gallery."""
    ids: str | list[str] = field(default_factory=list)
    """Ids of the items."""
    file: str | None = None
    """A file with an id on each line; - is standard input."""


@dataclass
class GalleryConfig:
    """A gallery or store as a whole."""

    gallery: str
    """Directory of a gallery; verify and info also take a store."""


def describe_store(store: EmbeddingStore) -> dict[str, Any]:
    """Describe a store: path, size, modality, columns and model."""
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
    """Describe a gallery on disk: parts, fraction backfilled, index and merge."""
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
            {"name": part.name, "items": part.count, "modality": part.modality, "dtype": part.dtype}
            | describe_space(part.space, part.dim)
            for part in gallery.parts
        ],
    }


def describe_space(space: EmbeddingSpace | None, dim: int) -> dict[str, Any]:
    """Dimension and model of vectors; the model is ``None`` for a clip-retrieval folder."""
    model, revision = (None, None) if space is None else (space.model, space.revision)
    return {"dim": dim, "model": model, "revision": revision}


def size_of(path: Path) -> int:
    """Total bytes of the files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def as_text(document: dict[str, Any]) -> str:
    """Format a description: a line for each value, and a block for each part."""
    plain = {name: value for name, value in document.items() if name != "parts"}
    blocks = [_lines(plain), *(_lines(part, "  ") for part in document.get("parts", ()))]
    return "\n".join(line for block in blocks for line in block)


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    width = max(map(len, values))
    return [f"{indent}{name.ljust(width)}  {_format(name, value)}" for name, value in values.items()]


def _format(name: str, value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    if name == "fraction_backfilled":
        return f"{100 * value:.1f} %"
    if name == "bytes":
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)


def create(config: CreateConfig) -> CommandResult:
    """Create a gallery."""
    space = None if config.encoder is None else load_encoder(config.encoder).space
    kind = {name: getattr(config, name) for name in ("modality", "index", "tuning", "dtype")}
    return _description(Gallery.create(config.gallery, space=space, store=config.store, **kind))


def add(config: AddConfig) -> CommandResult:
    """Add the items of a store; each batch is in the gallery once it is written."""
    gallery, store = Gallery.open(config.gallery), EmbeddingStore.open(config.store)
    added = replaced = 0
    with gallery.writing():
        existing = {name for name in store.ids if name in gallery}
        if existing and config.existing == "error":
            raise DataError(
                f"{len(existing)} of the {len(store)} items of {store.path} are already in {config.gallery}, "
                f"first {next(name for name in store.ids if name in existing)!r}; keep the gallery's with "
                "--existing skip, or take the store's with --existing replace"
            )
        for start in range(0, len(store), config.batch_size):
            stop = min(start + config.batch_size, len(store))
            names = store.ids[start:stop]
            present = [name for name in names if name in existing]
            skip = existing if config.existing == "skip" else set()
            rows = [row for row, name in enumerate(names) if name not in skip]
            if not rows:
                continue
            metadata = store.metadata(None, start, stop).take(rows) if store.columns else None
            vectors = store.read(start, stop)[rows]
            if present and config.existing == "replace":
                gallery.remove(present)
                replaced += len(present)
            gallery.add(vectors, [names[row] for row in rows], store.space, metadata)
            added += len(rows)
    skipped = len(store) - added
    document = {"gallery": config.gallery, "added": added, "replaced": replaced, "skipped": skipped}
    text = (
        f"added {added} items to {config.gallery}, {replaced} of them in place of others; {skipped} were "
        f"there already; it has {len(gallery)} now"
    )
    return CommandResult({**document, "items": len(gallery)}, text)


def remove(config: RemoveConfig) -> CommandResult:
    """Remove items."""
    names = [config.ids] if isinstance(config.ids, str) else list(config.ids)
    if config.file is not None:
        names += read_lines(config.file, "ids")
    if not names:
        raise DataError(
            f"no items to remove from {config.gallery} were given; give ids, or --file with one on each line"
        )
    gallery = Gallery.open(config.gallery)
    gallery.remove(names)
    document = {"gallery": config.gallery, "removed": len(names), "items": len(gallery)}
    text = f"removed {len(names)} items from {config.gallery}; it has {len(gallery)} now"
    return CommandResult(document, text)


def verify(config: GalleryConfig) -> CommandResult:
    """Check for damage; the status is 1 if there is any."""
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
    return CommandResult(
        {"gallery": config.gallery, "whole": not faults, "faults": faults}, text, int(bool(faults))
    )


def compact(config: GalleryConfig) -> CommandResult:
    """Free the disk space of removed and moved items."""
    path = Path(config.gallery).expanduser()
    gallery = Gallery.open(path)
    before = size_of(path)
    gallery.compact()
    gallery.close()
    after = size_of(path)
    document = {"gallery": config.gallery, "bytes_before": before, "bytes": after}
    return CommandResult(document, f"{config.gallery} took {before:,} bytes and takes {after:,} now")


def info(config: GalleryConfig) -> CommandResult:
    """Describe a gallery or a store."""
    source = open_source(config.gallery)
    if isinstance(source, Gallery):
        return _description(source)
    assert isinstance(source, EmbeddingStore)
    document = describe_store(source)
    return CommandResult(document, as_text(document))


def _description(gallery: Gallery) -> CommandResult:
    assert gallery.path is not None  # it is on disk
    document = describe_gallery(gallery, gallery.path)
    return CommandResult(document, as_text(document))
