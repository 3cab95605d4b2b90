"""Folders written by clip-retrieval: the same layout without a manifest."""

from __future__ import annotations

from pathlib import Path

from xbt.errors import SpaceMismatchError, StoreError
from xbt.files import FileRecord
from xbt.space import EmbeddingSpace
from xbt.store import layout
from xbt.store.layout import Header, Manifest, ShardRecord
from xbt.store.metadata import inspect_parquet
from xbt.store.rows import NpyFile, inspect_npy


def scan_folder(path: Path, modality: str | None, space: EmbeddingSpace | None) -> Manifest:
    """Build the manifest, without checksums, of a folder that has none.

    The folder has ``img_emb/`` or ``text_emb/`` and optionally ``metadata/``; ``modality`` is needed only if
    it has both.
    """
    if (path / layout.IN_PROGRESS / layout.HEADER).is_file():
        names = [record.name for record in (path / layout.IN_PROGRESS).glob("*.json")]
        count = sum(name != layout.HEADER and name[0] != "." for name in names)
        raise StoreError(
            f"{path} is not finished: it has {count} shards; run the job that writes it again to continue"
        )
    modality = _choose_modality(path, modality)
    vectors = _npy_files(path, modality)
    metadata = layout.shard_files(path, layout.METADATA)
    for name in sorted(metadata.keys() ^ vectors.keys() if metadata else (), key=layout.shard_key):
        if name in vectors:
            raise StoreError(
                f"{path} lacks {layout.metadata_file(name)}, which other shards have; copy it again"
            )
        raise StoreError(
            f"{metadata[name]} belongs to no shard: there is no {layout.vectors_file(modality, name)} beside "
            "it; copy that file again, or remove this one"
        )
    shards = [_shard(path, name, npy, metadata.get(name)) for name, npy in vectors.items()]
    first = next(iter(vectors.values()))
    for name, npy in vectors.items():
        if npy.dim != first.dim:
            raise StoreError(
                f"shard {name!r} of {path} has dimension {npy.dim}, but the first has {first.dim}; they come "
                "from different models: keep them in different folders"
            )
        if npy.dtype != first.dtype:
            raise StoreError(
                f"shard {name!r} of {path} holds values of type {npy.dtype.str}, but the first has "
                f"{first.dtype.str}; copy both again, or save all shards with one type"
            )
    if space is not None and first.dim != space.dim:
        raise SpaceMismatchError(
            f"the vectors of {path} have dimension {first.dim}, but those of {space} have {space.dim}; name "
            "the space of the model that made them"
        )
    return Manifest(Header(modality, space, first.dtype.name, first.dim), tuple(shards))


def _choose_modality(path: Path, modality: str | None) -> str:
    present = [
        name for name, folder in layout.FOLDERS.items() if any((path / folder).glob(f"{folder}_*.npy"))
    ]
    if not present:
        raise StoreError(
            f"{path} holds no store: there is neither a manifest.json nor img_emb/img_emb_*.npy or "
            "text_emb/text_emb_*.npy; check the path"
        )
    if modality is None and len(present) > 1:
        raise StoreError(f"{path} holds image and text vectors; choose with modality='image' or 'text'")
    if modality is not None and modality not in present:
        raise StoreError(
            f"{path} holds {present[0]} vectors, not {modality!r}; leave modality out or name another path"
        )
    return modality or present[0]


def _npy_files(path: Path, modality: str) -> dict[str, NpyFile]:
    folder = layout.FOLDERS[modality]
    names = sorted(layout.shard_files(path, folder), key=layout.shard_key)
    layout.require_distinct(names, path)
    if not names:
        raise StoreError(f"{path / folder} holds no {folder}_<number>.npy; check the path")
    numbers = [layout.shard_key(name)[0] for name in names]
    if all("_" not in name for name in names) and numbers != list(range(len(names))):
        missing = next(expected for expected, number in enumerate(numbers) if expected != number)
        raise StoreError(
            f"shard {missing} of {path} is missing, but there is {folder}_{names[-1]}.npy; copy it again, or "
            "number the files from 0 without a gap"
        )
    return {name: inspect_npy(path / folder / f"{folder}_{name}.npy") for name in names}


def _shard(path: Path, name: str, npy: NpyFile, metadata: Path | None) -> ShardRecord:
    files = {npy.path.relative_to(path).as_posix(): FileRecord(npy.size, "")}
    if metadata is not None:
        rows, _ = inspect_parquet(metadata)
        if rows != npy.count:
            raise StoreError(
                f"shard {name!r} of {path} has {npy.count} vectors but {rows} rows of metadata; copy both "
                "files again"
            )
        files[layout.metadata_file(name)] = FileRecord(metadata.stat().st_size, "")
    return ShardRecord(name, npy.count, files)
