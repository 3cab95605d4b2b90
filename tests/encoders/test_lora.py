from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel

from xbt.encoders import LoraSettings, add_lora, load_encoder, load_lora, save_lora
from xbt.encoders.lora import has_lora
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import ConfigError, EncoderError
from xbt.space import draw_probe_images

TEXTS = ["a red circle", "two dogs", "a cat", "a blue star"]


@pytest.fixture(params=["open_clip_spec", "transformers_spec"])
def spec(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def encoder(spec):
    return load_encoder(spec)


def vectors(encoder):
    return torch.cat([encoder.encode_texts(TEXTS), encoder.encode_images(draw_probe_images())])


def loss(encoder):
    """A contrastive loss of four pairs."""
    pixels = torch.stack([encoder.preprocess(image) for image in draw_probe_images()])
    logits = 10 * encoder.embed_tokens(encoder.tokenize(TEXTS)) @ encoder.embed_pixels(pixels).T
    return nn.functional.cross_entropy(logits, torch.arange(4))


def train(encoder, steps=3, lr=0.01):
    parameters = [p for p in encoder.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    encoder.module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(encoder).backward()
        optimizer.step()
    encoder.module.eval()
    encoder.invalidate_space()


def trained(spec, **settings):
    encoder = load_encoder(spec)
    add_lora(encoder, LoraSettings(**{"rank": 2, "alpha": 8, **settings}))
    train(encoder)
    return encoder


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0"),
        ({"alpha": float("nan")}, "lora.alpha is nan"),
        ({"dropout": 1.0}, "lora.dropout is 1"),
        ({"dropout": -0.1}, "lora.dropout is -0.1"),
        ({"target_modules": "("}, "lora.target_modules"),
    ],
)
def test_settings_are_checked(settings, key):
    with pytest.raises(ConfigError, match=key):
        LoraSettings(**settings)


def test_a_fresh_lora_changes_nothing_and_trains_alone(encoder):
    before = vectors(encoder)
    add_lora(encoder, LoraSettings(rank=2))
    assert has_lora(encoder)
    torch.testing.assert_close(vectors(encoder), before, rtol=0, atol=1e-6)
    trainable = {name for name, p in encoder.module.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)


def test_gradients_reach_both_towers_and_only_the_lora(encoder):
    add_lora(encoder, LoraSettings(rank=2))
    loss(encoder).backward()
    reached = {"text": 0, "image": 0}
    for name, parameter in encoder.module.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().sum() > 0, name
            reached["image" if "vis" in name else "text"] += 1
        elif "lora_A" not in name:
            assert parameter.grad is None, name
    # Two layers per tower; open_clip's attention has two weights, that of transformers four.
    expected = 4 if isinstance(encoder, OpenClipEncoder) else 8
    assert reached == {"text": expected, "image": expected}


def test_the_base_is_untouched_by_training(spec):
    encoder = load_encoder(spec)
    before = {name: p.clone() for name, p in encoder.module.named_parameters()}
    add_lora(encoder, LoraSettings(rank=2))
    train(encoder, steps=50)
    vectors(encoder)
    after = encoder.module.unload()
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, before.pop(name)), name
    assert not before


@pytest.mark.parametrize("merge", [True, False])
def test_a_saved_lora_on_a_new_model_gives_the_trained_vectors(spec, tmp_path, merge):
    encoder = trained(spec)
    expected = vectors(encoder)
    assert not torch.allclose(expected, vectors(load_encoder(spec)), atol=1e-3)
    save_lora(encoder, tmp_path)
    served = load_encoder(spec)
    load_lora(served, tmp_path, merge=merge)
    torch.testing.assert_close(vectors(served), expected, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in served.module.parameters())
    assert served.space.same_as(encoder.space)
    assert served.logit_scale.shape == ()


def test_a_loaded_lora_can_be_trained_on(spec, tmp_path):
    save_lora(trained(spec), tmp_path)
    encoder = load_encoder(spec)
    load_lora(encoder, tmp_path, merge=False, trainable=True)
    before = loss(encoder).item()
    train(encoder)
    assert loss(encoder).item() < before
    with pytest.raises(ConfigError, match="merge=False"):
        load_lora(load_encoder(spec), tmp_path, trainable=True)


def test_saving_a_merged_lora_gives_the_same_bytes(spec, tmp_path):
    encoder = trained(spec)
    save_lora(encoder, tmp_path / "first")
    served = load_encoder(spec)
    load_lora(served, tmp_path / "first")
    vectors(served)
    save_lora(served, tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_only_the_lora_is_saved_and_no_path_of_this_machine(spec, tmp_path):
    save_lora(trained(spec), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    config = (tmp_path / "adapter_config.json").read_text()
    assert spec.split(":")[-1] not in config
    assert json.loads(config)["peft_type"] == "LORA"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_alone_reads_a_saved_lora(transformers_spec, tmp_path):
    encoder = trained(transformers_spec)
    save_lora(encoder, tmp_path)
    clip = CLIPModel.from_pretrained(transformers_spec.removeprefix("transformers:"))
    model = PeftModel.from_pretrained(clip, str(tmp_path)).eval()
    with torch.no_grad():
        features = model.get_text_features(input_ids=encoder.tokenize(TEXTS)).pooler_output
    expected = nn.functional.normalize(features)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, rtol=0, atol=1e-6)


def test_a_merged_encoder_can_be_moved(spec, tmp_path):
    save_lora(trained(spec), tmp_path)
    encoder = load_encoder(spec)
    load_lora(encoder, tmp_path)
    expected = vectors(encoder)
    assert encoder.to("cpu") is encoder
    torch.testing.assert_close(vectors(encoder), expected, rtol=0, atol=1e-6)
    encoder.to("meta")
    for module in encoder.module.modules():
        for value in vars(module).values():
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta"
        for value in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            assert value.device.type == "meta"


def test_targets_as_a_list_of_endings(transformers_spec, tmp_path):
    encoder = trained(transformers_spec, target_modules=["v_proj", "fc1"])
    names = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in encoder.module.named_parameters()
    }
    assert names - {""} == {"v_proj", "fc1"}
    save_lora(encoder, tmp_path)
    served = load_encoder(transformers_spec)
    load_lora(served, tmp_path)
    torch.testing.assert_close(vectors(served), vectors(encoder), rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [r"nothing\..*", ["nothing"]])
