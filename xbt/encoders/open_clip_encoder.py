"""Encoders from open_clip: its pretrained tags, weight files, Hub repositories and local directories."""

from __future__ import annotations

import difflib
import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch import Tensor, nn

from xbt.encoders.base import DualEncoder
from xbt.encoders.folding import has_path
from xbt.encoders.open_clip_text import OpenClipTexts, encode_tokens
from xbt.encoders.quiet import quiet
from xbt.encoders.text_batches import TextTransform
from xbt.errors import EncoderError
from xbt.hub import SAFE_PATTERNS, cached_commit, fetch, split_revision
from xbt.probe import PROBE_TEXTS

HUB_PATTERNS = (*SAFE_PATTERNS, "*.txt", "*.model")
"""What is fetched of a repository at a revision: config, safetensors and the tokenizer's files."""
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


class OpenClipEncoder(DualEncoder):
    """A CLIP built by open_clip.

    Attributes:
        model_config: open_clip's description of the architecture: ``embed_dim``, ``vision_cfg``,
            ``text_cfg`` and more.
        tokenizer: open_clip's tokenizer for it.
    """

    # Residual blocks hold nn.MultiheadAttention, timm's vision transformers and Hugging Face text models
    # separate linear layers.
    lora_targets: ClassVar[dict[str, str]] = {
        "text": r"(text\.)?transformer\.resblocks\.\d+\.attn|text\.transformer\..*\.(query|key|value)",
        "image": r"visual\.transformer\.resblocks\.\d+\.attn|visual\.trunk\.(.*\.)?attn\.(qkv|proj)",
    }

    def __init__(self, name: str, module: nn.Module, model_config: dict[str, Any], tokenizer: Any) -> None:
        clip: Any = module
        config: dict[str, Any] = clip.visual.preprocess_cfg
        super().__init__(
            name,
            module,
            dim=int(model_config["embed_dim"]),
            context_length=int(tokenizer.context_length),
            preprocessing=_describe(config),
            image_transform=image_transform_v2(PreprocessCfg(**config), is_train=False),
        )
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.text_transform(list(PROBE_TEXTS))  # fails now, not later, if the vocabularies differ

    @classmethod
    def create(
        cls,
        model_config: dict[str, Any] | str,
        preprocess: dict[str, Any] | None = None,
        name: str = "open_clip:untrained",
    ) -> Self:
        """Makes a randomly initialised, trainable model; seed torch beforehand.

        Args:
            model_config: An open_clip model config, or the name of a built-in architecture. Models that use
                open_clip's own tokenizer need ``vocab_size`` 49408.
            preprocess: Overrides of open_clip's image preprocessing, such as ``mean``, ``std``,
                ``interpolation`` ("bicubic", "bilinear") or ``resize_mode`` ("shortest", "squash").
            name: What the encoder and its space are called.

        Returns:
            An encoder in training mode whose weights require gradients.

        Raises:
            EncoderError: If the architecture is unknown or the config does not describe one.
        """
        config = _builtin_config(model_config) if isinstance(model_config, str) else deepcopy(model_config)
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
        if missing:
            raise EncoderError(f"the open_clip model config lacks {', '.join(sorted(missing))}")
        try:
            with quiet(), TemporaryDirectory() as directory:
                _write_config(Path(directory), config, preprocess or {})
                module = open_clip.create_model(
                    f"local-dir:{directory}", precision="fp32", load_weights=False, pretrained_text=False
                )
            tokenizer = _own_tokenizer(config["text_cfg"])
        except Exception as error:
            raise EncoderError(f"open_clip cannot build a model from {config}: {error}") from error
        return cls(name, module, config, tokenizer)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes open_clip's own directory format; ``"open_clip:local-dir:DIRECTORY"`` loads it.

        Args:
            directory: Made if it does not exist; files of an earlier model in it are replaced.

        Raises:
            EncoderError: If LoRA is attached; the base and the adapter are saved separately.
        """
        if hasattr(self.module, "peft_config"):
            raise EncoderError(f"{self.name} has LoRA attached; save the adapter with save_lora instead")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Clones, because safetensors refuses tensors that share memory.
        state = {key: value.cpu().contiguous().clone() for key, value in self.module.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)
        config = deepcopy(self.model_config)
        if not isinstance(self.tokenizer, SimpleTokenizer):
            self.tokenizer.save_pretrained(folder)
            # open_clip looks for tokenizer files in the directory whenever this key is present.
            config["text_cfg"].setdefault("hf_tokenizer_name", ".")
        _write_config(folder, config, self._clip.visual.preprocess_cfg)

    @property
    def text_transform(self) -> TextTransform:
        """open_clip's own tokenizer."""
        return OpenClipTexts(self.name, self.tokenizer, self._clip.vocab_size)

    def _text_features(self, tokens: Tensor) -> Tensor:
        return encode_tokens(self._bare, tokens)

    def _image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._clip.encode_image(pixels)
        return features

    def _towers(self) -> list[nn.Module]:
        clip = self._bare
        return [clip.visual, getattr(clip, "text", clip).transformer]

    def _last_layers(self) -> dict[str, str]:
        clip = self._bare
        text = "text." if hasattr(clip, "text") else ""
        # Text models of transformers call it proj; ResNets pool with attention; timm models have a head.
        ends = {
            "text": [f"{text}text_projection", f"{text}proj"],
            "image": ["visual.proj", "visual.attnpool.c_proj", "visual.head.proj", "visual.trunk.head"],
        }
        return {tower: next(filter(partial(has_path, clip), ends[tower]), ends[tower][0]) for tower in ends}


