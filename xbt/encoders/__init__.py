"""Encoders: CLIPs of open_clip and transformers behind one interface, and LoRA on top of them."""

from xbt.encoders.base import DualEncoder
from xbt.encoders.clip_benchmark import ClipBenchmarkModel, as_clip_benchmark, register_clip_benchmark
from xbt.encoders.image_batching import EncodedImages
from xbt.encoders.loading import load_encoder, wrap_encoder
from xbt.encoders.lora import (
    LoraSettings,
    add_lora,
    check_lora,
    has_lora,
    load_lora,
    save_lora,
    set_lora_mode,
)

__all__ = [
    "ClipBenchmarkModel",
    "DualEncoder",
    "EncodedImages",
    "LoraSettings",
    "add_lora",
    "as_clip_benchmark",
    "check_lora",
    "has_lora",
    "load_encoder",
    "load_lora",
    "register_clip_benchmark",
    "save_lora",
    "set_lora_mode",
    "wrap_encoder",
]
