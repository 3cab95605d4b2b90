"""Projections: maps from the new model's space into the old model's space."""

from __future__ import annotations

from xbt.projections.auto.candidates import Candidate, default_candidates
from xbt.projections.auto.choose import choose_projection
from xbt.projections.auto.decision import Decision
from xbt.projections.auto.selection import SelectionOptions
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.caption_map import CaptionForwardMap, Neighbours, fit_caption_map
from xbt.projections.closed_form import (
    fit_identity,
    fit_mean_shift,
    fit_procrustes,
    procrustes_rotation,
    procrustes_rotation_of_chunks,
)
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.ensemble_fit import fit_ensemble
from xbt.projections.fitting import fit_projection
from xbt.projections.forward import ForwardMap, fit_forward
from xbt.projections.gallery_steps import GallerySteps
from xbt.projections.head_projection import HeadProjection
from xbt.projections.hubness import HubnessBias, hubness, qb_norm
from xbt.projections.objective import Stage1Options, TextLoss
from xbt.projections.pair_tuning import tune_on_pairs
from xbt.projections.pairs import PairVectors
from xbt.projections.ridge import fit_low_rank, fit_ridge, fit_whitened_procrustes
from xbt.projections.score_scale import ScoreScale, fit_score_scale
from xbt.projections.sources import PairStatistics
from xbt.projections.trained import ResidualProjection, fit_lambda_orthogonal, fit_mlp, fit_xbt
from xbt.projections.trainer import FitSchedule

__all__ = [
    "Candidate",
    "CaptionForwardMap",
    "Decision",
    "FitSchedule",
    "ForwardMap",
    "GallerySteps",
    "HeadProjection",
    "HubnessBias",
    "LinearProjection",
    "Neighbours",
    "PairStatistics",
    "PairVectors",
    "Projection",
    "QueryEnsemble",
    "ResidualProjection",
    "ScoreScale",
    "SelectionOptions",
    "Stage1Options",
    "TextLoss",
    "choose_projection",
    "default_candidates",
    "fit_caption_map",
    "fit_ensemble",
    "fit_forward",
    "fit_identity",
    "fit_lambda_orthogonal",
    "fit_low_rank",
    "fit_mean_shift",
    "fit_mlp",
    "fit_procrustes",
    "fit_projection",
    "fit_ridge",
    "fit_score_scale",
    "fit_whitened_procrustes",
    "fit_xbt",
    "hubness",
    "procrustes_rotation",
    "procrustes_rotation_of_chunks",
    "qb_norm",
    "tune_on_pairs",
]
