"""encode_texts against open_clip's encode_text and transformers' get_text_features at the full context.

    python recipes/benchmarks/text_encoding.py --captions captions.json.gz --model ViT-L-14

Nothing is downloaded: towers have the architecture's size and random weights, which take exactly as long as
trained ones. transformers' tokenizer is made from open_clip's vocabulary, so that both read the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import open_clip
import torch
from bench import Timings, autocast, machine_rates, ratio, side_by_side, write_report
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from xbt.config import config_to_dict, run_recipe
from xbt.data import CaptionSource, read_captions
from xbt.encoders.hf_transformers import TransformersEncoder, pooled
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.encoders.quiet import quiet

Encode = Callable[[], Tensor]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass
class TextEncodingBenchmark:
    """Time text encoding side by side, tokenising included, and compare the vectors."""

    captions: str = "scenes"
    """A captions file (.txt, .jsonl, .json, each may end in .gz), hf:REPOSITORY, or scenes."""
    model: str = "ViT-B-32"
    """An architecture of open_clip with its plain text tower."""
    texts: int = 512
    """Captions to encode, chosen at random with the seed."""
    batch_size: int = 64
    """Captions per forward pass, for every contender."""
    rounds: int = 5
    """Rounds; everybody is timed once in each."""
    device: str = "cpu"
    """Device of the towers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of all contenders; bf16 is autocast."""
    threads: int = 2
    """Threads of torch on the CPU."""
    seed: int = 0
    """Seed of the captions and the weights."""
    results: str = "recipes/benchmarks/results/text_encoding"
    """Path of the results; the model's name, unless it is the CPU in fp32 device and precision, and a suffix
    are appended."""


class Library(NamedTuple):
    """Functions to time with one library: ``encode["xbt"]`` and the others."""

    name: str
    encode: dict[str, Encode]
    tokenize: Callable[[], object]


def main(config: TextEncodingBenchmark) -> None:
    """Measure and write the results."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    texts = read_captions(CaptionSource(config.captions, limit=config.texts, seed=config.seed))
    rows: list[dict[str, Any]] = []
    seconds: dict[str, Timings] = {}
    for library in (with_open_clip(config, texts), with_transformers(config, texts)):
        vectors = {name: run() for name, run in library.encode.items()}  # the first run also warms up
        timings = side_by_side({**library.encode, "tokenising": library.tokenize}, config.rounds, warmup=0)
        seconds[library.name] = timings
        for name in [name for name in library.encode if name != "xbt"]:
            difference = float((vectors[name] - vectors["xbt"]).abs().max())
            rows.append(compare(f"{library.name}, {name}", timings, name, difference))
    written = write_report(
        f"{config.results}_{slug(config)}",
        f"Text encoding, {config.model}",
        rows,
        describe(config, texts),
        config={**config_to_dict(config), "captions": Path(config.captions).name},
        seconds=seconds,
        machine=machine_rates(torch.device(config.device), config.precision),
    )
    print(written.with_suffix(".md").read_text(encoding="utf-8"), end="")


def slug(config: TextEncodingBenchmark) -> str:
    """What tells one result from another: of the CPU in fp32, the model alone."""
    where = (
        "" if (config.device, config.precision) == ("cpu", "fp32") else f"_{config.device}_{config.precision}"
    )
    return f"{config.model}{where}".lower().replace("-", "_").replace(":", "_")


def compare(title: str, timings: Timings, name: str, difference: float) -> dict[str, Any]:
    """One row of the table."""
    alone = {key: timings[key].minus(timings["tokenising"]) for key in (name, "xbt")}
    return {
        "compared with": title,
        "times as fast": ratio(timings, name, "xbt"),
        "without tokenising": ratio(alone, name, "xbt"),
        "seconds": timings[name],
        "xbt's seconds": timings["xbt"],
        "difference": difference,
    }


def describe(config: TextEncodingBenchmark, texts: list[str]) -> str:
    """Describe the table."""
    tokens = open_clip.get_tokenizer(config.model)(texts)
    used = float((tokens != 0).sum(dim=1).float().mean())
    return (
        f"The text tower of {config.model} with random weights in {config.precision} on {config.device}; "
        f"{len(texts)} captions with {used:.1f} tokens on average, {config.batch_size} per forward pass; "
        f"{config.rounds} rounds in turns, shown as median [least, greatest]. Times include tokenising; "
        "where they do not, what it took in the same round is taken off on both sides. Difference: the "
        "greatest between unit vectors."
    )


