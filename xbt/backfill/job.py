"""The backfill of an index: many processes, one order, resumable, within a budget."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from xbt.backfill.config import MAY_CHANGE, BackfillConfig
from xbt.backfill.coordinator import BackfillCoordinator, BackfillResult
from xbt.backfill.embed import RateLimiter, embed_chunks, gathered
from xbt.backfill.items import ItemsById, open_items
from xbt.backfill.plan import Chunk
from xbt.embedding.checks import require_writable
from xbt.embedding.job import choose_workers
from xbt.encoders import DualEncoder, load_encoder
from xbt.processes import Team, cores_per_process, start_processes
from xbt.run_dir import RunDirectory


def run_backfill(config: BackfillConfig) -> BackfillResult:
    """Move a gallery's items into the new encoder's space, the most urgent first.

    Every process that ``accelerate launch`` or ``torchrun`` started calls this. The processes share each
    chunk of the order, and the main process alone writes it to the gallery, in one step. A job that was
    killed or has spent its budget continues where it stopped when the same command is given again, with any
    number of processes, in the same order. Items that were added to the gallery in the meantime come last.

    Args:
        config: Settings of the job.

    Returns:
        The state of the backfill, in every process; print it.

    Raises:
        XbtError: If a setting, the gallery, an encoder, the images or the directory cannot be used, or the
            encoder gives NaN. Images that are missing or cannot be decoded are no error: they are listed in
            ``rejected.jsonl``, and their items stay in the old space. Remove the file to try them again.
    """
    path = Path(config.output_dir)
    team = Team(start_processes(), path)
    run = team.together(lambda: RunDirectory(path, config, config.overwrite, MAY_CHANGE))
    items = team.together(lambda: open_items(config.images))
    team.main_alone(lambda: require_writable(path))
    encoder = team.together(lambda: _load(config, team))
    coordinator = BackfillCoordinator(config, run, encoder, items)
    with closing(coordinator):
        chunks = team.main_alone(coordinator.prepare)
        _embed(config, team, encoder, items, coordinator, chunks)
        return team.main_alone(coordinator.finish)


def _embed(
    config: BackfillConfig,
    team: Team,
    encoder: DualEncoder,
    items: ItemsById,
    coordinator: BackfillCoordinator,
    chunks: list[Chunk],
) -> None:
    """Embed chunk after chunk, each process its share, until the coordinator gives a reason to stop."""
    workers = config.num_workers
    if workers is None:
        workers = choose_workers(encoder, cores_per_process(team.state))
    rate = config.items_per_second
    limiter = RateLimiter(None if rate is None else rate / team.count)
    shares = embed_chunks(
        encoder, items, chunks, (team.rank, team.count), config.batch_size, workers, limiter
    )
    total = sum(len(chunk.ids) for chunk in chunks)
    bar = tqdm(total=total, desc="backfilling", unit="image", disable=not team.is_main)
    with closing(shares), bar:
        for chunk in chunks:
            done = gathered(team, team.together(lambda: next(shares)))
            why = team.main_alone(partial(coordinator.commit, chunk, done))
            bar.update(len(chunk.ids))
            if why is not None:
                break


def _load(config: BackfillConfig, team: Team) -> DualEncoder:
    encoder = load_encoder(config.encoder, team.state.device)
    encoder.precision = config.precision
    return encoder.compile_towers() if config.compile else encoder
