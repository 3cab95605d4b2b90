"""``xbt push`` to a Hub on this machine, and ``xbt search`` with what was pushed."""

from __future__ import annotations

import pytest
from hub.conftest import hub  # noqa: F401


@pytest.fixture
def pushed(run, hub, projection):  # noqa: F811
    return run("push", projection, "--repo", "org/p", "--license", "mit", "--json")


def test_a_projection_is_pushed_and_found_again(run, hub, pushed, projection, gallery, specs):  # noqa: F811
    assert pushed.status == 0, pushed.err
    commit = hub.repos["org/p"].refs["main"]
    assert pushed.document == {
        "url": f"{hub.url}/org/p/commit/{commit}", "commit": commit, "kind": "LinearProjection",
        "path": str(projection),
    }  # fmt: skip
    words = ["search", "a red circle", "--gallery", gallery, "--new", specs[1], "--json", "--encoder"]
    local = run(*words, projection)
    assert local.status == 0
    for source in ("org/p", f"org/p@{commit}"):
        assert run(*words, source).document == local.document
    missing = run(*words, "org/p@nowhere")
    assert missing.status == 2
    assert "nowhere" in missing.err


def test_what_people_read(run, hub, projection):  # noqa: F811
    result = run("push", "--directory", projection, "--repo", "org/p")
    assert result.status == 0, result.err
    commit = hub.repos["org/p"].refs["main"]
    assert result.out == f"pushed the LinearProjection in {projection}\n{hub.url}/org/p/commit/{commit}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--repo", "org/p"], "nowhere does not exist"),
        (["--repo", "org/p"], "directory"),
        (["nowhere", "--repo", "org/p", "--tokn", "x"], "tokn"),
    ],
)
def test_wrong_input_is_one_sentence(run, words, message):
    result = run("push", *words, "--json")
    assert result.status == 2
    assert message in result.document["error"]["message"]
