from __future__ import annotations

import itertools

import torch

from xbt.batches import Draw, SeededBatches, gaussian_noise


def rows(batches):
    return [[draw.item for draw in batch] for batch in batches]


def test_an_epoch_shows_every_item_once_and_drops_the_rest():
    batches = list(SeededBatches(103, 10, seed=0, first_step=0, last_step=20))
    first, second = (list(itertools.chain.from_iterable(rows(part))) for part in (batches[:10], batches[10:]))
    assert len(set(first)) == len(set(second)) == 100
    assert first != second
    assert [batch[0].step for batch in batches] == list(range(20))
    assert [draw.position for draw in batches[3]] == list(range(10))


def test_continues_as_if_never_stopped():
    whole = list(SeededBatches(50, 8, seed=3, first_step=0, last_step=30))
    for stop in (1, 6, 13):
        head = list(SeededBatches(50, 8, seed=3, first_step=0, last_step=stop))
        tail = list(SeededBatches(50, 8, seed=3, first_step=stop, last_step=30))
        assert head + tail == whole
        assert len(SeededBatches(50, 8, 3, stop, 30)) == 30 - stop


def test_seed_decides():
    def order(seed):
        return rows(SeededBatches(50, 8, seed=seed, first_step=0, last_step=5))

    assert order(0) == order(0) != order(1)


def test_noise_does_not_depend_on_who_draws_it():
    draws = [Draw(7, position, 0) for position in range(96)]
    whole = gaussian_noise(draws, 24, seed=1)
    for slices in ([0, 48, 96], [0, 20, 50, 96], [0, 1, 96]):
        parts = [gaussian_noise(draws[a:b], 24, seed=1) for a, b in itertools.pairwise(slices)]
        assert torch.equal(torch.cat(parts), whole)


def test_noise_is_gaussian_of_unit_norm_and_fresh_every_step():
    draws = [Draw(0, position, 0) for position in range(4096)]
    noise = gaussian_noise(draws, 64, seed=0)
    assert noise.dtype == torch.float32
    assert abs((noise**2).sum(dim=1).mean() - 1) < 0.02
    assert abs(noise.mean()) < 1e-3
    later = gaussian_noise([Draw(1, position, 0) for position in range(4096)], 64, seed=0)
    assert abs((noise * later).sum(dim=1).mean()) < 0.01
    assert not torch.equal(noise, gaussian_noise(draws, 64, seed=1))
