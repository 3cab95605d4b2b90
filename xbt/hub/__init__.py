"""Saving, loading and sharing: directories and Hugging Face Hub repositories, read without unpickling."""

from __future__ import annotations

from xbt.errors import SavedPartError
from xbt.hub.cards import CardData, CardFacts, make_card, quoted
from xbt.hub.configs import NewerConfigWarning, SavedConfig, combined_warning
from xbt.hub.files import (
    CARD_NAME,
    CONFIG_NAME,
    PART_FILES,
    WEIGHTS_NAME,
    check_digests,
    digests,
    is_pickled,
    is_snapshot,
    read_json,
    require_file,
    write_config,
)
from xbt.hub.names import LOCAL, Naming, public_name, require_loadable, resolved_name
from xbt.hub.sharing import HubArtifact, warn_about_local_models
from xbt.hub.transfer import (
    SAFE_PATTERNS,
    HubAccess,
    cached_commit,
    fetch,
    fetch_repository,
    is_commit,
    is_repository,
    split_revision,
)
from xbt.hub.weights import (
    Stored,
    build_and_load,
    limit_allocations,
    load_weights,
    read_header,
    read_tensors,
    save_weights,
)

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "LOCAL",
    "PART_FILES",
    "SAFE_PATTERNS",
    "WEIGHTS_NAME",
    "CardData",
    "CardFacts",
    "HubAccess",
    "HubArtifact",
    "Naming",
    "NewerConfigWarning",
    "SavedConfig",
    "SavedPartError",
    "Stored",
    "build_and_load",
    "cached_commit",
    "check_digests",
    "combined_warning",
    "digests",
    "fetch",
    "fetch_repository",
    "is_commit",
    "is_pickled",
    "is_repository",
    "is_snapshot",
    "limit_allocations",
    "load_weights",
    "make_card",
    "public_name",
    "quoted",
    "read_header",
    "read_json",
    "read_tensors",
    "require_file",
    "require_loadable",
    "resolved_name",
    "save_weights",
    "split_revision",
    "warn_about_local_models",
    "write_config",
]
