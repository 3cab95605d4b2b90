"""Two new models (open_clip, transformers), one whose last layer cannot be folded, and an old one."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="package")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("compatible")
    return {
        "open_clip": tiny.tiny_open_clip(root / "a", seed=1),
        "transformers": tiny.tiny_transformers_clip(root / "b", seed=2),
        "siglip": tiny.tiny_siglip(root / "c", seed=3),
        "old": tiny.tiny_open_clip(root / "old", seed=0, dim=12),
    }


@pytest.fixture(params=["open_clip", "transformers"])
def backend(request):
    return request.param
