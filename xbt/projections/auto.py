"""``method="auto"``: fit the candidates, choose on held-out retrieval, and fall back to the old query.

Nothing here trusts a projection because theory or a paper likes it. Candidates are fitted without the queries
they are judged on, the choice is judged by queries that had no say in it, and where a gain over the old query
is not shown with confidence, the old query is what is deployed: doing nothing is always among the choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.evaluation.cells import DIRECTIONS
from xbt.evaluation.retrieval import check_ks
from xbt.projections.base import Projection
from xbt.projections.candidates import NEW_ALONE, Candidate, Fitter, default_candidates
from xbt.projections.decision import Decision, Evidence
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.pairs import PairVectors
from xbt.projections.selection import Choice, Contender, Judgement, choose
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
    seed: int = 0,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
) -> Decision:
    """Fits the candidates and chooses what to query the old gallery with, per direction.

    With ``pairs``, candidates are compared by cross-modal R@k. What a candidate learns from pairs it learns
    in ``folds`` turns, each without the queries it is then judged on. Without pairs but with
    ``text_groups``, texts that say the same thing stand in for images; that is weaker evidence, and the
    decision says so. With neither, texts can only be found by their own old vector, by which the old query is
    perfect: the best projection is then named, but the old query stays deployed unless
    ``accept_unverified``, and then the mean of both queries is.

    Args:
        new: Vectors of the new model for a corpus of texts; ``None`` where the texts of the pairs are all
            there is.
        old: Vectors of the old model for the same texts.
        pairs: Image–text pairs under both models. Their texts must not be in the corpus too: a map would be
            judged on what it was fitted to.
        pair_texts: Whether the texts of the pairs join the corpus, fold by fold. It helps where the corpus is
            small, and takes a fit per fold for every candidate.
        text_groups: Per row of the corpus a number; rows with the same one say the same (captions of one
            image). Their vectors must be in memory or in stores.
        candidates: What to try; by default :func:`~xbt.projections.candidates.default_candidates`.
        thorough: Also try the trained projections, which takes minutes.
        use_old: Whether the old query tower may run at search time. If not, the choice is between the new
            query alone and, where that is not better, staying with the old model.
        accept_unverified: Deploy the mean of both queries where there is no evidence at all.
        ks: Cut-offs that count.
        confidence: One-sided confidence with which a direction must gain to be deployed.
        folds: Folds of fitting and of judging.
        seed: Fixes folds and bootstrap.
        new_space: The space of ``new``.
        old_space: The space of ``old``.

    Returns:
        The decision; ``print`` it.

    Raises:
        ConfigError: If there are no candidates, both pairs and text groups, or an option out of range.
        DataError: If there are fewer than 20 images to judge on, or vectors that cannot be used.
        SpaceMismatchError: If pairs, vectors and spaces do not fit each other.
    """
    ks = check_ks(ks)
    if not 0.5 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, but must lie between 0.5 and 1, such as 0.95")
    if folds < 2:
        raise ConfigError(f"folds is {folds}, but must be at least 2")
    judged, evidence, corpus = _evidence(new, old, pairs, text_groups, seed)
    if folds > len(judged):
        raise ConfigError(f"folds is {folds}, more than the {len(judged)} images to judge on; take fewer")
    if candidates is None:
        candidates = default_candidates(pairs, thorough)
    _check_candidates(candidates, pairs)
    fitter = Fitter(*corpus, pair_texts=pair_texts or new is None)
    trial = Trial(fitter, judged, evidence == "pairs", use_old, ks, folds, seed)
    contenders = [trial.contender(candidate) for candidate in candidates]
    if evidence == "own captions":
        choice = _best_on_own_captions(contenders)
        judgements = {direction: _unverified(direction, accept_unverified) for direction in DIRECTIONS}
    else:
        choice = choose(contenders, trial.old_ranks, ks, trial.groups)
        judgements = trial.judgements(contenders, confidence)
    chosen = next(candidate for candidate in candidates if str(candidate) == choice.contender)
    projection, ensemble = trial.deploy(chosen, choice, judgements, accept_unverified)
    _attach_spaces(projection, ensemble, new, old, new_space, old_space)
    return Decision(
        projection,
        ensemble,
        choice.contender,
        evidence,
        judgements,
        tuple(trial.scores(contenders, choice)),
        len(judged),
        len(judged.image_of_text),
        confidence,
        folds,
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


def _best_on_own_captions(contenders: Sequence[Contender]) -> Choice:
    def score(contender: Contender) -> float:
        return float((contender.ranks["T2I"][str(NEW_ALONE)] < 1).double().mean())

    best = max(contenders, key=score)
    return Choice(best.name, dict.fromkeys(DIRECTIONS, str(NEW_ALONE)))


def _unverified(direction: str, accepted: bool) -> Judgement:
    end = "the mean of both queries was accepted unverified" if accepted else "pairs would settle it"
    return Judgement.unknown(direction, f"no evidence that new queries beat old ones; {end}")


def _attach_spaces(
    projection: Projection,
    ensemble: QueryEnsemble,
    new: Source | None,
    old: Source | None,
    new_space: EmbeddingSpace | None,
    old_space: EmbeddingSpace | None,
) -> None:
    new_space = new_space or getattr(new, "space", None)
    old_space = old_space or getattr(old, "space", None)
    projection.set_spaces(new_space, old_space)
    ensemble.old_space = old_space
