"""CLIP_benchmark's folders of tars with images and their captions.

The layout (LAION's CLIP_benchmark, ``clip_benchmark_export_wds``; ``clip-benchmark/wds_*`` on the Hub)::

    dataset_type.txt      retrieval
    test/nshards.txt      2
    test/0.tar            s0000000.jpg, s0000000.txt (one caption a line), s0000001.jpg, ...
    test/1.tar
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import fsspec  # type: ignore[import-untyped]
from huggingface_hub import snapshot_download

from xbt.data.items import readable
from xbt.data.splits import ALL_SPLITS, choose_splits
from xbt.data.tar_streams import one_line
from xbt.data.web_datasets import DAMAGE, missing, read_samples
from xbt.errors import DataError
from xbt.images import ImageSource

_HUB_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(/.*)?")
_MOST_DIGITS = 18
_NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz"}


class TarredPairs(NamedTuple):
    """What such a folder holds.

    Attributes:
        ids: ``"<split>/<shard>/<key>"`` of each image.
        images: The encoded images, read from their tar when one is asked for.
        captions: The captions of each image as they stand, blank ones included.
    """

    ids: list[str]
    images: TarredImages
    captions: list[list[str]]


class TarredImages(Sequence[ImageSource]):
    """Images that are read from the middle of their (uncompressed) tars, on any file system of fsspec."""

    def __init__(self) -> None:
        self._tars: list[str] = []
        self._places: list[tuple[int, int, int]] = []

    def add(self, tar: str, places: Sequence[tuple[int, int]]) -> None:
        """Appends the images of one tar, given offset and size of each."""
        self._tars.append(tar)
        self._places += [(len(self._tars) - 1, *place) for place in places]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        tar, start, size = self._places[index]
        files, path = fsspec.core.url_to_fs(self._tars[tar])
        return bytes(files.cat_file(path, start=start, end=start + size))


def read_retrieval_folder(source: str, split: str | None) -> TarredPairs:
    """Lists the images and captions of such a folder; no image is decoded.

    Args:
        source: A folder, a URL that fsspec opens, or ``hf://datasets/org/name``, perhaps with ``@revision``
            and a folder in the repository, of which the wanted splits are fetched to the Hub cache.
        split: ``test``, several joined by ``+``, or ``all``; may be left out where there is only one.

    Returns:
        The pairs, shard by shard.

    Raises:
        DataError: If it is no such folder, its ``dataset_type.txt`` says something else than ``retrieval``, a
            split or a shard is missing, a tar is compressed or damaged, a caption file has no picture, or a
            sample comes twice, or the Hub repository cannot be fetched.
    """
    hub = _HUB_URL.fullmatch(source)
    root = source.rstrip("/") if hub is None else _fetch_splits(hub, split)
    files, base = _file_system(root)
    present = _splits(files, base)
    if not present:
        raise DataError(
            f"{source} is a directory without a split of CLIP_benchmark's, such as test/ with nshards.txt "
            "and 0.tar in it; name a file, or write hf: before a directory of parquet files"
        )
    kind = _read_text(files, f"{base}/dataset_type.txt")
    if kind is not None and kind.strip().lower() != "retrieval":
        raise DataError(
            f"{source} is a data set of the type {kind.strip()!r}, says its dataset_type.txt; give one of "
            "the type 'retrieval'"
        )
    if split is None and len(present) > 1:
        raise DataError(f"{source} has the splits {', '.join(present)}; choose one with split")
    pairs = TarredPairs([], TarredImages(), [])
    for name in choose_splits(split, present, source):
        for number in range(_shards(files, f"{base}/{name}", f"{source}/{name}")):
            _add_shard(pairs, f"{root}/{name}/{number}.tar", f"{name}/{number}")
    return pairs


def _fetch_splits(hub: re.Match[str], split: str | None) -> str:
    """The snapshot of a Hub data set, with the wanted splits in it."""
    repo, revision, folder = hub[1], hub[2], (hub[3] or "").strip("/")
    inside = f"{folder}/" if folder else ""
    # The small files first: they tell which splits there are.
    patterns = [f"{inside}dataset_type.txt", f"{inside}*/nshards.txt"]
    snapshot = _snapshot(repo, revision, patterns)
    root = f"{snapshot}/{folder}".rstrip("/")
    present = _splits(*_file_system(root))
    if split is not None or len(present) == 1:
        wanted = choose_splits(split or ALL_SPLITS, present, f"hf://datasets/{repo}")
        patterns += [f"{inside}{name}/*" for name in wanted]
        _snapshot(repo, revision, patterns)
    return root


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> str:
    try:
        return snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except Exception as error:  # the HTTP library's own errors share no kind with the Hub's
        at = f" at revision {revision}" if revision else ""
        raise DataError(
            f"the Hub data set {repo}{at} cannot be fetched ({one_line(error)[:300]}); check its name and "
            "your connection, or give a local copy"
        ) from error


def _file_system(root: str) -> tuple[Any, str]:
    try:
        files, base = fsspec.core.url_to_fs(root)
        return files, str(base).rstrip("/")
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{root} cannot be opened ({one_line(error)}); check the URL") from error


def _splits(files: Any, base: str) -> list[str]:
    found = (path for path in sorted(files.glob(f"{base}/*/nshards.txt")))
    return [str(path).rsplit("/", 2)[1] for path in found]


def _read_text(files: Any, path: str) -> str | None:
    if not files.exists(path):
        return None
    return str(files.cat_file(path).decode("utf-8", "replace"))


def _shards(files: Any, base: str, where: str) -> int:
    """How many shards a split has: what nshards.txt says, if they are all there."""
    told = (_read_text(files, f"{base}/nshards.txt") or "").strip()
    if not told.isdecimal() or len(told) > _MOST_DIGITS or int(told) < 1:
        raise DataError(
            f"{where}/nshards.txt says {told[:40]!r} where the number of tars should be; correct it"
        )
    count = int(told)
    present = {str(path).rsplit("/", 1)[-1] for path in files.glob(f"{base}/*.tar")}
    # Counted by the tars that are there: the number may be any.
    there = {stem for name in present if _NUMBER.fullmatch(stem := name.removesuffix(".tar"))}
    absent = count - sum(int(stem) < count for stem in there)
    if absent:
        first = next(number for number in range(count) if str(number) not in there)
        raise DataError(
            f"{where}/nshards.txt says {count} tars, but {absent} of them are missing, first {first}.tar; "
            "copy or download them"
        )
    if len(present) > count:
        raise DataError(
            f"{where}/nshards.txt says {count} tars, but {len(present)} are there; take the surplus away or "
            "correct the number"
        )
    return count


def _add_shard(pairs: TarredPairs, tar: str, name: str) -> None:
    try:
        with fsspec.open(tar, "rb") as file:
            packed = _PACKED.get(file.read(2))
        if packed is not None:
            raise DataError(
                f"{tar} is compressed ({packed}), and images cannot be read from its middle; unpack it"
            )
        captions = dict(_captions(tar))
        places: list[tuple[int, int]] = []
        for sample in read_samples(tar, "image"):
            if sample.fault == missing("image"):
                raise DataError(
                    f"{tar}, sample {sample.key}: a caption file without a picture; write the tar again"
                )
            if sample.fault is not None:
                raise DataError(f"{tar}, sample {sample.key}: {sample.fault}; write the tar again")
            places.append(sample.place)
            pairs.ids.append(readable(f"{name}/{sample.key}"))
            pairs.captions.append(captions.get(sample.key, []))
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(
            f"{tar} cannot be read to its end ({one_line(error)}); copy or download it again"
        ) from error
    pairs.images.add(tar, places)


def _captions(tar: str) -> Iterator[tuple[str, list[str]]]:
    for sample in read_samples(tar, "caption"):
        if sample.fault == missing("caption"):
            continue  # an image without captions, as other formats have them too
        if sample.fault is not None:
            raise DataError(f"{tar}, sample {sample.key}: {sample.fault}; write the tar again")
        try:
            text = sample.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{tar}: {sample.member} is not UTF-8; write the tar again") from error
        # A line break within a caption was exported as a backslash and an n.
        yield sample.key, [line.replace("\\n", "\n") for line in text.splitlines()]
