"""Encoders from open_clip: its pretrained tags, weights files, Hub repositories and local directories."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from open_clip.tokenizer import SigLipTokenizer, SimpleTokenizer, basic_clean, canonicalize_text
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch import Tensor, nn

from xbt.encoders.base import DualEncoder
from xbt.encoders.open_clip_loading import (
    WEIGHTS_FILE,
    build,
    builtin_config,
    find_open_clip,
    make_tokenizer,
    with_text_model,
    write_config,
)
from xbt.encoders.quiet import quiet
from xbt.encoders.text_batching import TextTransform, Tokenized, refusing_panics, require_known
from xbt.encoders.towers import at_path, shared_copy
from xbt.errors import EncoderError
from xbt.hub import HubAccess
from xbt.space import PROBE_TEXTS


class OpenClipEncoder(DualEncoder):
    """A CLIP built by open_clip.

    Attributes:
        model_config: open_clip's description of the architecture: ``embed_dim``, ``vision_cfg``,
            ``text_cfg`` and more.
        tokenizer: open_clip's tokenizer for the model.
    """

    # open_clip's residual blocks have nn.MultiheadAttention. timm's vision transformers and Hugging Face text
    # models have separate linear layers.
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
        self.text_transform(list(PROBE_TEXTS))  # fails early if the vocabularies differ

    @classmethod
    def create(
        cls,
        model_config: dict[str, Any] | str,
        preprocess: dict[str, Any] | None = None,
        name: str = "open_clip:untrained",
    ) -> Self:
        """Make a randomly initialised, trainable model; seed torch first for reproducible weights.

        Args:
            model_config: An open_clip model config, or the name of a built-in architecture. Models that use
                open_clip's own tokenizer need ``vocab_size`` 49408.
            preprocess: Overrides of open_clip's image preprocessing, such as ``mean``, ``std``,
                ``interpolation`` ("bicubic", "bilinear") or ``resize_mode`` ("shortest", "squash").
            name: Name of the encoder and its space.

        Returns:
            An encoder in training mode whose weights require gradients.

        Raises:
            EncoderError: If the architecture is unknown or the config is not valid.
        """
        config = builtin_config(model_config) if isinstance(model_config, str) else deepcopy(model_config)
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
        if missing:
            raise EncoderError(f"the open_clip model config lacks {', '.join(sorted(missing))}")
        try:
            with quiet():
                module = build(with_text_model(config), preprocess or {})
            tokenizer = make_tokenizer(config["text_cfg"])
        except Exception as error:
            raise EncoderError(f"open_clip cannot build a model from {config}: {error}") from error
        return cls(name, module, config, tokenizer)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write open_clip's own directory format; ``"open_clip:local-dir:DIRECTORY"`` loads it.

        Args:
            directory: Made if it does not exist; files of an earlier model in it are replaced.

        Raises:
            EncoderError: If LoRA is attached, because base and adapter are saved separately.
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
            # open_clip looks for tokenizer files in the directory if this key is present.
            config["text_cfg"].setdefault("hf_tokenizer_name", ".")
        write_config(folder, config, self._clip.visual.preprocess_cfg)

    @property
    def text_transform(self) -> TextTransform:
        """The model's own tokenizer."""
        clip = self._clip  # CoCa only has vocab_size in its text tower
        text = clip if hasattr(clip, "vocab_size") else clip.text
        return OpenClipTexts(self.name, self.tokenizer, text.vocab_size)

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
        # Text models of transformers end in proj, ResNets in attention pooling, and timm models in a head.
        ends = {
            "text": [f"{text}text_projection", f"{text}proj"],
            "image": ["visual.proj", "visual.attnpool.c_proj", "visual.head.proj", "visual.trunk.head"],
        }
        return {
            tower: next((path for path in paths if at_path(clip, path) is not None), paths[0])
            for tower, paths in ends.items()
        }


def load_open_clip(rest: str, name: str, access: HubAccess) -> OpenClipEncoder:
    """Load the model of a specification ``open_clip:REST``, frozen, in fp32 and eval mode.

    REST is ``ARCH/PRETRAINED``, ``local-dir:PATH``, ``hf-hub:org/repo`` or ``hf-hub:org/repo@revision``. A
    revision of the access overrides that one. Errors of open_clip itself are passed through.
    """
    source = find_open_clip(rest, name, access)
    module = source.module()
    encoder = OpenClipEncoder(name, module, source.config, source.tokenizer())
    module.eval().requires_grad_(False)
    encoder.revision = source.revision
    return encoder


class OpenClipTexts:
    """An open_clip tokenizer as a function; picklable, without weights."""

    def __init__(self, name: str, tokenizer: Any, vocab_size: int) -> None:
        self._name, self._tokenizer, self._vocab_size = name, tokenizer, vocab_size

    def __call__(self, texts: list[str]) -> Tokenized:
        """Tokenise n texts and find those that are cut."""
        if not texts:
            tokens = torch.zeros(0, int(self._tokenizer.context_length), dtype=torch.int64)
            return Tokenized(tokens, torch.zeros(0, dtype=torch.bool))
        with refusing_panics(self._name):
            return self._tokenised(texts)

    def _tokenised(self, texts: list[str]) -> Tokenized:
        tokenizer, context = self._tokenizer, int(self._tokenizer.context_length)
        tokens = require_known(tokenizer(texts), self._vocab_size, self._name)
        pad = 0
        if not isinstance(tokenizer, SimpleTokenizer):
            pad = tokenizer.tokenizer.pad_token_id
        # Only a full row can be a cut text, so only full rows are tokenised again and counted. Two positions
        # are compared, because the padding token may also be the end token.
        full = (tokens[:, -2:] != pad).any(dim=1)
        cut = [suspect and self._length(text) > context for text, suspect in zip(texts, full, strict=True)]
        return Tokenized(tokens, torch.tensor(cut))

    def _length(self, text: str) -> int:
        """Number of tokens of a text before cutting, including special tokens."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, SimpleTokenizer):
            return len(tokenizer.encode(text)) + 2
        if isinstance(tokenizer, SigLipTokenizer):
            cleaned = canonicalize_text(basic_clean(text))
        else:
            cleaned = tokenizer.clean_fn(text)
        # In the mode "clips" open_clip itself adds the begin, end and class tokens.
        clips = getattr(tokenizer, "tokenizer_mode", "") == "clips"
        ids = tokenizer.tokenizer(cleaned, add_special_tokens=not clips, verbose=False).input_ids
        return len(ids) + (3 if clips else 0)


def encode_tokens(clip: Any, tokens: Tensor) -> Tensor:
    """Call ``encode_text`` of a CLIP without peft's wrapper, also on fewer tokens than the context has."""
    tower, length = getattr(clip, "text", clip), tokens.shape[1]
    # Text models of transformers handle positions themselves and take any length.
    if hasattr(tower, "positional_embedding") and length < tower.context_length:
        positions, mask = tower.positional_embedding, tower.attn_mask
        short = shared_copy(
            tower,
            positional_embedding=positions[:length],
            attn_mask=None if mask is None else mask[:length, :length],
        )
        clip = short if tower is clip else shared_copy(clip, text=short)
    features: Tensor = clip.encode_text(tokens)
    return features


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
