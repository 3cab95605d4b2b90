"""The choosing recipe's job: embed texts and pairs with both models, fit, judge, and save the choice."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from xbt.compatible import CompatibleEncoder
from xbt.data import CaptionSource, ImageTextPairs, PairSource, load_readable_pairs, read_captions
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError
from xbt.evaluation.cells import LazyImages
from xbt.projections import Decision, PairVectors, choose_projection
from xbt.run_dir import RunDirectory


@dataclass
class ChooseProjectionConfig:
    """Choose what to query the old gallery with: candidates are fitted, judged on held-out pairs, and saved.

    Writes ``decision.json``, ``decision.txt`` and ``compatible/``, the encoder that makes the queries, to the
    output directory.
    """

    old: str
    """The encoder that embedded the gallery."""
    new: str
    """The encoder that shall query it."""
    captions: CaptionSource
    """The text corpus that projections are fitted to."""
    pairs: PairSource
    """Image–text pairs to learn from and to judge by; their captions are taken out of the corpus."""
    output_dir: str
    """Where everything goes."""
    thorough: bool = False
    """Also try the trained projections, which takes minutes."""
    use_old: bool = True
    """Whether the old query tower may run at search time, beside the new one."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Cut-offs that count, on average; [1] is for who cares for R@1 alone."""
    confidence: float = 0.95
    """One-sided confidence with which a direction must gain to be deployed."""
    every_k: bool = False
    """Whether every k must gain with that confidence, not their mean alone."""
    folds: int = 5
    """Folds of fitting and of judging."""
    seed: int = 0
    """Fixes folds and bootstrap."""
    device: str | None = None
    """Where the encoders run; the GPU if there is one."""
    overwrite: bool = False
    """Replace the results of another run in the output directory."""


def run_choice(config: ChooseProjectionConfig) -> Decision:
    """Embeds, chooses and saves.

    Args:
        config: What to do.

    Returns:
        The decision; print it.

    Raises:
        XbtError: If an encoder, the captions, the pairs or a setting cannot be used.

    Warns:
        UserWarning: If images were left out because they cannot be decoded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the choice is made in one process; launch it with --num_processes 1")
    run = RunDirectory(config.output_dir, config, config.overwrite)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pairs, rejected = load_readable_pairs(config.pairs, progress=True)
    own = set(pairs.texts)
    corpus = [text for text in dict.fromkeys(read_captions(config.captions)) if text not in own]
    if not corpus:
        raise ConfigError("every caption is one of the pairs' own; give --captions of other images")
    old, new = load_encoder(config.old, device), load_encoder(config.new, device)
    run.prepare()
    decision = choose_projection(
        new.encode_texts(corpus, progress=True),
        old.encode_texts(corpus, progress=True),
        pairs=embed_pairs(pairs, new, old),
        thorough=config.thorough,
        use_old=config.use_old,
        ks=config.ks,
        confidence=config.confidence,
        every_k=config.every_k,
        folds=config.folds,
        seed=config.seed,
        new_space=new.space,
        old_space=old.space,
    )
    upgraded = CompatibleEncoder(
        new, decision.projection, decision.ensemble, encoder_if_needed(decision, old)
    )
    upgraded.save_pretrained(run.path / "compatible")
    skipped = [{"id": each.id, "reason": each.reason} for each in rejected]
    run.write_json("decision.json", {**decision.to_dict(), "skipped_images": skipped})
    (run.path / "decision.txt").write_text(f"{decision}\n", encoding="utf-8")
    return decision


def embed_pairs(pairs: ImageTextPairs, new: DualEncoder, old: DualEncoder) -> PairVectors:
    """Embeds pairs with both models; images are decoded batch by batch, for each of them."""
    images = LazyImages(pairs)
    (new_texts, new_images), (old_texts, old_images) = (
        (encoder.encode_texts(list(pairs.texts), progress=True), encoder.encode_images(images, progress=True))
        for encoder in (new, old)
    )
    owners = torch.tensor([int(rows[0]) for rows in pairs.positives_t2i])
    return PairVectors(new_texts, old_texts, old_images, owners, new_images)


def encoder_if_needed(decision: Decision, old: DualEncoder) -> DualEncoder | None:
    """The old encoder, if a chosen combination of queries runs it in any direction."""
    needed = any(decision.ensemble.needs_old(direction) for direction in decision.judgements)
    return old if needed else None
