"""Encoders from Hugging Face transformers: CLIP and SigLIP."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from xbt.encoders.base import DualEncoder
from xbt.encoders.configs import resolve_user_link
from xbt.encoders.text_batching import TextTransform, Tokenized, refusing_panics, require_known
from xbt.encoders.transformers_files import (
    WEIGHTS,
    Pixels,
    describe,
    find_transformers,
    load_image_processor,
    load_tokenizer,
)
from xbt.errors import EncoderError
from xbt.hub import HubAccess, is_pickled, limit_allocations, read_json
from xbt.space import PROBE_TEXTS

CAPITALS = "A Red DOG"
"""A text that shows if a tokenizer keeps capitals."""

LEGACY_EOS = 2
"""The wrong end token of old CLIP configs, for which transformers pools at the highest id instead."""


class TransformersEncoder(DualEncoder):
    """A ``CLIPModel`` or ``SiglipModel``.

    Attributes:
        tokenizer: The tokenizer; it pads to the full context, as open_clip and SigLIP's training do.
        processor: The image processor, which always resizes with PIL.
    """

    lora_targets: ClassVar[dict[str, str]] = {
        "text": r"text_model\.(.*\.)?encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
        "image": r"vision_model\.(.*\.)?encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    }

    def __init__(self, name: str, module: nn.Module, tokenizer: Any, processor: Any) -> None:
        config: Any = module.config
        super().__init__(
            name,
            module,
            dim=_dimension(name, config),
            context_length=int(config.text_config.max_position_embeddings),
            preprocessing=describe(processor, int(config.vision_config.image_size), name),
            image_transform=Pixels(processor),
        )
        self.tokenizer = tokenizer
        self.processor = processor
        _check_tokenizer(name, config, tokenizer)
        if config.model_type == "siglip":
            _lower_case(tokenizer)
        # Positions were trained for texts that start at 0, regardless of the tokenizer's files.
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        self.text_transform(list(PROBE_TEXTS))  # fails early if the vocabularies differ

    @property
    def text_transform(self) -> TextTransform:
        """The model's own tokenizer."""
        vocab_size = self._clip.config.text_config.vocab_size
        return _Texts(self.name, self.tokenizer, self.context_length, vocab_size)

    def _text_features(self, tokens: Tensor) -> Tensor:
        # No attention mask: CLIP's text tower is causal and pools before the padding, and SigLIP's was
        # trained to attend to padding.
        return pooled(self._clip.get_text_features(input_ids=tokens))

    def _image_features(self, pixels: Tensor) -> Tensor:
        return pooled(self._clip.get_image_features(pixel_values=pixels))

    def _towers(self) -> list[nn.Module]:
        return [self._clip.vision_model, self._clip.text_model]

    def _last_layers(self) -> dict[str, str]:
        if self._bare.config.model_type == "clip":
            return {"text": "text_projection", "image": "visual_projection"}
        return {"text": "text_model.head", "image": "vision_model.head"}


class _Texts:
    """A tokenizer as a function that pads to the whole context; picklable, without weights."""

    def __init__(self, name: str, tokenizer: Any, context_length: int, vocab_size: int) -> None:
        self._name, self._tokenizer = name, tokenizer
        self._context, self._vocab_size = context_length, vocab_size

    def __call__(self, texts: list[str]) -> Tokenized:
        if not texts:
            tokens = torch.zeros(0, self._context, dtype=torch.int64)
            return Tokenized(tokens, torch.zeros(0, dtype=torch.bool))
        with refusing_panics(self._name):
            return self._tokenised(texts)

    def _tokenised(self, texts: list[str]) -> Tokenized:
        encoded = self._tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self._context,
            return_attention_mask=True,
            return_tensors="pt",
        )
        cut = encoded["attention_mask"][:, -1].bool()
        # Only rows without padding can be cut texts, so only these are tokenised again and counted.
        suspects = [text for text, is_full in zip(texts, cut, strict=True) if is_full]
        if suspects:
            whole = self._tokenizer(suspects, verbose=False)["input_ids"]
            cut[cut.clone()] = torch.tensor([len(ids) > self._context for ids in whole])
        return Tokenized(require_known(encoded["input_ids"], self._vocab_size, self._name), cut)


def pooled(output: Any) -> Tensor:
    """The projected vectors: transformers 5 returns an output object, 4 a tensor."""
    vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return vectors


