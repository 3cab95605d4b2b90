"""Adapters that peft writes, against peft itself, and untrusted adapters."""

from __future__ import annotations

import copy
import json
import resource
import struct
import time

import pytest
import tiny
import torch
from fuzzing import damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from xbt.encoders import LoraSettings, add_lora, load_encoder, load_lora, save_lora
from xbt.encoders.lora_loading import _globs, _resolve
from xbt.errors import EncoderError
from xbt.space import draw_probe_images

TEXTS = ["a red circle", "two dogs"]
IMAGES = draw_probe_images()[:2]
ATTENTION = ["q_proj", "v_proj"]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return load_encoder(tiny.tiny_transformers_clip(tmp_path_factory.mktemp("base"), layers=2))


@pytest.fixture
def encoder(pristine):
    return copy.deepcopy(pristine)


def disturb(model):
    """Imitate training: add noise to every adapter weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05


def by_peft(pristine, folder, **settings):
    """Saves an adapter that peft made on a tiny CLIP."""
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, **settings})
    model = get_peft_model(copy.deepcopy(pristine.module), config)
    disturb(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@torch.no_grad()
def peft_vectors(pristine, folder):
    model = PeftModel.from_pretrained(copy.deepcopy(pristine.module), str(folder)).eval()
    pixels = torch.stack([pristine.preprocess(image) for image in IMAGES])
    texts = model.get_text_features(input_ids=pristine.tokenize(TEXTS)).pooler_output
    images = model.get_image_features(pixel_values=pixels).pooler_output
    return nn.functional.normalize(torch.cat([texts, images]), dim=1)


def vectors(encoder):
    return torch.cat([encoder.encode_texts(TEXTS), encoder.encode_images(IMAGES)])


SETTINGS = {
    "list": {},
    "regex": {"target_modules": r".*(text|vision)_model.*\.self_attn\.(q|k|out)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "lora_alpha": 6},
    "ranks": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*v_proj": 7}, "lora_alpha": 3},
    "ranks_regex": {"rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2}},
    "alphas": {
        "alpha_pattern": {"^text_model.encoder.layers.0.self_attn.q_proj": 30, r"v_proj|layers\.1\..*": 2}
    },
    "conv_and_embedding": {"target_modules": ["patch_embedding", "token_embedding", "fc1"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layer": {"layers_to_transform": 0},
    "excluded": {"exclude_modules": r".*vision_model.*"},
    "excluded_list": {"exclude_modules": ["0.self_attn.q_proj"]},
    "text_alone": {"target_modules": r"text_model\..*\.fc2"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_vectors_are_those_of_peft(name, pristine, encoder, tmp_path):
    folder = by_peft(pristine, tmp_path / "peft", **SETTINGS[name])
    expected = peft_vectors(pristine, folder)
    assert not torch.allclose(expected, vectors(encoder), atol=1e-4)
    load_lora(encoder, folder)
    torch.testing.assert_close(vectors(encoder), expected, rtol=0, atol=1e-6)
    save_lora(encoder, tmp_path / "again")
    again = copy.deepcopy(pristine)
    load_lora(again, tmp_path / "again")
    torch.testing.assert_close(vectors(again), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(peft_vectors(pristine, tmp_path / "again"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("started", ["eva", "mica", None])
def test_settings_that_say_how_training_began_are_no_hindrance(started, pristine, encoder, tmp_path):
    folder = by_peft(pristine, tmp_path)
    expected = copy.deepcopy(pristine)
    load_lora(expected, folder)
    edit(folder, init_lora_weights=started)
    load_lora(encoder, folder)
    assert torch.equal(vectors(encoder), vectors(expected))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_adapter_is_a_plain_one(pristine, encoder, tmp_path):
    config = LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa")
    model = get_peft_model(copy.deepcopy(pristine.module), config)
    model.save_pretrained(tmp_path / "start")
    disturb(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(EncoderError, match="init_lora_weights='pissa', which changes the base"):
        load_lora(encoder, tmp_path / "raw")
    start = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start)
    load_lora(encoder, tmp_path / "plain")
    expected = peft_vectors(pristine, tmp_path / "plain")
    torch.testing.assert_close(vectors(encoder), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a small adapter, its config and weights, and the encoder it is for."""
    folder = tmp_path_factory.mktemp("adapter")
    spec = tiny.tiny_open_clip(folder / "base", layers=1)
    encoder = load_encoder(spec)
    add_lora(encoder, LoraSettings(rank=2))
    save_lora(encoder, folder)
    encoder.module = encoder.module.unload()
    config = json.loads((folder / "adapter_config.json").read_text())
    return folder, config, (folder / "adapter_model.safetensors").read_bytes(), encoder