def with_open_clip(config: TextEncodingBenchmark, texts: list[str]) -> Library:
    """open_clip's own model, with and without xbt around it."""
    encoder = OpenClipEncoder.create(config.model).to(config.device)
    encoder.precision = config.precision
    encoder.module.eval().requires_grad_(False)
    clip: Any = encoder.module

    def full() -> Tensor:
        return batched(
            config, texts, lambda part: clip.encode_text(encoder.tokenizer(part).to(config.device))
        )

    return Library(
        "open_clip",
        {"full context": full, "xbt": lambda: encoder.encode_texts(texts, config.batch_size)},
        lambda: batched_tokens(config, texts, encoder.tokenizer),
    )


def with_transformers(config: TextEncodingBenchmark, texts: list[str]) -> Library:
    """A CLIPModel of the same size; also padded to the longest text of each batch, as some do."""
    encoder = transformers_encoder(config.model)
    encoder.precision = config.precision
    clip: Any = encoder.to(config.device).module.eval().requires_grad_(False)

    def tokens(part: list[str], padding: str) -> Any:
        options = {"max_length": encoder.context_length, "truncation": True, "return_tensors": "pt"}
        return encoder.tokenizer(part, padding=padding, **options)

    def encode(padding: str) -> Encode:
        def features(part: list[str]) -> Tensor:
            return pooled(clip.get_text_features(**tokens(part, padding).to(config.device)))

        return lambda: batched(config, texts, features)

    return Library(
        "transformers",
        {
            "full context": encode("max_length"),
            "longest of the batch": encode("longest"),
            "xbt": lambda: encoder.encode_texts(texts, config.batch_size),
        },
        lambda: batched_tokens(config, texts, lambda part: tokens(part, "max_length")),
    )


def batched(
    config: TextEncodingBenchmark, texts: list[str], features: Callable[[list[str]], Tensor]
) -> Tensor:
    """(n, dim) unit rows, the plain way."""
    with torch.no_grad(), autocast(config.device, config.precision):
        parts = [normalize(features(part).float(), dim=-1).cpu() for part in in_batches(config, texts)]
    return torch.cat(parts)


def batched_tokens(
    config: TextEncodingBenchmark, texts: list[str], tokenize: Callable[[list[str]], object]
) -> None:
    """Tokenise without encoding."""
    for part in in_batches(config, texts):
        tokenize(part)


def in_batches(config: TextEncodingBenchmark, texts: list[str]) -> list[list[str]]:
    """The texts, ``batch_size`` at a time."""
    return [texts[start : start + config.batch_size] for start in range(0, len(texts), config.batch_size)]


def transformers_encoder(model: str) -> TransformersEncoder:
    """A CLIPModel with the text tower of an open_clip architecture and hardly an image tower."""
    config = open_clip.get_model_config(model)
    text = config["text_cfg"]
    with TemporaryDirectory() as directory:
        vocabulary = write_tokenizer(Path(directory), open_clip.get_tokenizer(model))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    tower = {
        "hidden_size": text["width"],
        "intermediate_size": 4 * text["width"],
        "num_attention_heads": text["heads"],
        "num_hidden_layers": text["layers"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "vocab_size": len(vocabulary),
        "max_position_embeddings": text["context_length"],
        "bos_token_id": vocabulary[BOS],
        "eos_token_id": vocabulary[EOS],
        "pad_token_id": vocabulary[EOS],
    }
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    with quiet():
        module = CLIPModel(
            CLIPConfig(text_config=tower, vision_config=vision, projection_dim=config["embed_dim"])
        )
    return TransformersEncoder("transformers:untrained", module, tokenizer, CLIPImageProcessorPil())


def write_tokenizer(directory: Path, simple: open_clip.SimpleTokenizer) -> dict[str, int]:
    """Write open_clip's vocabulary as files of a CLIPTokenizer, and return it."""
    names = {simple.decoder[simple.sot_token_id]: BOS, simple.decoder[simple.eot_token_id]: EOS}
    vocabulary = {names.get(token, token): number for token, number in simple.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)]
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": simple.context_length, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return vocabulary


if __name__ == "__main__":
    run_recipe(main, TextEncodingBenchmark)
