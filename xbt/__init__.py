"""xbt: query a gallery that was embedded by an old CLIP with a better new one, without re-embedding it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.backbones import CompatibleBackbone as CompatibleBackbone
    from xbt.compatible import CompatibleEncoder as CompatibleEncoder
    from xbt.encoders import DualEncoder as DualEncoder
    from xbt.encoders import load_encoder as load_encoder
    from xbt.encoders import wrap_encoder as wrap_encoder
    from xbt.errors import SpaceMismatchError as SpaceMismatchError
    from xbt.errors import XbtError as XbtError
    from xbt.evaluation import evaluate_retrieval as evaluate_retrieval
    from xbt.evaluation import recall_at_k as recall_at_k
    from xbt.index import Gallery as Gallery
    from xbt.projections import PairVectors as PairVectors
    from xbt.projections import Projection as Projection
    from xbt.projections import QueryEnsemble as QueryEnsemble
    from xbt.projections import choose_projection as choose_projection
    from xbt.projections import fit_projection as fit_projection
    from xbt.space import EmbeddingSpace as EmbeddingSpace
    from xbt.store import EmbeddingStore as EmbeddingStore

# Loaded at first use: torch and the backends take seconds to import.
_MODULES = {
    "CompatibleBackbone": "xbt.backbones",
    "CompatibleEncoder": "xbt.compatible",
    "DualEncoder": "xbt.encoders",
    "EmbeddingSpace": "xbt.space",
    "EmbeddingStore": "xbt.store",
    "Gallery": "xbt.index",
    "PairVectors": "xbt.projections",
    "Projection": "xbt.projections",
    "QueryEnsemble": "xbt.projections",
    "SpaceMismatchError": "xbt.errors",
    "XbtError": "xbt.errors",
    "choose_projection": "xbt.projections",
    "evaluate_retrieval": "xbt.evaluation",
    "fit_projection": "xbt.projections",
    "load_encoder": "xbt.encoders",
    "recall_at_k": "xbt.evaluation",
    "wrap_encoder": "xbt.encoders",
}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'xbt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
