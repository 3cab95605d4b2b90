"""Where things stand in a store's directory, and the records that vouch for them.

The layout is clip-retrieval's (github.com/rom1504/clip-retrieval), so that its tools read our stores and we
read its folders, plus a manifest:

    manifest.json                     what the store is, and every file's size and SHA-256
    img_emb/img_emb_<name>.npy        (n, dim) float16 or float32 rows, or text_emb/text_emb_<name>.npy
    metadata/metadata_<name>.parquet  column id, then whatever is known of each row
    extra.jsonl                       what the writers noted beside a shard, if anything
    in_progress/                      only while a store is being built
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np

from xbt.errors import StoreError, XbtError
from xbt.files import FileRecord, open_regular, parse_count
from xbt.space import EmbeddingSpace

ID = "id"


Modality = Literal["image", "text"]

MANIFEST, EXTRA, IN_PROGRESS, HEADER, METADATA = (
    "manifest.json", "extra.jsonl", "in_progress", "header.json", "metadata",
)  # fmt: skip
FORMAT, VERSION = "xbt-store", 1
FOLDERS: dict[str, str] = {"image": "img_emb", "text": "text_emb"}
DTYPES = ("float16", "float32")

_CHECKSUM = "checksum"
_FIX = "copy the file again or write the store again"
_NAME = re.compile(r"[0-9]{1,18}(_[0-9]{1,18}){0,4}")
_MAX_HEADER = 12_000
"""Bytes of the longest header of an .npy file."""


@dataclass(frozen=True)
class ShardRecord:
    """What vouches for one shard.

    Attributes:
        name: Its name; shards are in the numerical order of their names.
        count: Its rows.
        files: By path relative to the store, each file's size and checksum.
        extra: JSON that the writer kept beside the shard, such as the items it had to leave out. In a
            finished store it is in ``extra.jsonl``; see ``EmbeddingStore.extra``.
    """

    name: str
    count: int
    files: Mapping[str, FileRecord]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self, with_extra: bool = True) -> dict[str, Any]:
        """A JSON-able form."""
        files = {path: asdict(file) for path, file in self.files.items()}
        plain: dict[str, Any] = {"name": self.name, "count": self.count, "files": files}
        return {**plain, "extra": dict(self.extra)} if with_extra else plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            StoreError: If it names other files than the shard's own two.
            ValueError: If a value is not of its kind.
        """
        name = shard_name(data["name"])
        files = {path: FileRecord.from_dict(file) for path, file in data["files"].items()}
        if set(files) not in [{vectors_file(each, name), metadata_file(name)} for each in FOLDERS]:
            raise StoreError(
                f"shard {name!r} names the files {list(files)}, but its own are one .npy file and "
                f"{metadata_file(name)}"
            )
        return cls(name, parse_count(data["count"], "count"), files, dict(data.get("extra") or {}))


