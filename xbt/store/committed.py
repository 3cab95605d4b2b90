"""The shards that are committed to a store that is being built, read from their records one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from xbt.store.layout import ShardRecord, is_shard_name, read_shard_record, shard_key


class CommittedShards(Mapping[str, ShardRecord]):
    """Records by the shards' names, in their order.

    Which shards there are is looked up once, in the names of the files. A record is read whenever it is asked
    for and not kept: what writers note beside their shards may be long.

    Args:
        folder: Where the records are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = {path.stem for path in folder.glob("*.json") if is_shard_name(path.stem)}
        self._names = dict.fromkeys(sorted(names, key=lambda name: (shard_key(name), name)))

    def __getitem__(self, name: str) -> ShardRecord:
        if name not in self._names:
            raise KeyError(name)
        return read_shard_record(self._folder / f"{name}.json")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
