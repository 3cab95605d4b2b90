"""A sample of vectors that exist already: stores, .npy files, or the keys of an .npz file."""

from __future__ import annotations

import lzma
import math
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.data import CaptionSource, PairSource, load_pairs, read_captions
from xbt.data.items import choose_subset
from xbt.errors import ConfigError, DataError, StoreError, UnverifiedSpaceWarning, XbtError
from xbt.files import open_regular
from xbt.projections import PairVectors
from xbt.projections.sources import PairedRows, Source, random_access
from xbt.report.config import UpgradeReportConfig, VectorSource
from xbt.report.sample import Sample, Shown, Side, texts_of
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore
from xbt.store.rows import MAX_HEADER, read_npy_header
from xbt.vectors import unit_rows

Rows = NDArray[np.floating] | EmbeddingStore

_BLOCK = 1 << 24


def read_sample(config: UpgradeReportConfig) -> Sample:
    """Draws a sample of images with their texts from vectors of both models.

    Args:
        config: With vectors.

    Raises:
        DataError: If vectors cannot be used, or the two models' are not of the same items.
        ConfigError: If a file or key is not there, or texts cannot be told to belong to images.
        SpaceMismatchError: If stores of one model are of different spaces.
        StoreError: If a store cannot be opened.
    """
    source = config.vectors
    assert source is not None
    read = {name: _read(source, name) for name in _ROLES if getattr(source, name) is not None}
    spaces, notes = _spaces(read)
    new_images = read.get("new_images")
    images = random_access(read["old_images"] if new_images is None else new_images, read["old_images"])
    texts = random_access(read["new_texts"], read["old_texts"])
    owner = _owner(source, len(texts), len(images))
    described = [int(row) for row in torch.unique(owner)]
    if len(described) < len(images):
        notes.append(f"{len(images) - len(described):,} images have no text and were left out of the draw.")
    drawn = [described[place] for place in choose_subset(len(described), config.sample, config.seed)]
    told = texts_of(owner, drawn)
    pairs = _pairs(images, texts, owner, drawn, told, new_images is not None)
    corpus = _corpus(read, pairs.old_texts, notes)
    shown, why_not = _shown(config.pairs, read["old_images"], len(images), len(texts))
    sides = {
        model: Side(_name(source, model, spaces[model]), dim, spaces[model])
        for model, dim in zip(("new", "old"), pairs.dims, strict=True)
    }
    drawn_shown = shown.subset(drawn, told)
    notes += why_not
    return Sample(pairs, drawn_shown, sides["old"], sides["new"], corpus, len(described), tuple(notes))


_ROLES = ("old_images", "new_images", "old_texts", "new_texts", "old_corpus", "new_corpus")


def _read(source: VectorSource, role: str) -> Rows:
    """What a role names: a key of the file, an .npy file, or a store."""
    value: str = getattr(source, role)
    found = _array(source, value, f"--vectors.{role}")
    if found is None:
        return EmbeddingStore.open(value, "image" if role.endswith("images") else "text")
    if found.dtype.kind != "f":
        raise DataError(f"--vectors.{role} {value} holds {found.dtype} values; vectors are floating point")
    rows: NDArray[np.floating] = found  # type: ignore[assignment]
    return rows


def _array(source: VectorSource, value: str, flag: str) -> NDArray[np.generic] | None:
    """The array that a value names, or ``None`` where it is the path of something else."""
    keys: list[str] = []
    named = value
    try:
        if source.file is not None:
            named = source.file
            with open_regular(Path(source.file)) as opened, zipfile.ZipFile(opened) as archive:
                members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                keys = list(members)
                if value in members:
                    return _member(archive, members[value], os.fstat(opened.fileno()).st_size)
        named = value
        if value.endswith(".npy"):
            with open_regular(Path(value)) as opened:
                return _numbers(opened, os.fstat(opened.fileno()).st_size)
    except FileNotFoundError as error:
        raise ConfigError(f"{flag}: there is no file {named}; check the path") from error
    except StoreError as error:
        raise DataError(f"{flag}: {error}") from error
    except (*_UNREADABLE, OSError) as error:
        raise DataError(f"{flag}: {named} cannot be read as numpy arrays: {error}") from error
    if Path(value).exists():
        return None
    there = f"; {source.file} has {', '.join(keys)}" if source.file is not None else ""
    raise ConfigError(f"{flag} {value} is neither a key of --vectors.file nor a path that exists{there}")


_UNREADABLE = (
    *(ValueError, EOFError, AttributeError, TypeError, KeyError, IndexError, NotImplementedError),
    *(RuntimeError, OverflowError, MemoryError, struct.error, zlib.error, lzma.LZMAError),
    zipfile.BadZipFile,
)
"""Errors that damaged archives raise; RuntimeError is that of encrypted ones."""
_SMALL, _MOST_TIMES = 1 << 28, 20
"""Bytes up to which an array may be unpacked however small it was packed, and how much larger others may be.

Vectors are packed to a half at best; what is packed to a thousandth fills the memory instead.
"""


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, packed: int) -> NDArray[np.generic]:
    """One array of an .npz file; it is unpacked only if the sizes on record are possible."""
    if member.file_size > max(_SMALL, _MOST_TIMES * min(member.compress_size, packed)):
        raise ValueError(
            f"{member.filename} has {member.file_size} bytes packed into {member.compress_size}; save it "
            "with numpy.savez, which packs nothing"
        )
    with archive.open(member) as file:
        return _numbers(file, member.file_size)


