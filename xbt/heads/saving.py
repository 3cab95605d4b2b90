"""Files of a head: config, weights, and content of the model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from xbt.errors import ConfigError
from xbt.hub import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CardFacts,
    SavedConfig,
    SavedPartError,
    build_and_load,
    check_digests,
    digests,
    save_weights,
    write_config,
)
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.heads.base import CompatibleHead

HeadT = TypeVar("HeadT", bound="CompatibleHead")

PAPERS = {
    "bt2": 'BT² (Zhou et al., "BT²: Backward-compatible training with basis transformation", ICCV 2023, '
    "[arXiv 2211.03989](https://arxiv.org/abs/2211.03989)).",
    "oca": 'OCA (Ricci et al., "Backward-compatible aligned representations via an orthogonal transformation '
    'layer", ECCV 2024 workshops, [arXiv 2408.08793](https://arxiv.org/abs/2408.08793)).',
    "bct": 'BCT (Shen et al., "Towards backward-compatible representation learning", CVPR 2020, '
    "[arXiv 2003.11942](https://arxiv.org/abs/2003.11942)).",
    "independent": "A plain classifier's head, compatible with no other model.",
}
"""What a card says of a kind of head."""

_SNIPPET = """import torch
from xbt.heads import CompatibleHead

head = CompatibleHead.from_pretrained({{source}})
vectors = head.embed(torch.randn(2, {in_dim}))  # (2, {out_dim}) unit rows of a backbone's features"""


def save(head: CompatibleHead, directory: Path) -> None:
    """Write the config and the weights."""
    save_weights(head, directory / WEIGHTS_NAME)
    config = {
        "xbt_version": __version__,
        "kind": head.kind,
        "options": head.options(),
        "sha256": digests(directory, [WEIGHTS_NAME]),
    }
    write_config(directory / CONFIG_NAME, config)


def load(directory: Path, expected: type[HeadT]) -> HeadT:
    """Load a head that was written by :func:`save`.

    Raises:
        SavedPartError: If a file is missing, damaged, changed, of another kind, or does not fit the other.
    """
    from xbt.heads.base import make_head

    file = directory / CONFIG_NAME
    config = SavedConfig(file)
    if "options" not in config.values:
        raise SavedPartError(f"{file} lacks the key 'options'; save it again")
    config.known(["kind", "options"], ["xbt_version", "sha256"])
    kind, options = known_head(config, config.values["kind"], config.values["options"], "options")
    try:
        head = build_and_load(directory / WEIGHTS_NAME, lambda: make_head(kind, options), file)
    except (ConfigError, ValueError, RuntimeError) as error:
        if isinstance(error, SavedPartError):
            raise
        raise SavedPartError(f"{file} does not belong to a head: {error}") from error
    if not isinstance(head, expected):
        raise SavedPartError(f"{directory} holds a {type(head).__name__}, not a {expected.__name__}")
    check_digests(directory, config.values.get("sha256"))
    return head


def known_head(config: SavedConfig, kind: str, options: object, where: str) -> tuple[str, dict[str, object]]:
    """Return a head's kind and its options, without the options of newer versions of xbt.

    :func:`~xbt.heads.make_head` refuses unknown kinds and options that are not a mapping.
    """
    from xbt.heads.base import option_names

    names = option_names(kind)
    if not names or not isinstance(options, dict):
        return kind, options  # type: ignore[return-value]
    return kind, config.only(options, names, where)


def facts(head: CompatibleHead) -> CardFacts:
    """Content of the model card of a head."""
    return CardFacts(
        title=f"A head of the kind {head.kind}",
        summary=(
            f"The last part of a model, made with xbt: from {head.in_dim}-d features of a backbone to "
            f"{head.out_dim}-d vectors, of which the leading {head.old_dim} are compatible with an older "
            "model's."
        ),
        snippet=_SNIPPET.format(in_dim=head.in_dim, out_dim=head.out_dim),
        method=PAPERS[head.kind],
        limits=("It is of use only behind the backbone that it was trained with.",),
        tags=("representation-learning",),
        pipeline_tag="feature-extraction",
    )
