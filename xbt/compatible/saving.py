"""The files of a compatible encoder: its config, its parts, and the facts for its model card."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from xbt.encoders import DualEncoder, has_lora, load_encoder, save_lora
from xbt.encoders.configs import hub_repository
from xbt.encoders.lora_loading import CONFIG_FILE, WEIGHTS_FILE
from xbt.errors import EncoderError
from xbt.hub import (
    CARD_NAME,
    LOCAL,
    CardData,
    CardFacts,
    HubAccess,
    Naming,
    SavedConfig,
    SavedPartError,
    described_space,
    is_commit,
    public_name,
    quoted,
    require_loadable,
    warn_about_local_models,
)
from xbt.projections.base import Projection, described_method
from xbt.projections.ensemble import QueryEnsemble
from xbt.space import EmbeddingSpace

if TYPE_CHECKING:
    from xbt.compatible.encoder import CompatibleEncoder


PROJECTION_DIR = "projection"
ENSEMBLE_DIR = "ensemble"
LORA_DIR = "lora"
_HERE = HubAccess()


class SavedEncoder(NamedTuple):
    """Content of a saved directory, without the models.

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
        """True if the ensemble needs the old encoder in any direction."""
        return _needs_old(self.ensemble)


def write_parts(encoder: CompatibleEncoder, directory: Path, naming: Naming, card: CardData) -> list[str]:
    """Write projection, and ensemble and LoRA if there are any, and return the names of their files."""
    for stale in (LORA_DIR, ENSEMBLE_DIR):
        shutil.rmtree(directory / stale, ignore_errors=True)
    names = []
    for folder, part in ((PROJECTION_DIR, encoder.projection), (ENSEMBLE_DIR, encoder.ensemble)):
        if part is not None:
            names += [f"{folder}/{name}" for name in part._write(directory / folder, naming, card)]
    if has_lora(encoder.new):
        save_lora(encoder.new, directory / LORA_DIR)
        names += [f"{LORA_DIR}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)]
    for folder in (PROJECTION_DIR, ENSEMBLE_DIR, LORA_DIR):
        (directory / folder / CARD_NAME).unlink(missing_ok=True)  # there is one card for all
    return names


def described(encoder: CompatibleEncoder, naming: Naming, card: CardData) -> dict[str, Any]:
    """Both models' specifications and spaces, and which parts there are, for the config."""
    base = card.base or encoder.new.name
    old = encoder.old.name if encoder.old is not None else encoder.space.model
    warn_about_local_models({"base": base} | ({"old": old} if _needs_old(encoder.ensemble) else {}), naming)
    return {
        "base": naming(base),
        "lora": has_lora(encoder.new),
        "ensemble": encoder.ensemble is not None,
        "old": naming(old),
        "new_space": described_space(encoder.projection.new_space or encoder.new.space, naming),
        "old_space": described_space(encoder.space, naming),
    }


def read(config: SavedConfig) -> SavedEncoder:
    """Read what :func:`described` and :func:`write_parts` wrote."""
    file, values = config.file, config.values
    projection = Projection.from_pretrained(file.parent / PROJECTION_DIR)
    new_space, old_space = config.space("new_space"), config.space("old_space")
    if new_space is None or old_space is None:
        raise SavedPartError(f"{file} lacks or misnames a key: both spaces must be there; save it again")
    base, old = values["base"], values["old"]
    if not isinstance(base, str) or not isinstance(old, str):
        raise SavedPartError(f"{file} lacks or misnames a key: base and old must be specifications of models")
    ensemble = QueryEnsemble.from_pretrained(file.parent / ENSEMBLE_DIR) if values["ensemble"] else None
    return SavedEncoder(base, bool(values["lora"]), new_space, projection, ensemble, old)


def recorded_revision(spec: str, space: EmbeddingSpace | None) -> str | None:
    """The commit that a recorded model was loaded at, or ``None``.

    Args:
        spec: The recorded specification.
        space: The recorded space. Its revision only counts if the space is that of ``spec`` and the revision
            is a full hash, because branches and tags can move.
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
    """Load the given encoder, or else the recorded one.

    Args:
        given: An encoder, which is returned as it is, or a specification; ``None`` for the recorded one.
        recorded: The recorded specification.
        what: Name of the recorded model in errors.
        option: The option that names it.
        device: Device of a loaded encoder.
        foreign: Whether the record came from the Hub: then a path in it is refused.
        access: Hub access; its revision applies to the recorded model only.
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


_SNIPPET = """import xbt

upgraded = xbt.CompatibleEncoder.from_pretrained({{source}}{options})
queries = upgraded.encode_texts(["a dog on a beach"])  # (1, {dim}) unit rows in the old space"""

_LIMITS = (
    "Its vectors belong to the space of the one old model named below, at that revision and with that "
    "preprocessing. It cannot search a gallery that any other model embedded.",
    "Its queries are limited by the old gallery's vectors: it cannot find what the old model does not "
    "represent.",
    "It inherits the new model's knowledge and errors. It was evaluated, if at all, on the data named under "
    "Results, so measure it on your own data before you rely on it.",
)


def facts(encoder: CompatibleEncoder, card: CardData) -> CardFacts:
    """Facts for the model card: new model, old model, LoRA, projection and ensemble."""
    base = public_name(card.base or encoder.new.name)
    old = public_name(encoder.space.model)
    lora = " with a LoRA adapter" if has_lora(encoder.new) else ""
    summary = (
        f"A [CLIP](https://arxiv.org/abs/2103.00020) adapter made with xbt: the base model "
        f"{quoted(base)}{lora} and a projection into the space of {quoted(old)}. Its queries can search a "
        "gallery that the old model embedded, and nothing in that gallery needs to be embedded again."
    )
    names = {"base": base, **({"old": old} if _needs_old(encoder.ensemble) else {})}
    missing = [option for option, name in names.items() if name.startswith(LOCAL)]
    limits = list(_LIMITS)
    if missing:
        limits.append(
            f"The model for {' and '.join(f'{option}=' for option in missing)} is not on the Hub; ask the "
            "owner of this repository for it."
        )
    return CardFacts(
        title=f"{quoted(base)} in the space of {quoted(old)}",
        summary=summary + _ensemble_paragraphs(encoder, old),
        snippet=_SNIPPET.format(
            dim=encoder.dim, options="".join(f', {option}="backend:its specification"' for option in missing)
        ),
        method=_method(encoder),
        limits=limits,
        spaces={"new": encoder.projection.new_space, "old": encoder.space},
        base=hub_repository(base),
        tags=("clip", "image-text-retrieval"),
        packages=("open_clip_torch", "transformers", "peft"),
    )


def _needs_old(ensemble: QueryEnsemble | None) -> bool:
    return ensemble is not None and any(map(ensemble.needs_old, ensemble.directions))


def _ensemble_paragraphs(encoder: CompatibleEncoder, old: str) -> str:
    if encoder.ensemble is None:
        return ""
    rules = "; ".join(f"{direction}: {rule.mode}" for direction, rule in encoder.ensemble.directions.items())
    text = (
        "\n\nIts vectors are queries and must not be stored: each combines the projected vector with the old "
        f"model's ({rules})."
    )
    if _needs_old(encoder.ensemble):
        text += (
            f" So {quoted(old)} is loaded and also runs on every query. If you already have its vectors, "
            "pass `load_old=False` to `from_pretrained` and `old_vectors=` to `encode_texts`."
        )
    return text


def _method(encoder: CompatibleEncoder) -> str:
    text = f"Projection: {described_method(encoder.projection.method, encoder.projection.kind)}"
    if has_lora(encoder.new):
        text += (
            "\n\nThe new model was fine-tuned with LoRA against this projection (Hu et al., 2021, "
            "[arXiv 2106.09685](https://arxiv.org/abs/2106.09685)), as XBT's second stage does (Jang & Lim, "
            "ICCV 2025, [arXiv 2405.14715](https://arxiv.org/abs/2405.14715))."
        )
    if encoder.ensemble is not None:
        text += (
            '\n\nQueries are combined after "SLERP for backward-compatible multimodal retrieval" '
            "([arXiv 2609.39836](https://arxiv.org/abs/2609.39836))."
        )
    return text
