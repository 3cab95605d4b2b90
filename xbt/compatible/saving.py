"""The files of a compatible encoder: its config, its parts, and the card for people."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData

from xbt.encoders import DualEncoder, has_lora, load_encoder, save_lora
from xbt.errors import EncoderError
from xbt.hub import SavedPartError, read_json
from xbt.projections import Projection
from xbt.projections.ensemble import QueryEnsemble
from xbt.space import EmbeddingSpace
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.compatible.encoder import CompatibleEncoder

CONFIG_NAME = "config.json"
PROJECTION_DIR = "projection"
ENSEMBLE_DIR = "ensemble"
LORA_DIR = "lora"
_FORMAT = "compatible_encoder"

_CARD = """# {new} speaks the space of {old}

A [CLIP](https://arxiv.org/abs/2103.00020) adapter made with xbt: the base model `{new}`{lora} and a
projection whose vectors can be searched in a gallery that `{old}` embedded. Nothing in that gallery needs
to be embedded again.

```python
import xbt

upgraded = xbt.CompatibleEncoder.from_pretrained("path/or/repo-of-this-adapter")
queries = upgraded.encode_texts(["a dog on a beach"])  # (1, {dim}) unit rows in the old space
```
"""

_ENSEMBLE_CARD = """
Its vectors are queries, and not for storing: each combines the projected vector with the old model's
({combinations}).{cost}
"""

_COST = """ So `{old}` is loaded and runs on every query as well; a caller that has its vectors
already passes `load_old=False` to `from_pretrained` and `old_vectors=` to `encode_texts`."""


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


def save(encoder: CompatibleEncoder, directory: Path) -> None:
    """Writes config, projection, and LoRA and ensemble if there are any; what is stale is removed."""
    for stale in (LORA_DIR, ENSEMBLE_DIR):
        shutil.rmtree(directory / stale, ignore_errors=True)
    parts: list[tuple[str, Projection | QueryEnsemble]] = [(PROJECTION_DIR, encoder.projection)]
    if encoder.ensemble is not None:
        parts.append((ENSEMBLE_DIR, encoder.ensemble))
    for name, part in parts:
        part.save_pretrained(directory / name)
        (directory / name / "README.md").unlink(missing_ok=True)
    if has_lora(encoder.new):
        save_lora(encoder.new, directory / LORA_DIR)
    new_space = encoder.projection.new_space or encoder.new.space
    config = {
        "format": _FORMAT,
        "xbt_version": __version__,
        "base": encoder.new.name,
        "lora": has_lora(encoder.new),
        "ensemble": encoder.ensemble is not None,
        "old": encoder.old.name if encoder.old is not None else encoder.space.model,
        "new_space": new_space.to_dict(),
        "old_space": encoder.space.to_dict(),
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(directory: Path) -> SavedEncoder:
    """Reads what :func:`save` wrote, now or before there were ensembles.

    Raises:
        SavedPartError: If a file is missing, damaged, or of another kind.
    """
    file = directory / CONFIG_NAME
    config = read_json(file)
    if config.get("format") != _FORMAT:
        raise SavedPartError(f"{file} does not describe a compatible encoder")
    projection = Projection.from_pretrained(directory / PROJECTION_DIR)
    try:
        new_space = EmbeddingSpace.from_dict(config["new_space"])
        base, lora, with_ensemble = str(config["base"]), bool(config["lora"]), config.get("ensemble", False)
        old = str(config.get("old") or config["old_space"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise SavedPartError(f"{file} lacks or misnames a key: {error}") from error
    ensemble = QueryEnsemble.from_pretrained(directory / ENSEMBLE_DIR) if with_ensemble else None
    return SavedEncoder(base, lora, new_space, projection, ensemble, old)


def load_model(
    given: DualEncoder | str | None, recorded: str, what: str, mend: str, device: str | torch.device
) -> DualEncoder:
    """The encoder that was given, or the one that was recorded.

    Args:
        given: An encoder, which stays where it is, or a specification; ``None`` for the recorded one.
        recorded: The recorded specification.
        what: What to call the recorded model in an error.
        mend: The option that names it anew.
        device: Where a loaded encoder goes.

    Raises:
        EncoderError: If it cannot be loaded.
    """
    if isinstance(given, DualEncoder):
        return given
    try:
        return load_encoder(given or recorded, device)
    except EncoderError as error:
        if given is not None:
            raise
        raise EncoderError(f"{what} cannot be loaded: {error}; pass {mend} to name it anew") from error


def model_card(encoder: CompatibleEncoder) -> ModelCard:
    """The card that is saved beside the weights."""
    repo = encoder.new.name.split(":", 1)[1].removeprefix("hf-hub:")
    data = ModelCardData(
        library_name="xbt",
        license="apache-2.0",
        base_model=repo if repo.count("/") == 1 and "local-dir" not in repo else None,
        tags=["backward-compatible", "clip", "image-text-retrieval"],
    )
    lora = " with a LoRA adapter" if has_lora(encoder.new) else ""
    old = encoder.space.model
    body = _CARD.format(new=encoder.new.name, old=old, lora=lora, dim=encoder.dim)
    ensemble = encoder.ensemble
    if ensemble is not None:
        listed = "; ".join(f"{direction}: {each.mode}" for direction, each in ensemble.directions.items())
        needed = any(map(ensemble.needs_old, ensemble.directions))
        cost = _COST.format(old=old) if needed else ""
        body += _ENSEMBLE_CARD.format(combinations=listed, cost=cost)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