def load_open_clip(rest: str, name: str) -> OpenClipEncoder:
    """Loads what stands after ``open_clip:`` in a specification.

    Args:
        rest: ``ARCH/PRETRAINED``, ``local-dir:PATH``, ``hf-hub:org/repo`` or ``hf-hub:org/repo@revision``.
        name: The whole specification.

    Returns:
        A frozen fp32 encoder in eval mode.

    Raises:
        EncoderError: If the directory, architecture or tag does not exist, or architecture and tag were
            trained with different activations. Errors of open_clip itself are passed through.
    """
    if rest.startswith("local-dir:"):
        folder = Path(rest.removeprefix("local-dir:")).expanduser()
        if not folder.is_dir():
            raise EncoderError(f"the directory {folder} of '{name}' does not exist")
        if not (folder / CONFIG_FILE).is_file():
            raise EncoderError(f"{folder} has no {CONFIG_FILE}, so '{name}' is not an open_clip directory")
        model, tag, repo, revision = f"local-dir:{folder}", None, None, None
    elif rest.startswith("hf-hub:"):
        tag, (repo, revision) = None, split_revision(rest.removeprefix("hf-hub:"))
        # open_clip cannot ask for a revision, but reads a directory in which one was put.
        model = f"local-dir:{fetch(repo, revision=revision, patterns=HUB_PATTERNS)}" if revision else rest
    else:
        model, _, tag = rest.partition("/")
        _check_tag(model, tag)
        repo, revision = str(get_pretrained_cfg(model, tag).get("hf_hub", "")).rstrip("/"), None
    config = open_clip.get_model_config(model)
    module = open_clip.create_model(
        model,
        pretrained=tag,
        precision="fp32",
        pretrained_text=False,
        require_pretrained=True,  # otherwise open_clip goes on with random weights
    )
    encoder = OpenClipEncoder(name, module, config, open_clip.get_tokenizer(model))
    module.eval().requires_grad_(False)
    if repo:
        commits = (cached_commit(repo, file, revision) for file in (WEIGHTS_FILE, CONFIG_FILE))
        encoder.revision = next(filter(None, commits), None)
    return encoder


def _check_tag(arch: str, tag: str) -> None:
    """Refuses, before anything is downloaded, weights that do not belong to the architecture."""
    quick = bool(_builtin_config(arch).get("quick_gelu", False))
    trained = get_pretrained_cfg(arch, tag)
    if not trained:
        if Path(tag).is_file():
            return
        known = ", ".join(list_pretrained_tags_by_model(arch)) or "none"
        raise EncoderError(f"'{tag}' is neither a file nor a pretrained tag of {arch}; its tags are: {known}")
    if bool(trained.get("quick_gelu", False)) == quick:
        return
    twin = arch.removesuffix("-quickgelu") if quick else f"{arch}-quickgelu"
    mend = f"use 'open_clip:{twin}/{tag}'" if twin in open_clip.list_models() else "no architecture fits it"
    raise EncoderError(
        f"the weights '{tag}' were trained {'without' if quick else 'with'} QuickGELU, but the architecture "
        f"{arch} {'has' if quick else 'lacks'} it and would give wrong vectors; {mend}"
    )


def _builtin_config(arch: str) -> dict[str, Any]:
    # By name only: open_clip would take "hf-hub:..." here as well.
    if arch not in open_clip.list_models():
        close = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise EncoderError(f"open_clip knows no architecture '{arch}'{hint}")
    config: dict[str, Any] = open_clip.get_model_config(arch)
    return config


def _own_tokenizer(text_config: dict[str, Any]) -> Any:
    length = text_config.get("context_length", 77)
    options = text_config.get("tokenizer_kwargs", {})
    source = text_config.get("hf_tokenizer_name")
    if not source:
        return SimpleTokenizer(context_length=length, **options)
    mode = text_config.get("tokenizer_mode")
    return HFTokenizer(source, context_length=length, tokenizer_mode=mode, **options)


def _describe(config: dict[str, Any]) -> dict[str, Any]:
    size = config["size"]
    return {
        "backend": "pil",
        "size": list(size) if isinstance(size, list | tuple) else [size, size],
        "interpolation": config["interpolation"],
        "resize_mode": config["resize_mode"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }


def _write_config(folder: Path, model_config: dict[str, Any], preprocess: dict[str, Any]) -> None:
    # The size is left out: open_clip takes it from the image tower.
    kept = {key: preprocess[key] for key in preprocess if key not in ("size", "mode")}
    config = {"model_cfg": model_config, "preprocess_cfg": kept}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
