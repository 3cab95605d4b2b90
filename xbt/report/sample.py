"""The sample of a report: images and texts with their vectors under both models, embedded or read."""

from __future__ import annotations

import lzma
import math
import os
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xbt.data import CaptionSource, ImageTextPairs, PairSource, load_pairs, read_captions
from xbt.data.items import choose_subset
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, DataError, ImageError, StoreError, UnverifiedSpaceWarning, XbtError
from xbt.files import open_regular
from xbt.images import ImageSource, load_image
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source, random_access
from xbt.report.config import UpgradeReportConfig, VectorSource
from xbt.space import EmbeddingSpace
from xbt.store.rows import MAX_HEADER, read_npy_header
from xbt.store.store import EmbeddingStore
from xbt.vectors import unit_rows


@dataclass(frozen=True)
class Shown:
    """Images and texts of a sample for display: a name per image; ``None`` where only vectors are known."""

    ids: list[str]
    texts: list[str] | None = None
    images: Sequence[ImageSource] | None = None

    def picture(self, row: int) -> Image.Image | None:
        """Load an image; ``None`` if there is none or it cannot be decoded."""
        if self.images is None:
            return None
        try:
            return load_image(self.images[row], name=self.ids[row])
        except ImageError:
            return None

    def text(self, row: int, image: int) -> str:
        """A text; if it is unknown, its row and the id of its image."""
        return f"text {row} (of {self.ids[image]})" if self.texts is None else self.texts[row]

    def subset(self, images: list[int], texts: list[int]) -> Self:
        """Select images and their texts."""
        drawn = None if self.images is None else [self.images[row] for row in images]
        words = None if self.texts is None else [self.texts[row] for row in texts]
        return replace(self, ids=[self.ids[row] for row in images], texts=words, images=drawn)


@dataclass(frozen=True)
class Side:
    """One of the two models: its specification or the source of its vectors, and what is known of it."""

    name: str
    dim: int
    space: EmbeddingSpace | None = None
    encoder: DualEncoder | None = None
    seconds_per_image: float | None = None


