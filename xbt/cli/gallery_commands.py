"""The commands that make, fill and maintain galleries."""

from __future__ import annotations

from pathlib import Path

from xbt.cli.describing import as_text, describe_gallery, describe_store, size_of
from xbt.cli.gallery_configs import AddConfig, CreateConfig, GalleryConfig, RemoveConfig
from xbt.cli.outcome import Outcome
from xbt.cli.streams import read_lines
from xbt.encoders import load_encoder
from xbt.errors import DataError, XbtError
from xbt.index import Gallery
from xbt.serve.export_job import open_source
from xbt.store import EmbeddingStore, find_faults
from xbt.store.layout import MANIFEST


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
