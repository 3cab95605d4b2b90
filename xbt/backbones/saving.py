"""Files of a compatible backbone: config, weights, and content of the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from xbt.backbones.loading import rebuild_backbone
from xbt.backbones.preprocessing import ImagePreprocessing
from xbt.errors import ConfigError, XbtError
from xbt.heads import make_head
from xbt.heads.saving import PAPERS, known_head
from xbt.hub import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CardFacts,
    Naming,
    SavedConfig,
    SavedPartError,
    build_and_load,
    check_digests,
    digests,
    public_name,
    quoted,
    read_header,
    save_weights,
    write_config,
)
from xbt.space import EmbeddingSpace
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.backbones.model import CompatibleBackbone


ModelT = TypeVar("ModelT", bound="CompatibleBackbone")

MAX_IMAGE_SIZE = 2048
"""Maximum side in pixels in a saved config; loading allocates a blank image of this size."""
_FORMAT = "compatible_backbone"
_KEYS = ("format", "xbt_version", "backbone", "head", "preprocessing", "class_names", "old_space")
_SPARE_BYTES = 256 * 2**20  # a blank image, and the small text tower that open_clip builds besides

_SNIPPET = """from xbt import CompatibleBackbone

model = CompatibleBackbone.from_pretrained({{source}})
vectors = model.encode_images(["photo.jpg"])  # (1, {dim}) unit rows, for a gallery of its own"""

_OLD_SNIPPET = """
queries = model.encode_images(["photo.jpg"], space="old")  # (1, {old_dim}) unit rows, for the old gallery"""

_LIMITS = (
    "It has no text tower: it searches images with images.",
    "It was trained on the classes that its config lists; how far it carries to other images was not "
    "measured unless Results says so.",
    "Compatible means that both models' vectors can be compared, not that the old gallery becomes better "
    "than its own vectors allow.",
)


def save(model: CompatibleBackbone, directory: Path, naming: Naming) -> None:
    """Write the config and the weights, with the statistics of batch norms."""
    save_weights(model, directory / WEIGHTS_NAME)
    described, space = model.backbone.description(), model.old_space
    config = {
        "format": _FORMAT,
        "xbt_version": __version__,
        "backbone": described | {"spec": naming(described["spec"])},
        "head": {"kind": model.head.kind, "options": model.head.options()},
        "preprocessing": asdict(model.preprocessing),
        "class_names": model.class_names,
        "old_space": space.to_dict() | {"model": naming(space.model)} if space is not None else None,
        "sha256": digests(directory, [WEIGHTS_NAME]),
    }
    write_config(directory / CONFIG_NAME, config)


def load(directory: Path, kind: type[ModelT]) -> ModelT:
    """Load a model that was written by :func:`save`.

    Args:
        directory: Where it was saved.
        kind: :class:`~xbt.backbones.model.CompatibleBackbone` or what derives from it.

    Raises:
        SavedPartError: If a file is missing, damaged, changed, of another kind, or does not fit the other.
    """
    file = directory / CONFIG_NAME
    config = SavedConfig(file)
    if config.values.get("format") != _FORMAT:
        raise SavedPartError(f"{file} does not describe a compatible backbone")
    values = config.known(_KEYS, ["sha256"])
    weights = directory / WEIGHTS_NAME
    try:
        parts = _described(config, values, len(read_header(weights)))
        old_space = config.space("old_space")
        model = build_and_load(weights, lambda: _build(kind, *parts, old_space), file, _SPARE_BYTES)
    except SavedPartError:
        raise
    except XbtError as error:
        raise SavedPartError(f"{file} cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise SavedPartError(f"{file} lacks or misnames a key: {error}") from error
    check_digests(directory, values.get("sha256"))
    return model


def _described(
    config: SavedConfig, values: Mapping[str, Any], n_tensors: int
) -> tuple[dict[str, Any], str, dict[str, Any], ImagePreprocessing, list[str]]:
    """Parse backbone, head, preprocessing and class names from the config, and check their sizes."""
    backbone = config.only(values["backbone"], ("spec", "image_size", "architecture"), "backbone")
    given = config.only(values["head"], ("kind", "options"), "head")
    kind, options = known_head(config, given["kind"], given["options"], "head.options")
    settings = config.only(
        values["preprocessing"], [each.name for each in fields(ImagePreprocessing)], "preprocessing"
    )
    preprocessing = ImagePreprocessing(**settings)
    for what, size in (("backbone", backbone["image_size"]), ("preprocessing", preprocessing.image_size)):
        if int(size) > MAX_IMAGE_SIZE:
            raise ConfigError(f"image_size of the {what} is {size}, but may be at most {MAX_IMAGE_SIZE}")
    _require_depth(backbone, n_tensors)
    return backbone, kind, options, preprocessing, [str(name) for name in values["class_names"]]


def _require_depth(described: object, n_tensors: int, key: str = "backbone") -> None:
    """Refuse a network with more layers than saved tensors, before the layers are built."""
    if isinstance(described, Mapping):
        for name, each in described.items():
            _require_depth(each, n_tensors, str(name))
    elif isinstance(described, list):
        for each in described:
            _require_depth(each, n_tensors, key)
    elif ("layers" in key or "depth" in key) and isinstance(described, int) and described > n_tensors:
        raise ConfigError(
            f"{key} is {described}, but the weights have {n_tensors} tensors; save or download it again"
        )


def _build(
    model: type[ModelT],
    backbone: Mapping[str, Any],
    kind: str,
    options: Mapping[str, Any],
    preprocessing: ImagePreprocessing,
    class_names: list[str],
    old_space: EmbeddingSpace | None,
) -> ModelT:
    return model(rebuild_backbone(backbone), make_head(kind, options), preprocessing, class_names, old_space)


def facts(model: CompatibleBackbone) -> CardFacts:
    """Content of the model card of a backbone."""
    space = model.old_space
    compatible = ""
    if model.old_dim:
        old = quoted(public_name(space.model)) if space is not None else "an older model"
        compatible = (
            f" Their first {model.old_dim} coordinates can be searched in a gallery that {old} embedded: "
            "nothing in that gallery needs to be embedded again."
        )
    spec = quoted(public_name(model.backbone.spec))
    snippet = _SNIPPET + (_OLD_SNIPPET if model.old_dim else "")
    return CardFacts(
        title=f"A {model.head.kind} image model on {spec}",
        summary=(
            f"An image model made with xbt: the backbone {spec} with the head {quoted(model.head.kind)}, "
            f"{model.dim}-d vectors.{compatible}"
        ),
        snippet=snippet.format(dim=model.dim, old_dim=model.old_dim),
        method=PAPERS[model.head.kind],
        limits=_LIMITS,
        spaces={"old": space},
        tags=("image-retrieval",),
        pipeline_tag="image-feature-extraction",
        packages=("timm", "torchvision"),
    )
