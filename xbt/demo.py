"""A full upgrade on the built-in scenes: two CLIPs, a text-only projection, LoRA, evaluation, figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xbt.compatible.encoder import CompatibleEncoder
from xbt.data import CaptionSource, ImageTextPairs, PairSource, load_pairs
from xbt.encoders import DualEncoder, load_encoder
from xbt.evaluation import RetrievalReport, format_table
from xbt.evaluation.job import EvaluationConfig, run_evaluation
from xbt.index.gallery import Gallery
from xbt.report.figures import draw_recall_bars, draw_search_comparison
from xbt.training.args import TrainArgs
from xbt.training.clip import ClipConfig, train_clip
from xbt.training.lora_finetuning import LoraFinetuningConfig, finetune_lora
from xbt.training.text_projection import TextProjectionConfig, pretrain_text_projection

# Offsets of the seeds, so far apart that no two steps share a seed.
_NEW, _STAGE1, _STAGE2 = 100_000, 200_000, 300_000


@dataclass
class DemoConfig:
    """Upgrade a small CLIP on the built-in scenes, from training to figures.

    Writes the two CLIPs, the projection, the compatible encoder, ``evaluation/retrieval.json``,
    ``recall.png`` and ``search.png`` to the output directory.
    """

    old_model: str
    """The old CLIP: a built-in open_clip architecture or a JSON file with a model config."""
    new_model: str
    """The new CLIP, in the same form."""
    old_training: TrainArgs
    """Training settings of the old CLIP."""
    new_training: TrainArgs
    """Training settings of the new CLIP."""
    stage1: TrainArgs
    """Training settings of the projection."""
    stage2: TrainArgs
    """Training settings of LoRA."""
    output_dir: str = "runs/quickstart"
    """Output directory."""
    seed: int = 0
    """Seed of the whole run; the seeds of the steps are derived from it."""
    old_scenes: int = 1000
    """Training scenes of the old CLIP."""
    new_scenes: int = 8000
    """Training scenes of the new CLIP."""
    captions: int = 20_000
    """Captions for stage 1."""
    pairs: int = 1000
    """Image–text pairs for stage 2."""
    test_scenes: int = 1000
    """Scenes for the evaluation; they are not in the training data."""
    queries: int = 5
    """Text queries in the figure."""
    top_k: int = 4
    """Images per query and cell in the figure."""
    overwrite: bool = False
    """Replace another run in the output directory."""


def run_demo(config: DemoConfig) -> RetrievalReport:
    """Train two CLIPs, upgrade, evaluate, print the table of cells and draw the figures.

    Returns:
        The cells on test scenes: old/old, new/old after stage 1 and after stage 2, new/new.
    """
    out = Path(config.output_dir)
    old, new = train_demo_clips(config)
    _headline("3/5  stage 1: a projection from the new space to the old one, on captions alone")
    pretrain_text_projection(
        TextProjectionConfig(
            old=old,
            new=new,
            captions=CaptionSource("scenes", limit=config.captions, seed=config.seed + _STAGE1),
            output_dir=str(out / "stage1"),
            training=replace(config.stage1, seed=config.seed + _STAGE1),
            # For these scenes less noise than the default transfers better to images.
            noise=0.3,
            relational_weight=0.0,
            overwrite=config.overwrite,
        )
    )
    _headline("4/5  stage 2: LoRA on a few image–text pairs, without the old CLIP")
    finetune_lora(
        LoraFinetuningConfig(
            new=new,
            projection=str(out / "stage1/projection"),
            pairs=PairSource("scenes", limit=config.pairs, seed=config.seed + _STAGE2),
            output_dir=str(out / "stage2"),
            training=replace(config.stage2, seed=config.seed + _STAGE2),
            overwrite=config.overwrite,
        )
    )
    print(stage2_verdict(json.loads((out / "stage2/result.json").read_text(encoding="utf-8"))))
    _headline("5/5  evaluation of the new CLIP in the old gallery, on test scenes")
    return _evaluate_and_draw(config, out, old, new)


def stage2_verdict(result: dict[str, Any]) -> str:
    """One sentence on what LoRA gained on held-out pairs, or why its start was kept.

    Args:
        result: The ``result.json`` of a run of stage 2.
    """
    first, *later = (entry["score"] for entry in result["history"])
    best = max(later, default=first)
    if result["best_step"]:
        return f"stage 2 helps: R@1 on held-out pairs rises from {first:.1%} to {best:.1%} with LoRA"
    return (
        f"stage 2 keeps the weights of stage 1: R@1 on held-out pairs was {first:.1%} before LoRA and at "
        f"most {best:.1%} with it, so there is no gain"
    )


def train_demo_clips(config: DemoConfig) -> tuple[str, str]:
    """Train the old and the new CLIP of the demo, unless they are trained already.

    Returns:
        The specifications of the old and of the new encoder.
    """
    _headline("1/5  the old CLIP, which embeds the gallery")
    train_clip(_clip(config, "old", config.old_model, config.old_scenes, config.old_training, config.seed))
    _headline("2/5  the new CLIP, which is better and has another space")
    train_clip(
        _clip(config, "new", config.new_model, config.new_scenes, config.new_training, config.seed + _NEW)
    )
    out = Path(config.output_dir)
    return f"open_clip:local-dir:{out / 'old/model'}", f"open_clip:local-dir:{out / 'new/model'}"


def _clip(
    config: DemoConfig, name: str, model: str, scenes: int, training: TrainArgs, seed: int
) -> ClipConfig:
    return ClipConfig(
        model=model,
        pairs=PairSource("scenes", limit=scenes, seed=seed),
        output_dir=str(Path(config.output_dir) / name),
        training=replace(training, seed=seed),
        overwrite=config.overwrite,
    )


def _evaluate_and_draw(config: DemoConfig, out: Path, old: str, new: str) -> RetrievalReport:
    test = PairSource("scenes", split="test", limit=config.test_scenes, seed=config.seed)
    report = run_evaluation(
        EvaluationConfig(
            old=old,
            new=new,
            pairs=test,
            output_dir=str(out / "evaluation"),
            upgraded={"stage 1": str(out / "stage1/projection"), "stage 1+2": str(out / "stage2/compatible")},
            overwrite=config.overwrite,
        )
    )
    draw_recall_bars(report, out / "recall.png")
    upgraded = CompatibleEncoder.from_pretrained(out / "stage2/compatible")
    old_encoder, new_encoder = load_encoder(old), load_encoder(new)
    columns = {
        "old/old": (old_encoder, old_encoder),
        "new/old": (upgraded, old_encoder),
        "new/new": (new_encoder, new_encoder),
    }
    draw_searches(load_pairs(test), columns, out / "search.png", config.queries, config.top_k)
    print(f"\n{format_table(report)}\n\npictures: {out / 'search.png'}, {out / 'recall.png'}")
    return report


def draw_searches(
    pairs: ImageTextPairs,
    columns: dict[str, tuple[DualEncoder, DualEncoder]],
    path: Path,
    n_queries: int = 5,
    top_k: int = 4,
) -> Path:
    """Draw the top images of a few text queries, side by side for several query and gallery models.

    Args:
        pairs: Images of the gallery; the queries are captions of some of them, evenly spread.
        columns: By cell name, the query encoder and the gallery encoder.
        path: The PNG to write.
        n_queries: Number of queries.
        top_k: Images per query and cell.

    Returns:
        The path of the file.
    """
    rows = [number * (len(pairs) // n_queries) for number in range(n_queries)]
    queries = [pairs.captions[row][0] for row in rows]
    row_of = {name: row for row, name in enumerate(pairs.ids)}
    galleries: dict[DualEncoder, Gallery] = {}
    results: dict[str, list[list[int]]] = {}
    for cell, (query_encoder, gallery_encoder) in columns.items():
        if gallery_encoder not in galleries:
            vectors = gallery_encoder.encode_images(pairs.images)
            galleries[gallery_encoder] = Gallery.build(vectors, pairs.ids, gallery_encoder.space)
        hits = galleries[gallery_encoder].search(
            query_encoder.encode_texts(queries), top_k, query_encoder.space
        )
        results[cell] = [[row_of[name] for name in names] for names in hits.ids]
    return draw_search_comparison(
        queries,
        {cell: [[pairs.image(row) for row in hits] for hits in lists] for cell, lists in results.items()},
        path,
        correct={cell: _is_right(lists, rows) for cell, lists in results.items()},
        title="The same text queries: query model / gallery model",
    )


def _is_right(results: Sequence[Sequence[int]], answers: Sequence[int]) -> list[list[bool]]:
    return [[row == answer for row in hits] for hits, answer in zip(results, answers, strict=True)]


def _headline(text: str) -> None:
    print(f"\n== {text} ==", flush=True)
