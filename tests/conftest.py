"""Fixtures every test shares."""

from __future__ import annotations

import os
import random

# Before any import of a Hugging Face library: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """One thread, no network, the same seeds for every test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def open_clip_spec(tmp_path_factory):
    """Specification of a tiny open_clip model: dim 16, 32 tokens, 32 x 32 images."""
    return tiny.tiny_open_clip(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="session")
def transformers_spec(tmp_path_factory):
    """Specification of a tiny CLIPModel: dim 24, 77 tokens, 32 x 32 images."""
    return tiny.tiny_transformers_clip(tmp_path_factory.mktemp("transformers"))
