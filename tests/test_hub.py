"""Fetching through huggingface_hub, offline: from a cache laid out as the library lays it out."""

from __future__ import annotations

import pytest
import torch

from xbt.hub import SavedPartError, fetch
from xbt.projections import LinearProjection, Projection

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached_repo(tmp_path):
    """A Hub cache that holds org/adapter at one commit, which main and v1 point to."""
    repo = tmp_path / "cache" / "models--org--adapter"
    projection = LinearProjection.from_weight(torch.randn(8, 12))
    projection.save_pretrained(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(COMMIT)
    return tmp_path / "cache", projection


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_loads_a_cached_repository(cached_repo, revision):
    cache, projection = cached_repo
    loaded = Projection.from_pretrained(
        "org/adapter", revision=revision, cache_dir=cache, local_files_only=True
    )
    assert torch.equal(loaded.weight, projection.weight)


def test_unknown_revision_or_repository(cached_repo):
    cache, _ = cached_repo
    for name, revision in (("org/adapter", "v2"), ("org/other", None)):
        with pytest.raises(SavedPartError, match=rf"{name}.*not in the cache"):
            fetch(name, revision=revision, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nothing", "nothing", "a/b/c"])
def test_paths_that_do_not_exist(name):
    with pytest.raises(SavedPartError, match="does not exist, and it is not a Hub repository"):
        fetch(name)


def test_a_directory_is_itself(tmp_path):
    assert fetch(tmp_path) == tmp_path
