"""Layout of a store's directory, and the records of its files.

The layout is that of clip-retrieval (github.com/rom1504/clip-retrieval) plus a manifest, so that its tools
read our stores and we read its folders:

    manifest.json                     modality, space and dtype, and the size and SHA-256 of every file
    img_emb/img_emb_<name>.npy        (n, dim) float16 or float32 rows, or text_emb/text_emb_<name>.npy
    metadata/metadata_<name>.parquet  column id, then the metadata columns
    extra.jsonl                       notes of the writers about shards, if any
    in_progress/                      only during a build
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from xbt.errors import StoreError, XbtError
from xbt.files import FileRecord, checksum, open_regular, parse_count, refuse_irregular
from xbt.space import EmbeddingSpace

ID = "id"
"""Name of the metadata column with the ids."""

Modality = Literal["image", "text"]

MANIFEST, EXTRA, IN_PROGRESS, HEADER, METADATA = (
    "manifest.json", "extra.jsonl", "in_progress", "header.json", "metadata",
)  # fmt: skip
FORMAT, VERSION = "xbt-store", 1
FOLDERS: dict[str, str] = {"image": "img_emb", "text": "text_emb"}
DTYPES = ("float16", "float32")

AGAIN = "copy it again, or embed its rows again"
_CHECKSUM = "checksum"
_FIX = "copy the file again or write the store again"
_NAME = re.compile(r"[0-9]{1,18}(_[0-9]{1,18}){0,4}")
_MAX_HEADER = 12_000
"""Bytes of the longest header of an .npy file."""


@dataclass(frozen=True)
class ShardRecord:
    """Record of one shard."""

    name: str
    """Its name; shards are in the numerical order of their names."""
    count: int
    """Number of rows."""
    files: Mapping[str, FileRecord]
    """Size and checksum of each file, by its path relative to the store."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """JSON note of the writer, such as the items that it left out. In a finished store it is in
    ``extra.jsonl``; see ``EmbeddingStore.extra``."""

    def to_dict(self, with_extra: bool = True) -> dict[str, Any]:
        """A JSON-able form."""
        files = {path: asdict(file) for path, file in self.files.items()}
        plain: dict[str, Any] = {"name": self.name, "count": self.count, "files": files}
        return {**plain, "extra": dict(self.extra)} if with_extra else plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the output of :meth:`to_dict`; a value of the wrong type raises a ValueError or the like."""
        name = shard_name(data["name"])
        files = {path: FileRecord.from_dict(file) for path, file in data["files"].items()}
        if set(files) not in [{vectors_file(modality, name), metadata_file(name)} for modality in FOLDERS]:
            raise StoreError(
                f"shard {name!r} names the files {list(files)}, but must have one .npy file and "
                f"{metadata_file(name)}"
            )
        return cls(name, parse_count(data["count"], "count"), files, dict(data.get("extra") or {}))


