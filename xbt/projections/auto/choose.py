"""Choice of a projection: fit the candidates, choose on held-out retrieval, fall back to the old query.

Nothing here trusts a projection because theory or a paper likes it. Candidates are fitted without the images
whose queries they are ranked by, the choice is judged by queries whose own ranks took no part in it
(:mod:`xbt.projections.auto.selection` says precisely what that means), and where a gain over the old query is
not shown with confidence, the old query is deployed: doing nothing is always among the choices.

Where there are no pairs, texts take their place. They tell one projection from another, and say nothing of
the gain over the old query with images on one side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.auto.candidates import NEW_ALONE, Candidate, Fitter, default_candidates
from xbt.projections.auto.cross_validation import CrossValidation, Deployed
from xbt.projections.auto.decision import Decision, Evidence, StepTests
from xbt.projections.auto.selection import (
    MIN_IMAGES,
    CandidateRanks,
    GainTest,
    Selection,
    SelectionOptions,
    best_by_texts,
)
from xbt.projections.auto.step_choice import choose_steps, deployed_steps, unverified_steps
from xbt.projections.auto.steps import Items
from xbt.projections.combinations import Nlerp
from xbt.projections.fitting import space_of
from xbt.projections.gallery_steps import GallerySteps
from xbt.projections.near_duplicates import clusters_of
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source, random_access
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_vectors

MAX_GROUPS = 1000
"""Most groups, or most texts without groups, that are held out of the fit."""


def choose_projection(
    new: Source | None,
    old: Source | None,
    *,
    pairs: PairVectors | None = None,
    text_groups: Sequence[int] | Tensor | None = None,
    images: tuple[Vectors, Vectors] | None = None,
    candidates: Sequence[Candidate] | None = None,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
    **options: Any,
) -> Decision:
    """Fit the candidates and choose the queries for the old gallery, per direction.

    With ``pairs``, candidates are compared by cross-modal R@k. Where a candidate learns from pairs, it is
    fitted once per fold, each time without the queries that it is then judged on. Images that are
    near-duplicates or share a text count as one (:func:`~xbt.projections.near_duplicates.clusters_of`): they
    lie in one fold, and the bootstrap draws them together.

    Without pairs only texts are searched for: with ``text_groups`` texts that say the same, else texts by
    their own old vector, by which the old query is perfect. Either names the best projection, and neither is
    evidence about images: a new model may be better with texts and worse with images. The old query
    therefore stays deployed unless ``accept_unverified``, and then the mean of both queries is.

    Args:
        new: Vectors of the new model for a corpus of texts; ``None`` where the texts of the pairs are all
            there is.
        old: Vectors of the old model for the same texts.
        pairs: Image–text pairs under both models. Rows of the corpus that are among their texts are left
            out of the fits: a map would be judged on what it was fitted to.
        text_groups: Per row of the corpus a number; rows with the same one say the same (captions of one
            image). Their vectors must be in memory or in stores.
        images: New and old vectors of unlabelled images, 100 or more; without pairs they are the bank of the
            hubness bias of image queries.
        candidates: What to try; by default :func:`~xbt.projections.auto.candidates.default_candidates`.
        new_space: The space of ``new``.
        old_space: The space of ``old``.
        **options: Fields of :class:`~xbt.projections.SelectionOptions`, such as ``use_old=False`` or
            ``ks=(1,)``: what may be tried, and what counts as a gain.

    Returns:
        The decision; ``print`` it.

    Raises:
        ConfigError: If there are no candidates, both pairs and text groups, or an option cannot be used.
        DataError: If there are fewer than 20 images to judge on, or vectors that cannot be used.
        SpaceMismatchError: If pairs, vectors and spaces do not fit each other.

    Warns:
        UserWarning: If so many images of the pairs look the same that folds cannot hold them together.
    """
    rules = SelectionOptions.of(options)
    spaces = tuple(
        given if source is None else space_of(source, given, side)
        for source, given, side in ((new, new_space, "new"), (old, old_space, "old"))
    )
    judged, evidence, corpus = _evidence(new, old, pairs, text_groups, rules.seed)
    _check_spaces(judged, spaces)
    if rules.folds > len(judged):
        raise ConfigError(
            f"folds is {rules.folds}, more than the {len(judged)} images to judge on; take fewer"
        )
    if candidates is None:
        candidates = default_candidates(pairs, rules.thorough)
    _check_candidates(candidates, pairs)
    clusters = _clusters(judged, evidence, rules.folds)
    fitter = Fitter(*corpus, pair_texts=rules.pair_texts or new is None, judged=judged)
    trial = CrossValidation(fitter, judged, clusters, evidence == "pairs", rules)
    ranked = [trial.rank(candidate) for candidate in candidates]
    setting = None
    if evidence == "pairs":
        selection = trial.select(ranked)
        gain_tests = trial.gain_tests(ranked)
    else:
        # The old query of a text finds its own old vector at once, whatever the new one is worth.
        setting = str(Nlerp(0.5) if rules.use_old and evidence == "text groups" else NEW_ALONE)
        selection = best_by_texts(ranked, setting, rules.ks, trial.groups, rules.confidence, rules.seed)
        gain_tests = {direction: _unverified(direction, rules) for direction in DIRECTIONS}
    chosen = next(candidate for candidate in candidates if str(candidate) == selection.candidate)
    deployed, ensemble = trial.deploy(chosen, selection, gain_tests)
    projection = deployed.projection
    projection.method = chosen.method
    projection.set_spaces(*spaces)
    ensemble.old_space = spaces[1]
    steps, step_tests = _steps(trial, ranked, selection, gain_tests, deployed, images)
    sizes = np.bincount(clusters)
    return Decision(
        projection,
        ensemble,
        selection.candidate,
        evidence,
        gain_tests,
        tuple(trial.scores(ranked, selection, setting)),
        n_images=len(judged),
        n_texts=len(judged.image_of_text),
        confidence=rules.confidence,
        folds=rules.folds,
        n_joined=int(sizes[sizes > 1].sum()),
        n_left_out=len(fitter.left_out),
        steps=steps,
        step_tests=step_tests,
    )


def _steps(
    trial: CrossValidation,
    ranked: Sequence[CandidateRanks],
    selection: Selection,
    gain_tests: Mapping[str, GainTest],
    deployed: Deployed,
    images: tuple[Vectors, Vectors] | None,
) -> tuple[GallerySteps | None, dict[str, StepTests]]:
    """The gallery-side steps to deploy, and the evidence."""
    rules = trial.options
    if not rules.steps:
        return None, {}
    if trial.learns:
        choice = choose_steps(trial, ranked, gain_tests)
        return deployed_steps(trial, deployed, selection, choice.settings), choice.tests
    if not rules.accept_unverified:
        return None, {}
    bank = None if images is None else _images(images, trial.pairs.dims)
    return unverified_steps(trial, deployed, bank, rules.use_old), {}


def _images(images: tuple[Vectors, Vectors], dims: tuple[int, int]) -> Items:
    """Unlabelled images under both models, checked."""
    new, old = (
        as_vectors(rows, f"{side} vectors of the images", dim).float()
        for rows, side, dim in zip(images, ("new", "old"), dims, strict=True)
    )
    if len(new) != len(old):
        raise DataError(f"there are {len(new)} new and {len(old)} old vectors of images; give both of each")
    return Items.of(old, new)


def _evidence(
    new: Source | None,
    old: Source | None,
    pairs: PairVectors | None,
    text_groups: Sequence[int] | Tensor | None,
    seed: int,
) -> tuple[PairVectors, Evidence, tuple[Source | None, Source | None]]:
    """The pairs to judge on, the kind of evidence they are, and the corpus that is left to fit to."""
    if (new is None) != (old is None):
        raise ConfigError("new and old vectors belong together; give both, or neither and pairs")
    if (new is None or old is None) and pairs is None:
        raise ConfigError("there is nothing to fit to; give new and old vectors of a corpus, or pairs")
    if pairs is not None:
        if text_groups is not None:
            raise ConfigError("pairs and text_groups were both given; pairs say more, leave out text_groups")
        judged, evidence, corpus = pairs, "pairs", (new, old)
    elif text_groups is not None:
        assert new is not None
        assert old is not None
        judged, corpus = pairs_of_groups(new, old, np.asarray(text_groups), seed)
        evidence = "text groups"
    else:
        assert new is not None
        assert old is not None
        judged, corpus = own_captions(new, old, seed)
        evidence = "own captions"
    if len(judged) < MIN_IMAGES:
        raise DataError(
            f"there are {len(judged)} images or groups of texts to judge on, but fewer than {MIN_IMAGES} "
            "cannot show a gain; bring more"
        )
    return judged, evidence, corpus  # type: ignore[return-value]


def _check_candidates(candidates: Sequence[Candidate], pairs: PairVectors | None) -> None:
    names = [str(candidate) for candidate in candidates]
    if not names:
        raise ConfigError("there are no candidates to choose from; give at least one")
    for candidate in candidates:
        if names.count(str(candidate)) > 1:
            raise ConfigError(f"the candidate {str(candidate)!r} comes twice; give each a name of its own")
        if candidate.uses_pairs and pairs is None:
            raise ConfigError(f"the candidate {str(candidate)!r} learns from pairs; give pairs=")
        if pairs is not None and candidate.needs_image_vectors and pairs.new_images is None:
            raise ConfigError(f"the candidate {str(candidate)!r} needs the pairs' new_images; give them")


def _check_spaces(judged: PairVectors, spaces: Sequence[EmbeddingSpace | None]) -> None:
    """Before anything is fitted, not when its spaces are attached."""
    for space, dim, side in zip(spaces, judged.dims, ("new", "old"), strict=True):
        if space is not None and space.dim != dim:
            raise SpaceMismatchError(
                f"the {side} vectors to judge on have {dim} dimensions, but the {side} space is {space}; "
                "give vectors and space of one model"
            )


def _clusters(judged: PairVectors, evidence: Evidence, folds: int) -> NDArray[np.int64]:
    if evidence != "pairs":
        return np.arange(len(judged))
    clusters = clusters_of(judged, folds)
    different = len(np.unique(clusters))
    if different < folds:
        raise DataError(
            f"of the {len(judged)} images of the pairs only {different} are different, fewer than the "
            f"{folds} folds; bring pairs of other images"
        )
    return clusters


def _unverified(direction: str, options: SelectionOptions) -> GainTest:
    deployed = "the mean of both queries" if options.use_old else "the new query"
    end = (
        f"{deployed} was accepted unverified"
        if options.accept_unverified
        else "image–text pairs would decide it"
    )
    return GainTest.unknown(
        direction, f"no evidence that new queries beat old ones between texts and images; {end}"
    )


def pairs_of_groups(
    new: Source, old: Source, groups: NDArray[np.integer], seed: int = 0
) -> tuple[PairVectors, tuple[Vectors, Vectors]]:
    """Holds out groups of texts that say the same: the first of a group takes the place of an image.

    Args:
        new: Vectors of the new model, in memory or in a store.
        old: Vectors of the old model for the same texts.
        groups: (n,) integers; rows with the same one say the same.
        seed: Draws the groups where there are more than :data:`MAX_GROUPS`, or more than a fifth of all.

    Returns:
        The held-out texts as pairs, and the new and old vectors of all other rows.

    Raises:
        ConfigError: If the vectors are a stream.
        DataError: If there is not one group number per row, or no group has two texts.
    """
    rows = random_access(new, old)
    if groups.shape != (len(rows),):
        raise DataError(f"text_groups has the shape {groups.shape} for {len(rows)} rows; give one per row")
    order = np.argsort(groups, kind="stable")
    names, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    if len(several) == 0:
        raise DataError("no two rows of text_groups are the same; give one number to texts that say the same")
    chosen = _drawn(several, min(MAX_GROUPS, max(1, len(names) // 5)), seed)
    first = order[starts[chosen]]
    rest = [order[starts[group] + 1 : starts[group] + counts[group]] for group in chosen]
    others = np.concatenate(rest)
    new_first, old_first = rows.take(first)
    new_rest, old_rest = rows.take(others)
    owner = torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(each) for each in rest]))
    held = np.concatenate([first, others])
    return (
        PairVectors(new_rest, old_rest, old_first, owner, new_first),
        rows.take(np.setdiff1d(np.arange(len(rows)), held)),
    )


def own_captions(new: Source, old: Source, seed: int = 0) -> tuple[PairVectors, tuple[Vectors, Vectors]]:
    """Holds out texts that are to be found by their own old vector: each is its own answer.

    Args:
        new: Vectors of the new model, in memory or in a store.
        old: Vectors of the old model for the same texts.
        seed: Draws the texts: a fifth, at most :data:`MAX_GROUPS`.

    Returns:
        The held-out texts as pairs, and the new and old vectors of all other rows.

    Raises:
        ConfigError: If the vectors are a stream.
    """
    rows = random_access(new, old)
    held = _drawn(np.arange(len(rows)), min(MAX_GROUPS, max(1, len(rows) // 5)), seed)
    new_held, old_held = rows.take(held)
    owner = torch.arange(len(held))
    return (
        PairVectors(new_held, old_held, old_held, owner, new_held),
        rows.take(np.setdiff1d(np.arange(len(rows)), held)),
    )


def _drawn(items: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    if len(items) <= count:
        return items
    return np.sort(np.random.default_rng(seed).choice(items, count, replace=False))
