"""Tiny models for tests: built from code, saved to a directory, loaded like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from xbt.encoders.quiet import quiet

WORDS = (
    "a the of and to on in with left right above below large small red green blue yellow black white "
    "circle square triangle star photo dog cat man two three"
)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def open_clip_config(
    dim: int = 16,
    width: int = 32,
    layers: int = 2,
    image_size: int = 32,
    quick_gelu: bool = False,
    context_length: int = 32,
    custom_text: bool = False,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "embed_dim": dim,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": 8,
            "width": width,
            "layers": layers,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": 49408,
            "width": width,
            "heads": 2,
            "layers": layers,
        },
    }
    if quick_gelu:
        config["quick_gelu"] = True
    if custom_text:
        config["custom_text"] = True
    return config


def tiny_open_clip(
    directory: str | Path, seed: int = 0, preprocess: dict[str, Any] | None = None, **config: Any
) -> str:
    """Saves a random open_clip model; `config` as in `open_clip_config`. Returns its specification."""
    from xbt.encoders.open_clip import OpenClipEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = OpenClipEncoder.create(open_clip_config(**config), preprocess=preprocess)
    encoder.save_pretrained(directory)
    return f"open_clip:local-dir:{directory}"


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """A byte-level BPE vocabulary that knows WORDS whole and spells everything else."""
    alphabet = byte_alphabet()
    tokens, merges = alphabet + [each + "</w>" for each in alphabet], []
    for word in WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append(f"{left} {right}")
            left += right
    tokens += [BOS, EOS]
    return {token: number for number, token in enumerate(tokens)}, merges


def write_clip_tokenizer(directory: str | Path, context_length: int = 77) -> dict[str, int]:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return vocabulary


def tiny_transformers_clip(
    directory: str | Path,
    seed: int = 0,
    dim: int = 24,
    width: int = 32,
    layers: int = 2,
    image_size: int = 32,
    context_length: int = 77,
    eos_token_id: int | None = None,
) -> str:
    """Saves a random CLIPModel with tokenizer and image processor. Returns its specification."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    vocabulary = write_clip_tokenizer(directory, context_length)
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    text = {
        **tower,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": context_length,
        "bos_token_id": vocabulary[BOS],
        "eos_token_id": vocabulary[EOS] if eos_token_id is None else eos_token_id,
        "pad_token_id": vocabulary[EOS],
    }
    vision = {**tower, "image_size": image_size, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))
    _save(model, directory)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(directory)
    return f"transformers:{directory}"


def _save(model, directory) -> None:
    with quiet():  # without transformers' progress bar
        model.save_pretrained(directory)


def tiny_siglip(
    directory: str | Path,
    seed: int = 0,
    dim: int = 32,
    layers: int = 2,
    image_size: int = 32,
    context_length: int = 64,
) -> str:
    """Saves a random SiglipModel with a byte-level tokenizer made here. Returns its specification."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil, SiglipModel

    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *byte_alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    tower = {
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    text = {
        **tower,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": context_length,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    vision = {**tower, "image_size": image_size, "patch_size": 8}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    _save(model, directory)
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(directory)
    return f"transformers:{directory}"