@dataclass(frozen=True)
class Header:
    """What every shard of a store has in common.

    Attributes:
        modality: ``"image"`` or ``"text"``.
        space: The space of the vectors; ``None`` in folders that do not say.
        dtype: ``"float16"`` or ``"float32"``, on disk.
        dim: Dimension of the vectors.
    """

    modality: str
    space: EmbeddingSpace | None
    dtype: str
    dim: int

    def __post_init__(self) -> None:
        """Refuses values that no store has."""
        if self.modality not in FOLDERS:
            raise StoreError(f"the modality of a store is 'image' or 'text', got {self.modality!r}")
        if self.dtype not in DTYPES:
            raise StoreError(f"the dtype of a store is 'float16' or 'float32', got {self.dtype!r}")
        if self.dim < 1 or (self.space is not None and self.space.dim != self.dim):
            raise StoreError(f"vectors of dimension {self.dim} cannot be those of the space {self.space}")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Type of the values on disk: xbt writes little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def unit(self) -> bool:
        """Whether the space says that rows have length 1."""
        return self.space is not None and self.space.normalisation == "unit"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        space = None if self.space is None else self.space.to_dict()
        named = {"format": FORMAT, "version": VERSION, "modality": self.modality, "space": space}
        return {**named, "dtype": self.dtype, "dim": self.dim}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote."""
        json.dumps(data["space"], ensure_ascii=False).encode("utf-8")  # refuses half characters
        space = None if data["space"] is None else EmbeddingSpace.from_dict(data["space"])
        return cls(str(data["modality"]), space, str(data["dtype"]), parse_count(data["dim"], "dim"))

    def require(self, other: Header, path: Path) -> None:
        """Refuses a store of another kind under the same path.

        Raises:
            StoreError: If modality or dtype differ.
            SpaceMismatchError: If the spaces differ.
        """
        for name in ("modality", "dtype"):
            there, asked = getattr(self, name), getattr(other, name)
            if there != asked:
                raise StoreError(
                    f"{path} holds a store of {name} {there!r}, but {asked!r} is to be written; "
                    "choose another directory, or remove that one"
                )
        if self.space is not None and other.space is not None:
            self.space.require(other.space, f"the vectors to be written to {path}")


@dataclass(frozen=True)
class Manifest:
    """A whole store: its header, its shards in order, and what its writers noted."""

    header: Header
    shards: tuple[ShardRecord, ...]
    extra: FileRecord | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote; no size is believed that the files' own sizes contradict.

        Raises:
            StoreError: If shards and header do not go together.
            ValueError: If a value is not of its kind.
        """
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
            raise StoreError("its shards are not in order, or one is there twice")
        return cls(header, shards, None if data["extra"] is None else FileRecord.from_dict(data["extra"]))

    @property
    def count(self) -> int:
        """Rows of all shards."""
        return sum(shard.count for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with its own checksum; what the writers noted stays out, it may be long."""
        shards = [shard.to_dict(with_extra=False) for shard in self.shards]
        extra = None if self.extra is None else asdict(self.extra)
        plain = {**self.header.to_dict(), "count": self.count, "shards": shards, "extra": extra}
        return {**plain, _CHECKSUM: _checksum(plain)}


def shard_name(name: Any) -> str:
    """Checks a shard's name: digits, or digits joined by underscores (``"007"``, ``"03_0012"``)."""
    if not is_shard_name(name):
        raise StoreError(f"a shard's name is made of digits and underscores, such as '007', got {name!r}")
    return str(name)


def is_shard_name(name: Any) -> bool:
    """Whether something could be a shard's name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def shard_key(name: str) -> tuple[int, ...]:
    """The place of a shard in the order: its name read as numbers."""
    return tuple(int(part) for part in name.split("_"))


def vectors_file(modality: str, name: str) -> str:
    """Path of a shard's vectors, relative to the store."""
    return f"{FOLDERS[modality]}/{FOLDERS[modality]}_{name}.npy"


def metadata_file(name: str) -> str:
    """Path of a shard's metadata, relative to the store."""
    return f"{METADATA}/{METADATA}_{name}.parquet"


def shard_files(path: Path, folder: str) -> dict[str, Path]:
    """Files in one of a store's folders that are named as a shard's; whatever else is there is the user's.

    Args:
        path: The store's directory.
        folder: ``"img_emb"``, ``"text_emb"`` or ``"metadata"``.

    Returns:
        By the shards' names, in no order; empty if there is no such folder.
    """
    ending = "parquet" if folder == METADATA else "npy"
    pattern = re.compile(rf"{folder}_({_NAME.pattern})\.{ending}")
    there = (path / folder).iterdir() if (path / folder).is_dir() else ()
    return {match[1]: file for file in there if (match := pattern.fullmatch(file.name))}


def store_path(path: str | Path) -> Path:
    """The directory of a store.

    Raises:
        StoreError: If the path is empty or a file.
    """
    if not str(path).strip():
        raise StoreError("the store's path is empty; name a directory")
    found = Path(path).expanduser()
    if found.exists() and not found.is_dir():
        raise StoreError(f"{found} is a file, but a store is a directory; name the directory")
    return found


def has_manifest(path: Path) -> bool:
    """Whether a directory is a store with a manifest; a link or pipe of that name is one to be refused."""
    return os.path.lexists(path / MANIFEST)


def read_record(path: Path, root: Path | None = None) -> dict[str, Any]:
    """Reads a manifest, header or shard record.

    Args:
        path: The file.
        root: The directory that it must lie in; see :func:`refuse_irregular`.

    Raises:
        StoreError: If it cannot be read or is not a JSON object.
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
    """Reads the header of a store that is being built.

    Raises:
        StoreError: If it is not one of ours, from a newer version, or damaged.
    """
    data = _checked_format(path)
    with _complete(path):
        return Header.from_dict(data)


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a finished store.

    Raises:
        StoreError: If it is not one of ours, from a newer version, or damaged.
    """
    data = _checked_format(path)
    with _complete(path):
        if data.pop(_CHECKSUM) != _checksum(data):
            raise StoreError(f"{path} was edited or damaged: its own checksum does not agree; {_FIX}")
        return Manifest.from_dict(data)


def read_shard_record(path: Path) -> ShardRecord:
    """Reads the record that commits a shard.

    Raises:
        StoreError: If it is damaged.
    """
    data = read_record(path)
    with _complete(path):
        return ShardRecord.from_dict(data)


def _checked_format(path: Path) -> dict[str, Any]:
    data = read_record(path, path.parent)
    if data.get("format") != FORMAT:
        raise StoreError(
            f"{path} is not a store's: its format is {data.get('format')!r}, not {FORMAT!r}; {_FIX}"
        )
    version = data.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise StoreError(
            f"{path} was written in version {version!r} of the format, and this xbt reads version {VERSION}; "
            "install a newer xbt"
        )
    return data


@contextmanager
def _complete(path: Path) -> Iterator[None]:
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
