"""Heads for backward-compatible training (BCT, BT², OCA): architectures, losses and prototypes."""

from __future__ import annotations

from xbt.heads.base import CompatibleHead, FoldedHead, HeadOutput, make_head
from xbt.heads.bct_and_oca import BCTHead, BCTLoss, ClassificationLoss, OCAHead, OCALoss, PlainHead
from xbt.heads.bt2 import BT2Head, BT2Loss
from xbt.heads.fitting import EpochSchedule, fit_on_vectors
from xbt.heads.losses import HeadLoss, Prototypes, Targets, class_prototypes

__all__ = [
    "BCTHead",
    "BCTLoss",
    "BT2Head",
    "BT2Loss",
    "ClassificationLoss",
    "CompatibleHead",
    "EpochSchedule",
    "FoldedHead",
    "HeadLoss",
    "HeadOutput",
    "OCAHead",
    "OCALoss",
    "PlainHead",
    "Prototypes",
    "Targets",
    "class_prototypes",
    "fit_on_vectors",
    "make_head",
]