def load_and_take_off(encoder, folder):
    load_lora(encoder, folder, merge=False)
    encoder.module = encoder.module.unload()


class TestForeign:
    """Adapters of which something is wrong: one sentence, soon, and the encoder stays as it was."""

    @pytest.fixture
    def encoder(self, adapter):
        return adapter[3]

    @pytest.fixture
    def folder(self, adapter, tmp_path):
        _, config, weights, _ = adapter
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        return tmp_path

    @pytest.mark.parametrize(
        "setting",
        [
            {"use_dora": True},
            {"bias": "all"},
            {"lora_bias": True},
            {"modules_to_save": ["ln_final"]},
            {"trainable_token_indices": [3, 4]},
            {"target_parameters": ["positional_embedding"]},
            {"megatron_config": {"tensor_model_parallel_size": 2}},
            {"alora_invocation_tokens": [1]},
            {"use_qalora": True},
            {"layer_replication": [[0, 1], [0, 2]]},
            {"velora_config": {"num_groups": 2}},
            {"use_bdlora": {"nblocks": 2}},
            {"kasa_config": {"beta": 1e-4}},
            {"arrow_config": {"top_k": 2}},
            {"monteclora_config": {"num_samples": 2}},
            {"a_setting_of_a_later_peft": 1},
            {"init_lora_weights": "corda"},
            {"init_lora_weights": "pissa_niter_4"},
            {"init_lora_weights": "loftq"},
            {"init_lora_weights": "olora"},
            {"init_lora_weights": "lora_ga"},
            {"init_lora_weights": ["eva"]},
        ],
    )
    def test_more_than_a_plain_lora(self, setting, encoder, folder):
        ((name, value),) = setting.items()
        edit(folder, **setting)
        with pytest.raises(EncoderError) as caught:
            load_lora(encoder, folder)
        assert f"has {name}={value!r}" in str(caught.value)
        assert "peft" in str(caught.value)
        assert not hasattr(encoder.module, "peft_config")

    @pytest.mark.parametrize("pattern", [r"(.+)+\d!", r"([^.]|.)*\Z#", r"(a?){40}a{40}", "x" * 300_000])
    @pytest.mark.parametrize(
        "setting", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
    )
    def test_no_foreign_expression_runs(self, setting, pattern, encoder, folder):
        edit(
            folder,
            **{setting: {pattern: 2} if setting.endswith("k_pattern") or "alpha" in setting else pattern},
        )
        start = time.process_time()
        if setting == "alpha_pattern" or (setting == "rank_pattern" and len(pattern) > 1_000):
            with pytest.raises(EncoderError, match=setting):
                load_lora(encoder, folder)
        else:
            load_and_take_off(encoder, folder)
        assert time.process_time() - start < 5

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            ({"rank_pattern": {"[": 2}}, "rank_pattern '\\['"),
            ({"rank_pattern": {"attn": 2**31}}, "config says rank 2147483648 for .*, but its weights"),
            ({"rank_pattern": ["attn"]}, "has rank_pattern"),
            ({"r": 10**30}, "config says rank 1000000000000000000000000000000 for"),
            ({"r": 2.0}, "has r 2.0"),
            ({"alpha_pattern": {"attn": True}}, "has alpha_pattern"),
            ({"alpha_pattern": {"attn": 10**400}}, "has alpha_pattern"),
            ({"lora_alpha": "16"}, "has lora_alpha '16'"),
            ({"lora_alpha": -1e300}, "has lora_alpha"),
            ({"lora_dropout": 2}, "has lora_dropout 2"),
            ({"target_modules": ["attn", 3]}, "has target_modules"),
            ({"peft_type": {}}, "is of type {}"),
        ],
    )
    def test_values_out_of_range(self, setting, words, encoder, folder):
        edit(folder, **setting)
        with pytest.raises(EncoderError, match=words):
            load_lora(encoder, folder)
        assert not hasattr(encoder.module, "peft_config")

    def test_an_update_that_is_no_number(self, encoder, folder):
        before = vectors(encoder)
        file = folder / "adapter_model.safetensors"
        save_file({key: torch.full_like(value, 1e30) for key, value in load_file(file).items()}, file)
        with pytest.raises(EncoderError, match=r"its update of .* holds NaN or infinite values"):
            load_lora(encoder, folder)
        assert torch.equal(vectors(encoder), before)
        assert not hasattr(encoder.module, "peft_config")

    def test_weights_that_are_no_floats(self, encoder, folder):
        file = folder / "adapter_model.safetensors"
        save_file({key: value.to(torch.int8) for key, value in load_file(file).items()}, file)
        with pytest.raises(EncoderError, match=r"are not floats, first .* with I8"):
            load_lora(encoder, folder)

    def test_no_weight_is_read_before_all_fit(self, encoder, folder):
        size = 5 << 30
        header = json.dumps(
            {"y": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
        ).encode()
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)  # sparse: it takes no space on disk
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(EncoderError, match="1 are unknown to it, first y"):
            load_lora(encoder, folder)
        assert time.process_time() - start < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024


