"""Revisions of a Hub repository, from a cache in the layout of huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_open_clip, tiny_transformers_clip

from xbt.hub import cached_commit, split_revision

FIRST, SECOND = "1" * 40, "2" * 40
CODE = """
import json, sys
import xbt
from xbt.errors import SpaceMismatchError

found = {}
for spec in sys.argv[1:]:
    first, second = xbt.load_encoder(f"{spec}@v1"), xbt.load_encoder(f"{spec}@main")
    try:
        first.space.require(second.space, "the query vectors")
        refusal = None
    except SpaceMismatchError as error:
        refusal = str(error)
    again = xbt.load_encoder(f"{spec}@{first.revision}")
    found[spec] = {
        "revisions": [first.space.revision, second.space.revision, xbt.load_encoder(spec).revision],
        "refusal": refusal,
        "same": first.space.same_as(again.space),
    }
print(json.dumps(found))
"""


def publish(cache: Path, repo: str, commits: tuple[str, ...], refs: dict[str, str], make) -> None:
    """Fills a Hub cache with several commits of one repository."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for seed, commit in enumerate(commits):
        make(folder / "snapshots" / commit, seed)
    for name, commit in refs.items():
        (folder / "refs" / name).write_text(commit)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    commits, refs = (FIRST, SECOND), {"v1": FIRST, "main": SECOND}
    publish(root / "hub", "org/oc", commits, refs, lambda path, seed: tiny_open_clip(path, seed))
    publish(root / "hub", "org/tf", commits, refs, lambda path, seed: tiny_transformers_clip(path, seed))
    environment = {**os.environ, "HF_HOME": str(root), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    specs = ["open_clip:hf-hub:org/oc", "transformers:org/tf"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *specs], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root / "hub", json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("spec", ["open_clip:hf-hub:org/oc", "transformers:org/tf"])
def test_a_revision_is_loaded_recorded_and_distinguished(found, spec):
    _, by_spec = found
    result = by_spec[spec]
    assert result["revisions"] == [FIRST, SECOND, SECOND]
    assert f"'{spec}@v1' at {FIRST[:12]}" in result["refusal"]
    assert f"'{spec}@main' at {SECOND[:12]}" in result["refusal"]
    assert result["same"]


def test_the_commit_of_a_cached_file(found, monkeypatch):
    cache, _ = found
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    assert cached_commit("org/tf", "config.json") == SECOND
    assert cached_commit("org/tf", "config.json", "v1") == FIRST
    assert cached_commit("org/tf", "nothing.json") is None
    assert cached_commit("no repository", "config.json") is None


def test_only_repositories_have_revisions(tmp_path, monkeypatch):
    assert split_revision("org/name@v1.0") == ("org/name", "v1.0")
    assert split_revision("org/name") == ("org/name", None)
    assert split_revision("org/name@") == ("org/name@", None)
    assert split_revision("/a/b/c@d") == ("/a/b/c@d", None)
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_revision("org/name@v1") == ("org/name@v1", None)