@dataclass(frozen=True)
class Header:
    """Properties that all shards of a store share."""

    modality: str
    """``"image"`` or ``"text"``."""
    space: EmbeddingSpace | None
    """The space of the vectors; ``None`` in folders that do not record it."""
    dtype: str
    """``"float16"`` or ``"float32"``, on disk."""
    dim: int

    def __post_init__(self) -> None:
        """Refuse invalid values."""
        if self.modality not in FOLDERS:
            raise StoreError(f"the modality of a store is 'image' or 'text', got {self.modality!r}")
        if self.dtype not in DTYPES:
            raise StoreError(f"the dtype of a store is 'float16' or 'float32', got {self.dtype!r}")
        if self.dim < 1 or (self.space is not None and self.space.dim != self.dim):
            raise StoreError(f"vectors of dimension {self.dim} cannot belong to the space {self.space}")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Dtype of the values on disk, always little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def unit(self) -> bool:
        """True if rows have length 1 in this space."""
        return self.space is not None and self.space.normalisation == "unit"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        space = None if self.space is None else self.space.to_dict()
        named = {"format": FORMAT, "version": VERSION, "modality": self.modality, "space": space}
        return {**named, "dtype": self.dtype, "dim": self.dim}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the output of :meth:`to_dict`."""
        json.dumps(data["space"], ensure_ascii=False).encode("utf-8")  # refuses half characters
        space = None if data["space"] is None else EmbeddingSpace.from_dict(data["space"])
        return cls(str(data["modality"]), space, str(data["dtype"]), parse_count(data["dim"], "dim"))

    def require(self, other: Header, path: Path) -> None:
        """Refuse a header with another modality, dtype or space."""
        for name in ("modality", "dtype"):
            existing, requested = getattr(self, name), getattr(other, name)
            if existing != requested:
                raise StoreError(
                    f"{path} holds a store of {name} {existing!r}, but the new vectors are {requested!r}; "
                    "choose another directory, or remove that one"
                )
        if self.space is not None and other.space is not None:
            self.space.require(other.space, f"the vectors to be written to {path}")


@dataclass(frozen=True)
class Manifest:
    """Manifest of a finished store: header, shards in order, and the file of notes."""

    header: Header
    shards: tuple[ShardRecord, ...]
    extra: FileRecord | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the output of :meth:`to_dict`, and check each row count against the file's size."""
        header = Header.from_dict(data)
        shards = tuple(map(ShardRecord.from_dict, data["shards"]))
        width = header.dim * header.numpy_dtype.itemsize
        for shard in shards:
            vectors = vectors_file(header.modality, shard.name)
            if vectors not in shard.files:
                raise StoreError(f"shard {shard.name!r} lacks {vectors}")
            if not 0 < shard.files[vectors].bytes - shard.count * width <= _MAX_HEADER:
                raise StoreError(
                    f"shard {shard.name!r} cannot hold {shard.count} rows in the "
                    f"{shard.files[vectors].bytes} bytes of {vectors}"
                )
        keys = [shard_key(shard.name) for shard in shards]
        if any(first >= second for first, second in pairwise(keys)):
            raise StoreError("its shards are not in order, or one occurs twice")
        return cls(header, shards, None if data["extra"] is None else FileRecord.from_dict(data["extra"]))

    @property
    def count(self) -> int:
        """Number of rows of all shards."""
        return sum(shard.count for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with its own checksum; without the notes, which may be long."""
        shards = [shard.to_dict(with_extra=False) for shard in self.shards]
        extra = None if self.extra is None else asdict(self.extra)
        plain = {**self.header.to_dict(), "count": self.count, "shards": shards, "extra": extra}
        return {**plain, _CHECKSUM: _checksum(plain)}


def shard_name(name: Any) -> str:
    """Check a shard's name: digits, or digits joined by underscores (``"007"``, ``"03_0012"``)."""
    if not is_shard_name(name):
        raise StoreError(f"a shard's name consists of digits and underscores, such as '007', got {name!r}")
    return str(name)


def is_shard_name(name: Any) -> bool:
    """True for a valid name of a shard."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def shard_key(name: str) -> tuple[int, ...]:
    """Sort key of a shard: its name read as numbers."""
    return tuple(int(part) for part in name.split("_"))


def require_distinct(names: Sequence[str], path: Path) -> None:
    """Refuse sorted names of shards of which two have the same number, such as 1 and 01."""
    for pair in pairwise(names):
        first, second = sorted(pair)  # a directory lists its files in any order
        if shard_key(first) == shard_key(second):
            raise StoreError(
                f"the shards {first!r} and {second!r} of {path} have the same number; remove or rename one"
            )


def vectors_file(modality: str, name: str) -> str:
    """Path of a shard's vectors, relative to the store."""
    return f"{FOLDERS[modality]}/{FOLDERS[modality]}_{name}.npy"


def metadata_file(name: str) -> str:
    """Path of a shard's metadata, relative to the store."""
    return f"{METADATA}/{METADATA}_{name}.parquet"


def shard_files(path: Path, folder: str) -> dict[str, Path]:
    """Files of shards in a folder of a store by the shard's name; other files belong to the user."""
    ending = "parquet" if folder == METADATA else "npy"
    pattern = re.compile(rf"{folder}_({_NAME.pattern})\.{ending}")
    files = (path / folder).iterdir() if (path / folder).is_dir() else ()
    return {match[1]: file for file in files if (match := pattern.fullmatch(file.name))}


def file_spans(starts: NDArray[np.int64], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Split the rows ``start`` … ``stop − 1`` by file: its number, its first such row and the one after.

    ``starts`` are the first row of each file and the number of all rows.
    """
    number = int(np.searchsorted(starts, start, side="right")) - 1
    while start < stop:
        first, end = int(starts[number]), min(stop, int(starts[number + 1]))
        if start < end:
            yield number, start - first, end - first
        start, number = end, number + 1


def wrong_sizes(path: Path, shards: Iterable[ShardRecord]) -> list[str]:
    """A sentence for each file that is missing, cut or too long; contents are not read."""
    files = ((shard, name, file) for shard in shards for name, file in shard.files.items())
    faults = (_size_fault(path / name, file, f"shard {shard.name!r}") for shard, name, file in files)
    return [fault for fault in faults if fault]


def file_fault(path: Path, file: FileRecord, of: str) -> str:
    """Describe a wrong size or checksum of a file; empty if both are right."""
    fault = _size_fault(path, file, of)
    if fault or not file.sha256:
        return fault
    try:
        actual = checksum(path)
    except OSError as error:
        return f"{path} of {of} cannot be read ({error.strerror}): {AGAIN}"
    return "" if actual == file.sha256 else f"{path} of {of} has other bytes than were written: {AGAIN}"


def _size_fault(path: Path, file: FileRecord, of: str) -> str:
    try:
        size = path.stat().st_size
        refuse_irregular(path, path.parent if path.name == EXTRA else path.parent.parent)
    except OSError:
        return f"{path} of {of} is missing: {AGAIN}"
    except StoreError as error:
        return str(error)
    return "" if size == file.bytes else f"{path} of {of} has {size} bytes instead of {file.bytes}: {AGAIN}"


def store_path(path: str | Path) -> Path:
    """Check the path of a store, which must not be empty or a file, and expand ``~``."""
    if not str(path).strip():
        raise StoreError("the store's path is empty; name a directory")
    directory = Path(path).expanduser()
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file, but a store is a directory; name the directory")
    return directory


def has_manifest(path: Path) -> bool:
    """True if the directory has a manifest; also for a link or pipe, which reading it then refuses."""
    return os.path.lexists(path / MANIFEST)


def read_record(path: Path, root: Path | None = None) -> dict[str, Any]:
    """Read a manifest, header or shard record.

    ``root`` is the directory that must contain it; see :func:`xbt.files.refuse_irregular`.
    """
    try:
        with open_regular(path, root) as file:
            data = json.loads(file.read().decode("utf-8"), parse_constant=_refuse_constant)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not valid JSON; {_FIX}") from error
    if not isinstance(data, dict):
        raise StoreError(f"{path} is not a JSON object; {_FIX}")
    return data


def read_header(path: Path) -> Header:
    """Read the header of a store that is being built."""
    data = _read_format(path)
    with _parsing(path):
        return Header.from_dict(data)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a finished store."""
    data = _read_format(path)
    with _parsing(path):
        if data.pop(_CHECKSUM) != _checksum(data):
            raise StoreError(f"{path} was edited or damaged: its own checksum does not agree; {_FIX}")
        return Manifest.from_dict(data)


def read_shard_record(path: Path) -> ShardRecord:
    """Read the record that commits a shard."""
    data = read_record(path)
    with _parsing(path):
        return ShardRecord.from_dict(data)


def _read_format(path: Path) -> dict[str, Any]:
    data = read_record(path, path.parent)
    if data.get("format") != FORMAT:
        raise StoreError(
            f"{path} does not belong to a store: its format is {data.get('format')!r}, not {FORMAT!r}; {_FIX}"
        )
    version = data.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise StoreError(
            f"{path} was written in version {version!r} of the format, and this xbt reads version {VERSION}; "
            "install a newer xbt"
        )
    return data


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Translate errors of a damaged record into a :class:`StoreError`."""
    try:
        yield
    except XbtError as error:
        raise StoreError(f"{path} is damaged: {error}; {_FIX}") from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise StoreError(f"{path} is incomplete or damaged ({error!r:.200}); {_FIX}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode("ascii")).hexdigest()
