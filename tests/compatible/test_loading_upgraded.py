"""One function loads compatible encoders and projections alone."""

from __future__ import annotations

import pytest
import tiny
import torch

from xbt.compatible import CompatibleEncoder, load_upgraded
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, EncoderError
from xbt.hub import SavedPartError
from xbt.projections import fit_projection

TEXTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "star")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    old = load_encoder(tiny.tiny_open_clip(root / "old", seed=0))
    new = load_encoder(tiny.tiny_open_clip(root / "new", seed=1, dim=24))
    projection = fit_projection(
        new.encode_texts(TEXTS), old.encode_texts(TEXTS), new_space=new.space, old_space=old.space
    )
    return old, new, projection


def test_a_projection_and_a_compatible_encoder_give_the_same_queries(parts, tmp_path):
    _, new, projection = parts
    projection.save_pretrained(tmp_path / "projection")
    CompatibleEncoder(new, projection).save_pretrained(tmp_path / "compatible")
    expected = projection(new.encode_texts(TEXTS)).detach()
    for name in ("projection", "compatible"):
        for spec in (None, new.name):
            # An old encoder that no ensemble needs is not loaded.
            loaded = load_upgraded(tmp_path / name, spec, "open_clip:local-dir:/no/model")
            torch.testing.assert_close(loaded.encode_texts(TEXTS), expected, rtol=0, atol=1e-5)


def test_a_projection_that_does_not_know_its_encoder(parts, tmp_path):
    old, new, _ = parts
    vectors = new.encode_texts(TEXTS), old.encode_texts(TEXTS)
    fit_projection(*vectors, old_space=old.space).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not say which encoder it was fitted for; give new="):
        load_upgraded(tmp_path)
    assert load_upgraded(tmp_path, new.name).space.same_as(old.space)


def test_models_that_cannot_be_loaded(parts, tmp_path):
    _, new, projection = parts
    with pytest.raises(SavedPartError, match="nowhere"):
        load_upgraded(tmp_path / "nowhere")
    projection.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace(new.name, "open_clip:local-dir:/no/model"))
    with pytest.raises(EncoderError, match=r"the new model recorded in .*/no/model.*new= to name another"):
        load_upgraded(tmp_path)