@dataclass(frozen=True)
class Sample:
    """A sample of the user's images and texts, drawn from ``available`` images.

    ``corpus`` holds new and old vectors of texts to fit maps to; ``None`` if only the pairs' texts can be
    used. ``notes`` on the source of the data are a sentence each. ``skipped`` images could not be read.
    """

    pairs: PairVectors
    shown: Shown
    old: Side
    new: Side
    corpus: tuple[Source, Source] | None
    available: int
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.pairs)

    def subset(self, images: list[int]) -> Self:
        """Select images (rows ascending) with all of their texts."""
        texts = texts_of(self.pairs.image_of_text, images)
        return replace(self, pairs=self.pairs.subset(images), shown=self.shown.subset(images, texts))

    def split(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Split into the part that chooses the method and the part that measures it."""
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        chosen = choose_subset(len(self), count, seed)
        taken = set(chosen)
        return self.subset(chosen), self.subset([row for row in range(len(self)) if row not in taken])


def texts_of(owner: Tensor, images: list[int]) -> list[int]:
    """Rows of the texts of some images, ascending."""
    return [int(row) for row in torch.nonzero(torch.isin(owner, torch.tensor(images))).flatten()]


_WARM_UP = 4


def embed_sample(config: UpgradeReportConfig, ready: Callable[[], None]) -> Sample:
    """Draw a sample of the pairs, and embed it and the corpus with both models.

    ``ready`` is called after everything was loaded and before anything is embedded.

    Warns:
        UserWarning: If images were left out because they cannot be decoded.
    """
    assert config.pairs is not None
    assert config.old is not None
    assert config.new is not None
    pairs, available, skipped = _draw(config.pairs, config.sample, config.seed)
    corpus = None if config.captions is None else _corpus(config.captions, pairs)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoders = [load_encoder(spec, device) for spec in (config.old, config.new)]
    ready()
    texts, images, fitted, sides = [], [], [], []
    for encoder in encoders:
        texts.append(encoder.encode_texts(list(pairs.texts), progress=True))
        vectors, seconds = _timed_images(encoder, pairs.images)
        images.append(vectors)
        fitted.append(None if corpus is None else encoder.encode_texts(corpus, progress=True))
        sides.append(Side(encoder.name, encoder.dim, encoder.space, encoder, seconds / len(pairs)))
    owner = torch.tensor(pairs.text_image)
    vectors_of_pairs = PairVectors(texts[1], texts[0], images[0], owner, images[1])
    fits = None if fitted[0] is None or fitted[1] is None else (fitted[1], fitted[0])
    shown = Shown(pairs.ids, pairs.texts, pairs.images)
    return Sample(vectors_of_pairs, shown, sides[0], sides[1], fits, available, (), skipped)


def _draw(
    source: PairSource, count: int, seed: int
) -> tuple[ImageTextPairs, int, tuple[tuple[str, str], ...]]:
    """A sample of readable pairs, the number of available pairs, and the unreadable images."""
    pairs = load_pairs(source)
    drawn, rejected = pairs.select(choose_subset(len(pairs), count, seed)).drop_unreadable(progress=True)
    if rejected:
        listed = "; ".join(image.reason for image in rejected[:5])
        warnings.warn(f"skipped {len(rejected)} of the sample's images: {listed}", stacklevel=4)
    return drawn, len(pairs), tuple((image.id, image.reason) for image in rejected)


def _corpus(source: CaptionSource, pairs: ImageTextPairs) -> list[str]:
    """Captions without those of the pairs, so that a map is not tested on its training data."""
    held_out = set(pairs.texts)
    corpus = [text for text in dict.fromkeys(read_captions(source)) if text not in held_out]
    if not corpus:
        raise ConfigError("every caption is one of the pairs' own; give --captions of other images")
    return corpus


def _timed_images(encoder: DualEncoder, images: Sequence[ImageSource]) -> tuple[Tensor, float]:
    """Vectors, and the seconds to compute them, including decoding but not the warm-up."""
    listed = [images[row] for row in range(len(images))]
    encoder.encode_images(listed[:_WARM_UP])
    start = time.perf_counter()
    vectors = encoder.encode_images(listed, progress=True)
    return vectors, time.perf_counter() - start


Rows = NDArray[np.floating] | EmbeddingStore

_BLOCK = 1 << 24


def read_sample(config: UpgradeReportConfig) -> Sample:
    """Draw a sample of images with their texts from vectors of both models."""
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
    drawn = [described[number] for number in choose_subset(len(described), config.sample, config.seed)]
    drawn_texts = texts_of(owner, drawn)
    drawn_new, drawn_old = images.take(np.array(drawn))
    new_texts, old_texts = texts.take(np.array(drawn_texts))
    image_of_text = torch.searchsorted(torch.tensor(drawn), owner[drawn_texts])
    both = None if new_images is None else drawn_new
    pairs = PairVectors(new_texts, old_texts, drawn_old, image_of_text, both)
    corpus = _corpus_rows(read, pairs.old_texts, notes)
    shown, why_not = _shown(config.pairs, read["old_images"], len(images), len(texts))
    sides = {
        model: Side(_name(source, model, spaces[model]), dim, spaces[model])
        for model, dim in zip(("new", "old"), pairs.dims, strict=True)
    }
    drawn_shown = shown.subset(drawn, drawn_texts)
    notes += why_not
    return Sample(pairs, drawn_shown, sides["old"], sides["new"], corpus, len(described), tuple(notes))


_ROLES = ("old_images", "new_images", "old_texts", "new_texts", "old_corpus", "new_corpus")


def _read(source: VectorSource, role: str) -> Rows:
    """Vectors of a role: from a key of the file, an .npy file, or a store."""
    value: str = getattr(source, role)
    array = _array(source, value, f"--vectors.{role}")
    if array is None:
        return EmbeddingStore.open(value, "image" if role.endswith("images") else "text")
    if array.dtype.kind != "f":
        raise DataError(f"--vectors.{role} {value} holds {array.dtype} values; vectors are floating point")
    rows: NDArray[np.floating] = array  # type: ignore[assignment]
    return rows


def _array(source: VectorSource, value: str, flag: str) -> NDArray[np.generic] | None:
    """Array at a key or in an .npy file; ``None`` if the value is another path."""
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
    listed = f"; {source.file} has {', '.join(keys)}" if source.file is not None else ""
    raise ConfigError(f"{flag} {value} is neither a key of --vectors.file nor a path that exists{listed}")


_UNREADABLE = (
    *(ValueError, EOFError, AttributeError, TypeError, KeyError, IndexError, NotImplementedError),
    *(RuntimeError, OverflowError, MemoryError, struct.error, zlib.error, lzma.LZMAError),
    zipfile.BadZipFile,
)
"""Errors that damaged archives raise; encrypted ones raise RuntimeError."""
_SMALL, _MAX_RATIO = 1 << 28, 20
"""Bytes up to which an array is always unpacked, and the maximum compression ratio of larger ones.

Vectors compress to half their size at best. A file with a much higher ratio is an attack on the memory.
"""


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, packed: int) -> NDArray[np.generic]:
    """Read one array of an .npz file, if its compression ratio is plausible."""
    if member.file_size > max(_SMALL, _MAX_RATIO * min(member.compress_size, packed)):
        raise ValueError(
            f"{member.filename} has {member.file_size} bytes packed into {member.compress_size}; save it "
            "with numpy.savez, which does not compress"
        )
    with archive.open(member) as file:
        return _numbers(file, member.file_size)


def _numbers(file: IO[bytes], size: int) -> NDArray[np.generic]:
    """Read an .npy file of numbers, after its header and its size in bytes were compared."""
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
    """Space of each model, as far as stores record it, and notes for the report."""
    spaces: dict[str, EmbeddingSpace | None] = {"old": None, "new": None}
    notes = []
    for role, rows in read.items():
        space = rows.space if isinstance(rows, EmbeddingStore) else None
        model = role.split("_")[0]
        first = spaces[model]
        if first is None:
            spaces[model] = space
        elif space is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UnverifiedSpaceWarning)
                first.require(space, f"--vectors.{role}")
            notes += [f"{str(entry.message)[:1].upper()}{str(entry.message)[1:]}." for entry in caught]
    unknown = [model for model, space in spaces.items() if space is None]
    if unknown:
        notes.append(
            f"The vectors do not record their space ({' and '.join(unknown)} model). It is not verified that "
            "all vectors of a model come from one model with one preprocessing."
        )
    return spaces, notes


def _owner(source: VectorSource, n_texts: int, n_images: int) -> Tensor:
    """(n_texts,) row of the image that each text describes."""
    if source.image_of_text is None:
        if n_texts % n_images:
            raise ConfigError(
                f"there are {n_texts} texts for {n_images} images, not equally many for each; give the row "
                "of each text's image with --vectors.image_of_text"
            )
        return torch.arange(n_images).repeat_interleave(n_texts // n_images)
    array = _array(source, source.image_of_text, "--vectors.image_of_text")
    if array is None or array.dtype.kind not in "iu" or array.shape != (n_texts,):
        what = "a store" if array is None else f"{array.dtype} of the shape {array.shape}"
        raise DataError(
            f"--vectors.image_of_text is {what}; give one whole number, the row of its image, for each of "
            f"the {n_texts} texts"
        )
    rows = torch.from_numpy(array.astype(np.int64))
    outside = rows[(rows < 0) | (rows >= n_images)]
    if len(outside):
        raise DataError(
            f"--vectors.image_of_text names image {int(outside[0])}, but their rows are 0 to {n_images - 1}"
        )
    return rows


def _corpus_rows(read: dict[str, Rows], sample: Tensor, notes: list[str]) -> tuple[Source, Source] | None:
    """The corpus without texts of the sample, so that a map is not tested on its training data."""
    if "new_corpus" not in read:
        return None
    corpus = random_access(read["new_corpus"], read["old_corpus"])
    new, old = corpus.take(np.arange(len(corpus)))
    held_out = {row.tobytes() for row in np.ascontiguousarray(_unit(sample).numpy())}
    kept = [row for row, vector in enumerate(_unit(old).numpy()) if vector.tobytes() not in held_out]
    if not kept:
        raise ConfigError("every text of the corpus is one of the pairs' own; give texts of other images")
    if len(kept) < len(corpus):
        notes.append(f"{len(corpus) - len(kept):,} texts of the corpus are in the sample and were left out.")
    return new[kept], old[kept]


def _unit(rows: Tensor) -> Tensor:
    # A vector may differ slightly between an fp16 store and a file once it is normalised.
    return (unit_rows(rows) * 4096).round()


def _shown(source: PairSource | None, images: Rows, n_images: int, n_texts: int) -> tuple[Shown, list[str]]:
    """Images and texts to display, as far as they can be loaded, and notes on those that cannot."""
    ids = images.ids if isinstance(images, EmbeddingStore) else [f"image {row}" for row in range(n_images)]
    if source is None:
        return Shown(ids), ["No pictures and texts were given, so examples show only row numbers."]
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
            f"{n_texts}; give the same items in the same order, or leave --pairs out"
        )
    return Shown(pairs.ids, pairs.texts, pairs.images), []


def _name(source: VectorSource, model: str, space: EmbeddingSpace | None) -> str:
    """Display name of a model that is known only by its vectors."""
    if space is not None:
        return space.model
    value = source.old_images if model == "old" else source.new_texts
    return value if source.file is None else f"{Path(source.file).name}: {value}"