def test_targets_that_match_nothing_suggest_modules(encoder, target):
    with pytest.raises(EncoderError, match=r"nothing.* matches no module of .*, for example, .*attn"):
        add_lora(encoder, LoraSettings(target_modules=target))
    assert not has_lora(encoder)


def test_targets_lora_cannot_be_put_on(open_clip_spec):
    encoder = load_encoder(open_clip_spec)
    with pytest.raises(
        EncoderError, match=r"matches transformer, of|matches visual of|matches transformer of"
    ):
        add_lora(encoder, LoraSettings(target_modules=r"visual|transformer"))
    with pytest.raises(EncoderError, match="whose parent must be named instead"):
        add_lora(encoder, LoraSettings(target_modules=["out_proj"]))
    assert not has_lora(encoder)


def test_by_default_both_towers_must_be_matched():
    config = tiny.open_clip_config()
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}  # a ResNet
    encoder = OpenClipEncoder.create(config)
    with pytest.raises(EncoderError, match=r"the image tower of .* has no attention"):
        add_lora(encoder, LoraSettings())


def test_timm_towers_are_matched():
    config = tiny.open_clip_config(custom_text=True)
    config["vision_cfg"] = {"timm_model_name": "test_vit", "image_size": 160, "timm_proj": "linear"}
    encoder = OpenClipEncoder.create(config)
    add_lora(encoder, LoraSettings(rank=2))
    loss(encoder).backward()
    grads = [p.grad for n, p in encoder.module.named_parameters() if "trunk" in n and "lora_B" in n]
    assert grads
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_dropout_is_refused_where_it_would_be_ignored(open_clip_spec, transformers_spec):
    with pytest.raises(ConfigError, match=r"lora\.dropout is 0\.1"):
        add_lora(load_encoder(open_clip_spec), LoraSettings(dropout=0.1))
    encoder = load_encoder(transformers_spec)
    add_lora(encoder, LoraSettings(dropout=0.5))
    nn.init.normal_(next(p for n, p in encoder.module.named_parameters() if "lora_B" in n))
    encoder.module.train()
    assert loss(encoder).item() != loss(encoder).item()


def test_a_second_lora_is_refused(encoder, tmp_path):
    with pytest.raises(EncoderError, match="has no LoRA to save"):
        save_lora(encoder, tmp_path)
    add_lora(encoder, LoraSettings(rank=2))
    with pytest.raises(EncoderError, match="has LoRA already"):
        add_lora(encoder, LoraSettings(rank=2))


class TestUnfit:
    """Adapters of another model, and damaged ones; the encoder must stay as it was."""

    @pytest.fixture
    def adapter(self, spec, tmp_path):
        save_lora(trained(spec), tmp_path / "adapter")
        return tmp_path / "adapter"

    def refused(self, encoder, adapter, pattern):
        before = vectors(encoder)
        with pytest.raises(EncoderError, match=pattern) as caught:
            load_lora(encoder, adapter)
        assert str(adapter) in str(caught.value)
        assert not has_lora(encoder)
        assert torch.equal(vectors(encoder), before)
        return str(caught.value)

    def test_another_backend(self, adapter, spec, open_clip_spec, transformers_spec):
        other = load_encoder(open_clip_spec if spec == transformers_spec else transformers_spec)
        assert other.name in self.refused(other, adapter, "does not fit")

    def test_another_width(self, adapter, spec, tmp_path):
        make = tiny.tiny_open_clip if spec.startswith("open_clip") else tiny.tiny_transformers_clip
        other = load_encoder(make(tmp_path / "wide", width=64))
        assert other.name in self.refused(other, adapter, r"have another shape, first .* instead of")

    def test_another_depth(self, adapter, spec, tmp_path):
        make = tiny.tiny_open_clip if spec.startswith("open_clip") else tiny.tiny_transformers_clip
        deeper = load_encoder(make(tmp_path / "deep", layers=3))
        self.refused(deeper, adapter, "weights are missing, first")
        shallow = load_encoder(make(tmp_path / "shallow", layers=1))
        self.refused(shallow, adapter, "are unknown to it, first")

    def test_missing_weight(self, adapter, encoder):
        file = adapter / "adapter_model.safetensors"
        state = load_file(file)
        state.pop(sorted(state)[0])
        save_file(state, file)
        assert encoder.name in self.refused(encoder, adapter, "1 weights are missing")

    def test_damaged_files(self, adapter, encoder):
        weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        self.refused(encoder, adapter, "cannot be read")
        weights.unlink()
        self.refused(encoder, adapter, r"has no adapter_model\.safetensors")
        weights.write_bytes(whole)
        config.write_text("{")
        self.refused(encoder, adapter, "cannot be read")
        config.unlink()
        self.refused(encoder, adapter, r"has no adapter_config\.json")

    def test_other_kinds_of_adapters(self, adapter, encoder):
        config = adapter / "adapter_config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps({**content, "init_lora_weights": "pissa"}))
        self.refused(encoder, adapter, "init_lora_weights='pissa', which changes the base")
        config.write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
        self.refused(encoder, adapter, "not a LoRA")