def _numbers(file: IO[bytes], size: int) -> NDArray[np.generic]:
    """Reads an .npy file of numbers once its header and its size agree.

    Args:
        file: The file at its beginning.
        size: Bytes that it has.

    Raises:
        ValueError: If they do not agree, or the values are no numbers.
    """
    head = file.read(MAX_HEADER)
    shape, fortran, dtype, offset = read_npy_header(head)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    count = math.prod(shape)
    if size != offset + count * dtype.itemsize:
        raise ValueError(f"it has {size} bytes, but its header promises {offset + count * dtype.itemsize}")
    values = np.empty(count, dtype)
    target = values.view(np.uint8).data.cast("B") if values.nbytes else memoryview(bytearray())
    done = len(rest := head[offset:])
    target[:done] = rest
    while done < len(target):
        block = file.read(min(_BLOCK, len(target) - done))
        if not block:
            raise EOFError("it ends before its last value")
        target[done : done + len(block)] = block
        done += len(block)
    if file.read(1):  # reading to the end also compares the archive's checksum
        raise ValueError("it goes on after its last value")
    return values.reshape(shape, order="F" if fortran else "C")


def _spaces(read: dict[str, Rows]) -> tuple[dict[str, EmbeddingSpace | None], list[str]]:
    """The space of each model, as far as stores tell it."""
    found: dict[str, EmbeddingSpace | None] = {"old": None, "new": None}
    notes = []
    for role, rows in read.items():
        space = rows.space if isinstance(rows, EmbeddingStore) else None
        model = role.split("_")[0]
        known = found[model]
        if known is None:
            found[model] = space
        elif space is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UnverifiedSpaceWarning)
                known.require(space, f"--vectors.{role}")
            notes += [f"{str(each.message)[:1].upper()}{str(each.message)[1:]}." for each in caught]
    unsaid = [model for model, space in found.items() if space is None]
    if unsaid:
        notes.append(
            f"The vectors do not say which space they live in ({' and '.join(unsaid)} model): that all of a "
            "model's vectors were made by one model, with one preprocessing, is unverified."
        )
    return found, notes


def _owner(source: VectorSource, n_texts: int, n_images: int) -> Tensor:
    """(n_texts,) the image that each text describes."""
    if source.image_of_text is None:
        if n_texts % n_images:
            raise ConfigError(
                f"there are {n_texts} texts for {n_images} images, not equally many for each; say which "
                "image each describes with --vectors.image_of_text"
            )
        return torch.arange(n_images).repeat_interleave(n_texts // n_images)
    found = _array(source, source.image_of_text, "--vectors.image_of_text")
    if found is None or found.dtype.kind not in "iu" or found.shape != (n_texts,):
        what = "a store" if found is None else f"{found.dtype} of the shape {found.shape}"
        raise DataError(
            f"--vectors.image_of_text is {what}; give one whole number, the row of its image, for each of "
            f"the {n_texts} texts"
        )
    rows = torch.from_numpy(found.astype(np.int64))
    outside = rows[(rows < 0) | (rows >= n_images)]
    if len(outside):
        raise DataError(
            f"--vectors.image_of_text names image {int(outside[0])}, but their rows are 0 to {n_images - 1}"
        )
    return rows


def _pairs(
    images: PairedRows, texts: PairedRows, owner: Tensor, drawn: list[int], told: list[int], both: bool
) -> PairVectors:
    new_images, old_images = images.take(np.array(drawn))
    new_texts, old_texts = texts.take(np.array(told))
    place = torch.searchsorted(torch.tensor(drawn), owner[told])
    return PairVectors(new_texts, old_texts, old_images, place, new_images if both else None)


def _corpus(read: dict[str, Rows], own: Tensor, notes: list[str]) -> tuple[Source, Source] | None:
    """The corpus without texts of the sample: a map must not be judged on what it was fitted to."""
    if "new_corpus" not in read:
        return None
    corpus = random_access(read["new_corpus"], read["old_corpus"])
    new, old = corpus.take(np.arange(len(corpus)))
    known = {row.tobytes() for row in np.ascontiguousarray(_unit(own).numpy())}
    kept = [row for row, each in enumerate(_unit(old).numpy()) if each.tobytes() not in known]
    if not kept:
        raise ConfigError("every text of the corpus is one of the pairs' own; give texts of other images")
    if len(kept) < len(corpus):
        notes.append(f"{len(corpus) - len(kept):,} texts of the corpus were the sample's own and left out.")
    return new[kept], old[kept]


def _unit(rows: Tensor) -> Tensor:
    # fp16 stores and files of one vector may round differently by a hair once normalised.
    return (unit_rows(rows) * 4096).round()


def _shown(source: PairSource | None, images: Rows, n_images: int, n_texts: int) -> tuple[Shown, list[str]]:
    """Pictures and texts, as far as they are to be had; and why not, where they are not."""
    ids = images.ids if isinstance(images, EmbeddingStore) else [f"image {row}" for row in range(n_images)]
    if source is None:
        return Shown(ids), ["No pictures and texts were given, so that examples go by their rows alone."]
    try:
        pairs = load_pairs(source)
    except DataError as error:
        try:
            texts = read_captions(CaptionSource(source.source, split=source.split))
        except (XbtError, OSError):
            texts = []
        kept = texts if len(texts) == n_texts else None
        return Shown(ids, kept), [f"Pictures could not be shown: {error}."]
    if len(pairs) != n_images or len(pairs.texts) != n_texts:
        raise ConfigError(
            f"--pairs has {len(pairs)} images and {len(pairs.texts)} texts for vectors of {n_images} and "
            f"{n_texts}; give the very same in the same order, or leave --pairs out"
        )
    return Shown(pairs.ids, pairs.texts, pairs.images), []


def _name(source: VectorSource, model: str, space: EmbeddingSpace | None) -> str:
    """What to call a model of which there are only vectors."""
    if space is not None:
        return space.model
    value = source.old_images if model == "old" else source.new_texts
    return value if source.file is None else f"{Path(source.file).name}: {value}"