NAMES = ["text.layers.0.q", "text.layers.1.q", "vision.layers.1.q", "text.layers.1.k_proj", "q"]


@pytest.mark.parametrize(
    "pattern",
    [
        *("q", "layers.1.q", r"layers\.1\.q", "^q", "^text.*", ".*", "k.proj", r".*\.k_proj$", "q$|k_proj"),
        *("^text.layers.0.q|vision.+", "layers.*q", "", "a|", "..q", "text.layers"),
    ],
)
def test_patterns_match_as_in_peft(pattern):
    from peft.utils.other import get_pattern_key

    found = _resolve({pattern: 1}, 0, NAMES)
    assert found == {
        name: int(get_pattern_key([pattern], name) == pattern) for name in NAMES if name != pattern
    } | ({pattern: 1} if pattern in NAMES else {})


@pytest.mark.parametrize(
    "pattern", [r"\d", "(q)", "q?", "q+", "q*", "[q]", "q{2}", "q^", "q$q", "q\\", ".*?q"]
)
def test_patterns_that_say_more_are_not_explained(pattern):
    assert _globs(pattern) is None


@fuzzed
@given(data=st.data())
def test_fuzz_adapter_configs(adapter, data):
    folder, config, weights, encoder = adapter
    (folder / "adapter_model.safetensors").write_bytes(weights)
    config = {**config, "rank_pattern": {"attn": 2}, "alpha_pattern": {"attn|mlp": 3}}
    (folder / "adapter_config.json").write_bytes(dump(data.draw(damaged_json(config))))
    loads_or_refuses(lambda: load_and_take_off(encoder, folder))


@fuzzed
@given(data=st.data())
def test_fuzz_adapter_weights(adapter, data):
    folder, config, weights, encoder = adapter
    length = 8 + int.from_bytes(weights[:8], "little")
    header, rest = weights[8:length], weights[length:]
    if data.draw(st.booleans()):
        header = dump(data.draw(damaged_json(json.loads(header))))
        weights = struct.pack("<Q", len(header)) + header + rest
    else:
        weights = data.draw(damaged(weights[: length + 64])) + rest[64:]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    loads_or_refuses(lambda: load_and_take_off(encoder, folder))
