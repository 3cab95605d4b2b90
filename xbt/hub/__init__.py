"""Saving, loading and sharing: directories and Hugging Face Hub repositories, read without unpickling."""

from __future__ import annotations

from xbt.errors import SavedPartError
from xbt.hub.cards import CardData, CardFacts, make_card, quoted
from xbt.hub.configs import NewerConfigWarning, SavedConfig, described_space
from xbt.hub.files import (
    CARD_NAME,
    CONFIG_NAME,
    LOCAL,
    WEIGHTS_NAME,
    Naming,
    is_pickled,
    is_repository,
    is_snapshot,
    public_name,
    read_json,
    require_file,
    require_loadable,
    resolved_name,
)
from xbt.hub.sharing import HubArtifact, warn_about_local_models
from xbt.hub.transfer import (
    SAFE_PATTERNS,
    HubAccess,
    LoadOptions,
    cached_commit,
    fetch,
    fetch_repository,
    is_commit,
    split_revision,
)
from xbt.hub.weights import Stored, limit_allocations, read_header, read_tensors

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "LOCAL",
    "SAFE_PATTERNS",
    "WEIGHTS_NAME",
    "CardData",
    "CardFacts",
    "HubAccess",
    "HubArtifact",
    "LoadOptions",
    "Naming",
    "NewerConfigWarning",
    "SavedConfig",
    "SavedPartError",
    "Stored",
    "cached_commit",
    "described_space",
    "fetch",
    "fetch_repository",
    "is_commit",
    "is_pickled",
    "is_repository",
    "is_snapshot",
    "limit_allocations",
    "make_card",
    "public_name",
    "quoted",
    "read_header",
    "read_json",
    "read_tensors",
    "require_file",
    "require_loadable",
    "resolved_name",
    "split_revision",
    "warn_about_local_models",
]
