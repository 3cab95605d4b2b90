"""The files of a compatible encoder: its config and its parts."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from xbt.encoders import DualEncoder, has_lora, load_encoder, save_lora
from xbt.encoders.lora_loading import CONFIG_FILE, WEIGHTS_FILE
from xbt.errors import EncoderError
from xbt.hub import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    CardData,
    HubAccess,
    Naming,
    SavedConfig,
    SavedPartError,
    check_digests,
    digests,
    is_commit,
    require_loadable,
    warn_of_directories,
    write_config,
)
from xbt.projections import Projection
from xbt.projections.ensemble import QueryEnsemble
from xbt.space import EmbeddingSpace
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.compatible.encoder import CompatibleEncoder

__all__ = [
    "CONFIG_NAME",
    "ENSEMBLE_DIR",
    "LORA_DIR",
    "PROJECTION_DIR",
    "SavedEncoder",
    "check_unchanged",
    "load_model",
    "read",
    "recorded_revision",
    "save",
]

PROJECTION_DIR = "projection"
ENSEMBLE_DIR = "ensemble"
LORA_DIR = "lora"
_FORMAT = "compatible_encoder"
_HERE = HubAccess()
_KEYS = ("format", "base", "lora", "new_space", "old_space")
_LATER = ("xbt_version", "ensemble", "old", "sha256")


class SavedEncoder(NamedTuple):
    """What a directory says and holds, the models aside.

    Attributes:
        base: Specification of the new encoder.
        lora: Whether there is a LoRA for it.
        new_space: The new encoder's space, without LoRA.
        projection: The map to the old space.
        ensemble: How queries are combined, or ``None``.
        old: Specification of the old encoder.
    """

    base: str
    lora: bool
    new_space: EmbeddingSpace
    projection: Projection
    ensemble: QueryEnsemble | None
    old: str

    @property
    def needs_old(self) -> bool:
        """Whether the ensemble needs the old encoder in any direction."""
        return self.ensemble is not None and any(map(self.ensemble.needs_old, self.ensemble.directions))


def save(encoder: CompatibleEncoder, directory: Path, naming: Naming, card: CardData) -> None:
    """Writes config, projection, and LoRA and ensemble if there are any; what is stale is removed."""
    for stale in (LORA_DIR, ENSEMBLE_DIR):
        shutil.rmtree(directory / stale, ignore_errors=True)
    parts: list[tuple[str, Projection | QueryEnsemble]] = [(PROJECTION_DIR, encoder.projection)]
    if encoder.ensemble is not None:
        parts.append((ENSEMBLE_DIR, encoder.ensemble))
    for name, part in parts:
        (directory / name).mkdir(exist_ok=True)
        part._write(directory / name, naming, card)
        (directory / name / CARD_NAME).unlink(missing_ok=True)  # there is one card for all
    names = [f"{name}/{file}" for name, _ in parts for file in (CONFIG_NAME, WEIGHTS_NAME)]
    if has_lora(encoder.new):
        save_lora(encoder.new, directory / LORA_DIR)
        (directory / LORA_DIR / CARD_NAME).unlink(missing_ok=True)
        names += [f"{LORA_DIR}/{file}" for file in (CONFIG_FILE, WEIGHTS_FILE)]
    base = card.base or encoder.new.name
    needs_old = encoder.ensemble is not None and any(
        map(encoder.ensemble.needs_old, encoder.ensemble.directions)
    )
    old = encoder.old.name if encoder.old is not None else encoder.space.model
    warn_of_directories({"base": base} | ({"old": old} if needs_old else {}), naming)
    new_space = encoder.projection.new_space or encoder.new.space
    config = {
        "format": _FORMAT,
        "xbt_version": __version__,
        "base": naming(base),
        "lora": has_lora(encoder.new),
        "ensemble": encoder.ensemble is not None,
        "old": naming(old),
        "new_space": new_space.to_dict() | {"model": naming(new_space.model)},
        "old_space": encoder.space.to_dict() | {"model": naming(encoder.space.model)},
        "sha256": digests(directory, names),
    }
    write_config(directory / CONFIG_NAME, config)


def read(directory: Path) -> SavedEncoder:
    """Reads what :func:`save` wrote, now or before there were ensembles.

    Raises:
        SavedPartError: If a file is missing, damaged, changed, or of another kind.
    """
    file = directory / CONFIG_NAME
    config = SavedConfig(file)
    if config.values.get("format") != _FORMAT:
        raise SavedPartError(f"{file} does not describe a compatible encoder")
    values = config.known(_KEYS, _LATER)
    projection = Projection.from_pretrained(directory / PROJECTION_DIR)
    new_space, old_space = config.space("new_space"), config.space("old_space")
    if new_space is None or old_space is None:
        raise SavedPartError(f"{file} lacks or misnames a key: both spaces must be there; save it again")
    base, old = values["base"], values.get("old") or old_space.model
    if not isinstance(base, str) or not isinstance(old, str):
        raise SavedPartError(f"{file} lacks or misnames a key: base and old must be specifications of models")
    with_ensemble = bool(values.get("ensemble", False))
    ensemble = QueryEnsemble.from_pretrained(directory / ENSEMBLE_DIR) if with_ensemble else None
    return SavedEncoder(base, bool(values["lora"]), new_space, projection, ensemble, old)


def check_unchanged(directory: Path) -> None:
    """Compares the files with the digests that the config records.

    Raises:
        SavedPartError: If one is missing or is not the file that was saved.
    """
    check_digests(directory, SavedConfig(directory / CONFIG_NAME).values.get("sha256"))


def recorded_revision(spec: str, space: EmbeddingSpace | None) -> str | None:
    """The commit that a recorded model was loaded at, if the space that records it is that model's.

    Args:
        spec: The recorded specification.
        space: The model's space. Of a model that was shared under another name it says nothing, and what is
            no full hash may have moved.
    """
    if space is None or space.model != spec or not is_commit(space.revision):
        return None
    return space.revision


def load_model(
    given: DualEncoder | str | None,
    recorded: str,
    what: str,
    option: str,
    device: str | torch.device,
    foreign: bool = False,
    access: HubAccess = _HERE,
) -> DualEncoder:
    """The encoder that was given, or the one that was recorded.

    Args:
        given: An encoder, which stays where it is, or a specification; ``None`` for the recorded one.
        recorded: The recorded specification.
        what: What to call the recorded model in an error.
        option: The option that names it.
        device: Where a loaded encoder goes.
        foreign: Whether the record came from the Hub: then a path in it is not followed.
        access: How the Hub is asked; its revision is that of the recorded model and not of a given one.

    Raises:
        EncoderError: If it cannot be loaded.
        SavedPartError: If the record is a path that is not to be followed.
    """
    if isinstance(given, DualEncoder):
        return given
    if given is None:
        require_loadable(recorded, what, option, foreign)
    else:
        access = access.at(None)
    try:
        return load_encoder(given or recorded, device, **asdict(access))
    except EncoderError as error:
        if given is not None:
            raise
        raise EncoderError(f"{what} cannot be loaded: {error}; pass {option} to name another") from error
