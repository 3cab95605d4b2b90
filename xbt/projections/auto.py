"""``method="auto"``: fit the candidates, choose on held-out retrieval, and fall back to the old query.

Nothing here trusts a projection because theory or a paper likes it. Candidates are fitted without the images
whose queries they are ranked by, the choice is judged by queries whose own ranks had no say in it
(:mod:`xbt.projections.selection` says precisely what that means), and where a gain over the old query is not
shown with confidence, the old query is what is deployed: doing nothing is always among the choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation.cells import DIRECTIONS
from xbt.evaluation.retrieval import check_ks
from xbt.projections.candidates import NEW_ALONE, Candidate, Fitter, default_candidates
from xbt.projections.combinations import Nlerp
from xbt.projections.decision import Decision, Evidence
from xbt.projections.duplicates import clusters_of
from xbt.projections.fitting import _space_of
from xbt.projections.pairs import PairVectors
from xbt.projections.selection import Judgement, best_by_texts, choose
from xbt.projections.sources import Source
from xbt.projections.text_evidence import own_captions, pairs_of_groups
from xbt.projections.trial import Trial
from xbt.space import EmbeddingSpace

MIN_IMAGES = 20
"""Fewest images (or groups of texts) to judge on: fewer could not show any gain."""


def choose_projection(
    new: Source | None,
    old: Source | None,
    *,
    pairs: PairVectors | None = None,
    pair_texts: bool = False,
    text_groups: Sequence[int] | Tensor | None = None,
    candidates: Sequence[Candidate] | None = None,
    thorough: bool = False,
    use_old: bool = True,
    accept_unverified: bool = False,
    ks: Sequence[int] = (1, 5, 10),
    confidence: float = 0.95,
    folds: int = 5,
    every_k: bool = False,
    seed: int = 0,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
) -> Decision:
    """Fits the candidates and chooses what to query the old gallery with, per direction.

    With ``pairs``, candidates are compared by cross-modal R@k. What a candidate learns from pairs it learns
    in ``folds`` turns, each without the queries it is then judged on. Images that are near-duplicates or
    share a text are one (:func:`~xbt.projections.duplicates.clusters_of`): they lie in one fold, and the
    bootstrap draws them together.

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
        pair_texts: Whether the texts of the pairs join the corpus, fold by fold. It helps where the corpus is
            small, and takes a fit per fold for every candidate.
        text_groups: Per row of the corpus a number; rows with the same one say the same (captions of one
            image). Their vectors must be in memory or in stores.
        candidates: What to try; by default :func:`~xbt.projections.candidates.default_candidates`.
        thorough: Also try the trained projections, which takes minutes.
        use_old: Whether the old query tower may run at search time. If not, the choice is between the new
            query alone and, where that is not better, staying with the old model.
        accept_unverified: Deploy the mean of both queries (without ``use_old`` the new query alone) in
            directions of which there is no evidence.
        ks: Cut-offs that count, together: a direction must gain on average over them, and none may lose more
            than its standard error. ``(1,)`` is for who cares for R@1 alone.
        confidence: One-sided confidence with which a direction must gain to be deployed. Where nothing is
            to be gained on average over the ks, a direction is deployed with a chance of at most
            ``1 - confidence``; see :func:`~xbt.projections.selection.judge`.
        folds: Folds of fitting and of judging.
        every_k: Whether every k must gain with that confidence on its own, so that a loss at any of them is
            as unlikely as one on average; many a true gain is then not deployed.
        seed: Fixes folds and bootstrap.
        new_space: The space of ``new``.
        old_space: The space of ``old``.

    Returns:
        The decision; ``print`` it.

    Raises:
        ConfigError: If there are no candidates, both pairs and text groups, or an option out of range.
        DataError: If there are fewer than 20 images to judge on, or vectors that cannot be used.
        SpaceMismatchError: If pairs, vectors and spaces do not fit each other.

    Warns:
        UserWarning: If so many images of the pairs look the same that folds cannot hold them together.
    """
    ks = check_ks(ks)
    if not 0.5 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, but must lie between 0.5 and 1, such as 0.95")
    if folds < 2:
        raise ConfigError(f"folds is {folds}, but must be at least 2")
    spaces = tuple(
        given if source is None else _space_of(source, given, side)
        for source, given, side in ((new, new_space, "new"), (old, old_space, "old"))
    )
    judged, evidence, corpus = _evidence(new, old, pairs, text_groups, seed)
    _check_spaces(judged, spaces)
    if folds > len(judged):
        raise ConfigError(f"folds is {folds}, more than the {len(judged)} images to judge on; take fewer")
    if candidates is None:
        candidates = default_candidates(pairs, thorough)
    _check_candidates(candidates, pairs)
    clusters = _clusters(judged, evidence, folds)
    fitter = Fitter(*corpus, pair_texts=pair_texts or new is None, judged=judged)
    trial = Trial(fitter, judged, clusters, evidence == "pairs", use_old, ks, folds, seed)
    contenders = [trial.contender(candidate) for candidate in candidates]
    setting = None
    if evidence == "pairs":
        choice = choose(contenders, trial.old_ranks, ks, trial.groups)
        judgements = trial.judgements(contenders, confidence, every_k)
    else:
        # A text's own old vector is what its old query finds at once, whatever the new one is worth.
        setting = str(Nlerp(0.5) if use_old and evidence == "text groups" else NEW_ALONE)
        choice = best_by_texts(contenders, setting, ks, trial.groups, confidence, seed)
        judgements = {
            direction: _unverified(direction, accept_unverified, use_old) for direction in DIRECTIONS
        }
    chosen = next(candidate for candidate in candidates if str(candidate) == choice.contender)
    projection, ensemble = trial.deploy(chosen, choice, judgements, accept_unverified)
    projection.method = chosen.method
    projection.set_spaces(*spaces)
    ensemble.old_space = spaces[1]
    sizes = np.bincount(clusters)
    return Decision(
        projection,
        ensemble,
        choice.contender,
        evidence,
        judgements,
        tuple(trial.scores(contenders, choice, setting)),
        len(judged),
        len(judged.image_of_text),
        confidence,
        folds,
        int(sizes[sizes > 1].sum()),
        len(fitter.left_out),
    )


def _evidence(
    new: Source | None,
    old: Source | None,
    pairs: PairVectors | None,
    text_groups: Sequence[int] | Tensor | None,
    seed: int,
) -> tuple[PairVectors, Evidence, tuple[Source | None, Source | None]]:
    """What to judge on, what it is worth, and the corpus that is left to fit to."""
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


def _unverified(direction: str, accepted: bool, use_old: bool) -> Judgement:
    taken = "the mean of both queries" if use_old else "the new query"
    end = f"{taken} was accepted unverified" if accepted else "pairs would settle it"
    return Judgement.unknown(
        direction, f"no evidence that new queries beat old ones between texts and images; {end}"
    )
