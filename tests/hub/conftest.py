"""A local Hub server, and artifacts to share."""

from __future__ import annotations

import huggingface_hub
import pytest
import tiny
import torch
from hub.server import WRITER, HubServer

from xbt.projections import LinearProjection
from xbt.space import EmbeddingSpace


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running server that huggingface_hub, here and in child processes, takes for the Hub."""
    with HubServer() as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": WRITER,
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def projection():
    """A projection between two spaces that know their models."""
    made = LinearProjection.from_weight(torch.randn(8, 12), torch.randn(8))
    made.set_spaces(
        EmbeddingSpace("transformers:org/new-clip", 12, probe=torch.randn(20, 12)),
        EmbeddingSpace("transformers:org/old-clip", 8, probe=torch.randn(20, 8)),
    )
    return made


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """Directories of a new and an old CLIP, of 16 and 12 dimensions."""
    root = tmp_path_factory.mktemp("models")
    tiny.tiny_open_clip(root / "new-clip", seed=1)
    tiny.tiny_open_clip(root / "old-clip", seed=2, dim=12)
    return root


@pytest.fixture
def hosted(hub, models):
    """Specifications of both CLIPs, which the server has as repositories."""
    for name in ("new-clip", "old-clip"):
        files = {each.name: each.read_bytes() for each in (models / name).iterdir()}
        hub.put(f"org/{name}", files)
        hub.repos[f"org/{name}"].lfs.update(each for each in files if each.endswith(".safetensors"))
    return "open_clip:hf-hub:org/new-clip", "open_clip:hf-hub:org/old-clip"
