"""Helpers for tests of sharing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from xbt.compatible import CompatibleEncoder
from xbt.encoders import LoraSettings, add_lora, load_encoder
from xbt.projections import fit_projection

TEXTS = [f"a {size} {colour} {shape}" for size in ("large", "small") for colour in ("red", "blue", "green")
         for shape in ("circle", "star", "square")]  # fmt: skip


def adapted(new_spec, old_spec, directory, ensemble=None):
    """A compatible encoder with a merged LoRA that changes vectors."""
    new, old = load_encoder(new_spec), load_encoder(old_spec)
    projection = fit_projection(
        new.encode_texts(TEXTS), old.encode_texts(TEXTS), new_space=new.space, old_space=old.space
    )
    add_lora(new, LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in new.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    CompatibleEncoder(new, projection, ensemble).save_pretrained(directory)
    return CompatibleEncoder.from_pretrained(directory, load_old=False)


def run_fresh(code, *arguments, **environment):
    """Run Python code in another process and return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
