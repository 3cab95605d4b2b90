"""What the card of a compatible encoder says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xbt.encoders import has_lora
from xbt.encoders.repositories import hub_repository
from xbt.hub import LOCAL, CardData, CardFacts, public_name, quoted
from xbt.projections.base import described_method

if TYPE_CHECKING:
    from xbt.compatible.encoder import CompatibleEncoder

_SNIPPET = """import xbt

upgraded = xbt.CompatibleEncoder.from_pretrained({{source}}{options})
queries = upgraded.encode_texts(["a dog on a beach"])  # (1, {dim}) unit rows in the old space"""

_LIMITS = (
    "It speaks the space of the one old model named below, at that revision and with that preprocessing; a "
    "gallery that any other model embedded cannot be searched with it.",
    "Queries are not better than the old gallery's vectors allow; what the old model never saw cannot be "
    "found.",
    "It inherits what the new model knows, and what it gets wrong; it was judged, if at all, on the data "
    "named under Results, so measure it on your own before you rely on it.",
)


def facts(encoder: CompatibleEncoder, card: CardData) -> CardFacts:
    """What the card says of new model, old model, LoRA, projection and ensemble."""
    base = public_name(card.base or encoder.new.name)
    old = public_name(encoder.space.model)
    lora = " with a LoRA adapter" if has_lora(encoder.new) else ""
    summary = (
        f"A [CLIP](https://arxiv.org/abs/2103.00020) adapter made with xbt: the base model "
        f"{quoted(base)}{lora} and a projection whose vectors can be searched in a gallery that "
        f"{quoted(old)} embedded. Nothing in that gallery needs to be embedded again."
    )
    names = {"base": base, **({"old": old} if _needs_old(encoder) else {})}
    missing = [option for option, name in names.items() if name.startswith(LOCAL)]
    limits = list(_LIMITS)
    if missing:
        limits.append(
            f"The model that {' and '.join(f'{option}=' for option in missing)} names is not on the Hub; ask "
            "who shared this for it."
        )
    return CardFacts(
        title=f"{quoted(base)} speaks the space of {quoted(old)}",
        summary=summary + _ensemble(encoder, old),
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


def _needs_old(encoder: CompatibleEncoder) -> bool:
    ensemble = encoder.ensemble
    return ensemble is not None and any(map(ensemble.needs_old, ensemble.directions))


def _ensemble(encoder: CompatibleEncoder, old: str) -> str:
    if encoder.ensemble is None:
        return ""
    rules = "; ".join(f"{direction}: {each.mode}" for direction, each in encoder.ensemble.directions.items())
    told = (
        "\n\nIts vectors are queries, and not for storing: each combines the projected vector with the old "
        f"model's ({rules})."
    )
    if _needs_old(encoder):
        told += (
            f" So {quoted(old)} is loaded and runs on every query as well; a caller that has its vectors "
            "already passes `load_old=False` to `from_pretrained` and `old_vectors=` to `encode_texts`."
        )
    return told


def _method(encoder: CompatibleEncoder) -> str:
    told = f"Projection: {described_method(encoder.projection.method, encoder.projection.kind)}"
    if has_lora(encoder.new):
        told += (
            "\n\nThe new model was fine-tuned behind it with LoRA (Hu et al., 2021, "
            "[arXiv 2106.09685](https://arxiv.org/abs/2106.09685)), as XBT's second stage does (Jang & Lim, "
            "ICCV 2025, [arXiv 2405.14715](https://arxiv.org/abs/2405.14715))."
        )
    if encoder.ensemble is not None:
        told += (
            '\n\nQueries are combined after "SLERP for backward-compatible multimodal retrieval" '
            "([arXiv 2609.39836](https://arxiv.org/abs/2609.39836))."
        )
    return told