def load_transformers(source: str, name: str, access: HubAccess) -> TransformersEncoder:
    """Load the model of a specification ``transformers:SOURCE``, frozen, in fp32 and eval mode.

    SOURCE is a directory, or a Hub repository ``org/name`` or ``org/name@revision``. A revision of the access
    overrides that one.
    """
    folder, commit = find_transformers(source, name, access)
    tokenizer, processor = load_tokenizer(folder, name), load_image_processor(folder, name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    module = _load_module(folder, config, name)
    encoder = TransformersEncoder(name, module, tokenizer, processor)
    encoder.revision = commit
    module.eval().requires_grad_(False)
    return encoder


def _load_module(folder: Path, config: Any, name: str) -> nn.Module:
    weights = [resolve_user_link(file) for file in sorted(folder.glob("model*.safetensors"))]
    if not weights:
        pickled = next((file.name for file in sorted(folder.glob("*")) if is_pickled(file.name)), None)
        other = f" but {pickled}, which would have to be unpickled" if pickled else ""
        raise EncoderError(
            f"'{name}' could not be loaded: {folder} has no {WEIGHTS[0]}{other}; save the model as "
            "safetensors (model.save_pretrained)"
        )
    index = folder / WEIGHTS[1]
    if not (folder / WEIGHTS[0]).is_file() and index.is_file():
        shards = read_json(resolve_user_link(index)).get("weight_map")
        if not isinstance(shards, dict) or not set(map(str, shards.values())) <= {f.name for f in weights}:
            raise EncoderError(
                f"the weight_map of {index} must name safetensors files of that folder, got "
                f"{shards!r:.80}; download the model again"
            )
    # Built once without memory, to refuse a config of a model far larger than the weights.
    with limit_allocations(weights, folder / "config.json"), torch.device("meta"):
        AutoModel.from_config(deepcopy(config), trust_remote_code=False)
    module, info = AutoModel.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise EncoderError(
            f"{len(missing)} weights of '{name}' are missing from its files and would be random, first "
            f"{missing[0]}; load a complete model"
        )
    loaded: nn.Module = module
    return loaded


def _dimension(name: str, config: Any) -> int:
    if config.model_type == "clip":
        return int(config.projection_dim)
    text, image = config.text_config.projection_size, config.vision_config.hidden_size
    if text != image:
        raise EncoderError(
            f"'{name}' gives {text}-d text vectors but {image}-d image vectors; check its config"
        )
    return int(image)


def _lower_case(tokenizer: Any) -> None:
    """Make a tokenizer lower-case texts, as in SigLIP 2's training, unless it already does or must not.

    SigLIP's tokenizer normalises texts itself. SigLIP 2 has Gemma's tokenizer, which keeps capitals.
    transformers' Siglip2Tokenizer adds the same step, but is not used for ``model_type`` siglip.
    """
    declared = getattr(tokenizer, "init_kwargs", {}).get("do_lower_case")
    if declared is False or tokenizer(CAPITALS)["input_ids"] == tokenizer(CAPITALS.lower())["input_ids"]:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EncoderError(
            f"the tokenizer {type(tokenizer).__name__} keeps capitals, but SigLIP was trained on lower-case "
            "texts; save it as a fast tokenizer (tokenizer.json)"
        )
    steps = [normalizers.Lowercase(), *filter(None, [backend.normalizer])]
    backend.normalizer = normalizers.Sequence(steps)


def _check_tokenizer(name: str, config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with which the model would silently read texts wrongly."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not set(vocabulary) - set(tokenizer.all_special_tokens):
        raise EncoderError(
            f"the tokenizer of '{name}' has no words; its files (such as vocab.json) are missing"
        )
    if config.model_type != "clip":
        return
    # CLIP's text vector is read at the end token. Without one, every text is read at position 0, which only
    # sees the start token: all texts get the same vector.
    end_id, model_id = tokenizer.eos_token_id, config.text_config.eos_token_id
    if model_id == LEGACY_EOS:
        highest = max(vocabulary.values())
        if end_id != highest:
            raise EncoderError(
                f"the model of '{name}' reads a text at its highest token id, so the tokenizer's end token "
                f"must be its highest id {highest}, but is {end_id}; give it the tokenizer of its training"
            )
    elif end_id != model_id:
        raise EncoderError(
            f"the tokenizer of '{name}' ends texts with id {end_id}, but the model reads them at id "
            f"{model_id} (text_config.eos_token_id); give it the tokenizer it was trained with"
        )
