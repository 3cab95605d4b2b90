from __future__ import annotations

import logging

import pytest

from xbt.encoders.quiet import brief, quiet


def test_only_the_backends_are_silenced(caplog):
    with caplog.at_level("INFO"), quiet():
        logging.warning("open_clip speaks on the root logger")
        logging.getLogger("transformers.modeling_utils").warning("random init")
        logging.getLogger("somebody.else").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]


def test_everything_is_put_back_after_an_error():
    root, library = logging.getLogger(), logging.getLogger("transformers")
    before = (list(root.handlers), list(root.filters), library.level)
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert (list(root.handlers), list(root.filters), library.level) == before


def test_brief_is_one_line_that_keeps_its_end():
    assert brief(ValueError("first\n\n   second\nthird")) == "first second third"
    assert brief(KeyError()) == "KeyError"
    assert brief(ValueError("\x1b[1mbold\x1b[0m words")) == "bold words"
    long = brief(ValueError(f"begins {'x' * 2000} ends"))
    assert long.startswith("begins x")
    assert long.endswith("x ends")
    assert len(long) < 700
