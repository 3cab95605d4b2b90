from __future__ import annotations

import pytest

from xbt.data.items import ItemSource, ListedTexts
from xbt.embedding.work import LAST, ShardPlan, even_shard_size
from xbt.store import ShardRecord


@pytest.mark.parametrize(
    ("asked", "entries", "processes", "size"),
    [
        (10_000, 5_000, 8, 625),
        (10_000, 5_001, 8, 626),
        (10_000, 5_000, 1, 10_000),
        (10_000, 1_000, 8, 256),
        (100, 1_000, 8, 100),
        (10_000, 120_000, 8, 7_500),  # two rounds of eight instead of twelve shards for eight processes
        (10_000, 160_000, 8, 10_000),
        (10_000, 0, 8, 256),
        (10_000, None, 8, 10_000),
    ],
)
def test_all_processes_get_an_equal_share(asked, entries, processes, size):
    assert even_shard_size(asked, entries, processes) == size


class Records(dict):
    """Committed shards that count the accesses to their records."""

    looked_at = 0

    def __getitem__(self, name):
        self.looked_at += 1
        return super().__getitem__(name)


def test_only_the_last_record_of_a_stream_is_read():
    parts = [ListedTexts([], []), ListedTexts([], []), ListedTexts([], [])]
    for part in parts:
        part.length = None
    plan = ShardPlan(ItemSource("streams", "text", parts), 10)
    done = {f"0_{chunk:05d}": {LAST: True} if chunk == 4 else {} for chunk in range(5)}
    done |= {f"1_{chunk:05d}": {} for chunk in range(3)}
    committed = Records({name: ShardRecord(name, 10, {}, extra) for name, extra in done.items()})
    assert plan.remaining(committed) == [(1, 30, None), (2, 0, None)]
    assert committed.looked_at == 2
