"""Loading a saved compatible encoder, or a projection alone, as a compatible encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from xbt.compatible.encoder import CompatibleEncoder
from xbt.compatible.saving import CONFIG_NAME, ENSEMBLE_DIR, load_model, recorded_revision
from xbt.errors import ConfigError
from xbt.hub import HubAccess, fetch, is_snapshot, read_json
from xbt.projections import Projection


def load_upgraded(
    source: str | Path,
    new: str | None = None,
    old: str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> CompatibleEncoder:
    """Load a compatible encoder as it was saved, or a projection alone behind its new encoder.

    Args:
        source: Directory or Hub repository of a compatible encoder, or of a projection (stage 1).
        new: Specification of the new encoder, if the recorded one is not valid on this machine.
        old: Specification of the old encoder, likewise; ignored if no ensemble needs it.
        device: Device of the encoders.
        revision: Branch, tag or commit on the Hub.

    Raises:
        SavedPartError: If a file is missing, damaged, or of another kind.
        EncoderError: If a model cannot be loaded.
        SpaceMismatchError: If a model is not the one this was made for; the message names both.
        ConfigError: If a projection does not record its new encoder, and ``new`` is not given.
    """
    directory = fetch(source, revision=revision)
    if "kind" not in read_json(directory / CONFIG_NAME):
        needed = old if (directory / ENSEMBLE_DIR).is_dir() else None
        return CompatibleEncoder.from_pretrained(directory, base=new, old=needed, device=device)
    projection = Projection.from_pretrained(directory)
    recorded = None if projection.new_space is None else projection.new_space.model
    if new is None and recorded is None:
        raise ConfigError(
            f"the projection {directory} does not say which encoder it was fitted for; give new= as well"
        )
    what = f"the new model recorded in {directory}"
    access = HubAccess(recorded_revision(recorded or "", projection.new_space))
    base = load_model(new, recorded or "", what, "new=", device, is_snapshot(directory), access)
    return CompatibleEncoder(base, projection)
