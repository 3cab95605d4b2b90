"""A compatible encoder with its projection folded into the new towers."""

from __future__ import annotations

import pytest
import torch
from upgrades import IMAGES, TEXTS, parts

from xbt.compatible import CompatibleEncoder
from xbt.encoders import LoraSettings, add_lora, load_encoder, load_lora, save_lora
from xbt.errors import EncoderError
from xbt.projections import LinearProjection, ResidualProjection
from xbt.projections.ensemble import Nlerp, QueryEnsemble, Slerp


@pytest.mark.parametrize("lora", [False, True])
def test_folding_changes_nothing_but_the_cost(specs, backend, lora, tmp_path):
    new, projection, old = parts(specs, backend)
    if lora:
        adapted = load_encoder(specs[backend])
        add_lora(adapted, LoraSettings(rank=3))
        with torch.no_grad():
            for name, parameter in adapted.module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
        save_lora(adapted, tmp_path / "lora")
        load_lora(new, tmp_path / "lora", merge=True)
    for ensemble, tower in ((None, None), (QueryEnsemble(12, {"T2I": Nlerp(0.3), "I2T": Nlerp(0.8)}), old)):
        compatible = CompatibleEncoder(new, projection, ensemble, tower)
        before = compatible.encode_texts(TEXTS), compatible.encode_images(IMAGES)
        of_new = new.encode_texts(TEXTS)
        compatible.save_pretrained(tmp_path / "unfolded")
        assert compatible.fold() is compatible
        after = compatible.encode_texts(TEXTS), compatible.encode_images(IMAGES)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
        torch.testing.assert_close(compatible.to("cpu").encode_texts(TEXTS), before[0], atol=1e-5, rtol=0)
        assert torch.equal(new.encode_texts(TEXTS), of_new)
        compatible.save_pretrained(tmp_path / "folded")
        for file in (tmp_path / "unfolded").rglob("*.*"):
            assert (
                tmp_path / "folded" / file.relative_to(tmp_path / "unfolded")
            ).read_bytes() == file.read_bytes()
    tokens = new.tokenize(TEXTS)
    plain = CompatibleEncoder(new, projection)
    expected = plain.embed_tokens(tokens)
    torch.testing.assert_close(plain.fold().embed_tokens(tokens), expected, atol=1e-5, rtol=0)


def test_a_folded_encoder_does_not_run_its_projection(specs, backend, monkeypatch):
    new, projection, _ = parts(specs, backend)
    folded = CompatibleEncoder(new, projection).fold()
    monkeypatch.setattr(projection, "project", None)
    assert folded.encode_texts(TEXTS).shape == (len(TEXTS), 12)
    assert folded.encode_images(IMAGES).shape == (len(IMAGES), 12)


def test_models_that_cannot_be_folded(specs):
    new, projection, old = parts(specs, "open_clip")
    residual = ResidualProjection(16, 12)
    offset = LinearProjection(16, 12, bias=True)
    for other in (residual, offset):
        other.set_spaces(projection.new_space, projection.old_space)
        with pytest.raises(EncoderError, match="is more than a matrix and cannot be folded"):
            CompatibleEncoder(new, other).fold()
    with pytest.raises(EncoderError, match="needs the length of projected vectors"):
        CompatibleEncoder(new, projection, QueryEnsemble(12, {"T2I": Slerp(0.6, padded=True)}), old).fold()
    with pytest.raises(EncoderError, match=r"image tower of .* not in a matrix"):
        CompatibleEncoder(*parts(specs, "siglip")[:2]).fold()
