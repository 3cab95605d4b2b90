"""The files of a compatible backbone: its config, its weights, and the card for people."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from xbt.backbones.loading import rebuild_backbone
from xbt.backbones.preprocessing import ImagePreprocessing
from xbt.errors import XbtError
from xbt.heads import make_head
from xbt.hub import SavedPartError, load_weights, read_json
from xbt.space import EmbeddingSpace
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.backbones.compatible_backbone import CompatibleBackbone

ModelT = TypeVar("ModelT", bound="CompatibleBackbone")

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_FORMAT = "compatible_backbone"

_CARD = """# {name}

An image model made with xbt: the backbone `{spec}` with the head `{kind}`, {dim}-d vectors.{compatible}

```python
from xbt.backbones import CompatibleBackbone

model = CompatibleBackbone.from_pretrained("path/or/repo-of-this-model")
vectors = model.encode_images(["photo.jpg"])  # (1, {dim}) unit rows{old}
```
"""


def save(model: CompatibleBackbone, directory: Path) -> None:
    """Writes config and weights, batch norms' statistics among them."""
    # Clones, because safetensors refuses tensors that share memory.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, directory / WEIGHTS_NAME)
    config = {
        "format": _FORMAT,
        "xbt_version": __version__,
        "backbone": model.backbone.description(),
        "head": {"kind": model.head.kind, "options": model.head.options()},
        "preprocessing": asdict(model.preprocessing),
        "class_names": model.class_names,
        "old_space": model.old_space.to_dict() if model.old_space is not None else None,
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(directory: Path, kind: type[ModelT]) -> ModelT:
    """Builds the model that :func:`save` wrote and loads its weights, strictly.

    Args:
        directory: Where it was saved.
        kind: :class:`~xbt.backbones.compatible_backbone.CompatibleBackbone` or what derives from it.

    Raises:
        SavedPartError: If a file is missing, damaged, of another kind, or does not fit the other.
    """
    file = directory / CONFIG_NAME
    config = read_json(file)
    if config.get("format") != _FORMAT:
        raise SavedPartError(f"{file} does not describe a compatible backbone")
    try:
        # What is drawn here is overwritten: it must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            old_space = config["old_space"]
            model = kind(
                rebuild_backbone(config["backbone"]),
                make_head(config["head"]["kind"], config["head"]["options"]),
                ImagePreprocessing(**config["preprocessing"]),
                [str(name) for name in config["class_names"]],
                None if old_space is None else EmbeddingSpace.from_dict(old_space),
            )
    except XbtError as error:
        raise SavedPartError(f"{file} cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise SavedPartError(f"{file} lacks or misnames a key: {error}") from error
    load_weights(model, directory / WEIGHTS_NAME)
    return model


def model_card(model: CompatibleBackbone) -> ModelCard:
    """The card that is saved beside the weights."""
    data = ModelCardData(
        library_name="xbt",
        license="apache-2.0",
        pipeline_tag="image-feature-extraction",
        tags=["backward-compatible", "image-retrieval"],
    )
    old = ""
    compatible = ""
    if model.old_dim:
        space = f"`{model.old_space.model}`" if model.old_space is not None else "an older model"
        compatible = (
            f" Their first {model.old_dim} coordinates can be searched in a gallery that {space} embedded: "
            "nothing in that gallery needs to be embedded again."
        )
        old = f'\nqueries = model.encode_images(["photo.jpg"], space="old")  # (1, {model.old_dim}), for it'
    body = _CARD.format(
        name=model.name,
        spec=model.backbone.spec,
        kind=model.head.kind,
        dim=model.dim,
        compatible=compatible,
        old=old,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
