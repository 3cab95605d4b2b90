"""Models named by an untrusted adapter: no code runs, nothing is unpickled, and sizes are checked first."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import open_clip
import pytest
import tiny
import torch
from hub.helpers import TEXTS, adapted
from hub.server import READER
from safetensors.torch import load_file
from transformers import BertConfig

from xbt.backbones import rebuild_backbone
from xbt.compatible import CompatibleEncoder
from xbt.encoders import load_encoder
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import EncoderError, XbtError
from xbt.space import draw_probe_images

HUGE = 2_000_000_000
CODE = """
import os
from pathlib import Path
from transformers import PreTrainedTokenizerFast, PretrainedConfig, BertModel

Path(os.environ["XBT_TEST_RAN"]).touch()

class Evil(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A file that the code of a repository creates when it runs; prompts to run it are accepted."""
    monkeypatch.setenv("XBT_TEST_RAN", str(tmp_path / "ran"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "ran"


@pytest.fixture
def base(models):
    """The files of a base model of open_clip, to be spoilt."""
    return {each.name: each.read_bytes() for each in (models / "new-clip").iterdir()}


@pytest.fixture
def adapter(hub, hosted, tmp_path):
    """Shares a compatible encoder as ``org/encoder``, and makes it name another base."""
    adapted(*hosted, tmp_path / "adapter").push_to_hub("org/encoder")

    def name_base(spec):
        files = dict(hub.files("org/encoder"))
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"base": spec}).encode()
        hub.put("org/encoder", files)

    return name_base


def model_config(files, tower, **values):
    """The files with other values in the config of a tower."""
    config = json.loads(files["open_clip_config.json"])
    config["model_cfg"][tower] |= values
    return files | {"open_clip_config.json": json.dumps(config).encode()}


def with_code(files, **text):
    mapped = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
    }
    tokenizer = {"tokenizer_class": "Evil", "auto_map": mapped}
    config = {"model_type": "evil", "auto_map": mapped}
    added = {"tokenizer_config.json": tokenizer, "config.json": config}
    code = {"evil.py": CODE.encode()}
    return (
        model_config(files, "text_cfg", **text) | {k: json.dumps(v).encode() for k, v in added.items()} | code
    )


def write(directory, files):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return f"open_clip:local-dir:{directory}"


TRUSTING = {"hf_tokenizer_name": "org/evil", "tokenizer_kwargs": {"trust_remote_code": True}}


def test_no_code_of_a_tokenizer_is_run(hub, adapter, base, ran, tmp_path):
    hub.put("org/evil", with_code(base, **TRUSTING))
    adapter("open_clip:hf-hub:org/evil")
    local = write(tmp_path / "evil", with_code(base, **TRUSTING))
    for load in (
        lambda: CompatibleEncoder.from_pretrained("org/encoder"),
        lambda: load_encoder("open_clip:hf-hub:org/evil"),
        lambda: load_encoder(local),
    ):
        with pytest.raises(EncoderError, match=r"tokenizer_kwargs.*trust_remote_code") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not ran.exists()
    assert not any(line.endswith("evil.py") for line in hub.requests)


@pytest.mark.parametrize("text", [{"hf_tokenizer_name": "org/evil"}, {"hf_model_name": "org/evil"}])
def test_loading_never_prompts_to_run_code(text, hub, base, ran, tmp_path):
    hub.put("org/evil", with_code(base, **text))
    for spec in ("open_clip:hf-hub:org/evil", write(tmp_path / "evil", with_code(base, **text))):
        with pytest.raises(EncoderError):
            load_encoder(spec)
    config = tiny.open_clip_config()
    config["text_cfg"] |= text
    with pytest.raises(EncoderError):
        OpenClipEncoder.create(config)
    assert not ran.exists()


def test_no_code_of_a_transformers_model_is_run(hub, ran, tmp_path):
    folder = tmp_path / "clip"
    tiny.tiny_transformers_clip(folder)
    (folder / "evil.py").write_text(CODE)
    for file, key, words in (
        ("config.json", "AutoConfig", {"model_type": "evil"}),
        ("config.json", "AutoModel", {"model_type": "evil"}),
        ("tokenizer_config.json", "AutoTokenizer", {"tokenizer_class": "Evil"}),
        ("preprocessor_config.json", "AutoImageProcessor", {"image_processor_type": "Evil"}),
    ):
        before = (folder / file).read_text()
        code = ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"
        (folder / file).write_text(json.dumps(json.loads(before) | words | {"auto_map": {key: code}}))
        hub.put("org/clip", {each.name: each.read_bytes() for each in folder.iterdir()})
        for spec in (f"transformers:{folder}", "transformers:org/clip"):
            with suppress(EncoderError):  # where transformers has code of its own for it, it loads
                load_encoder(spec)
        (folder / file).write_text(before)
    assert not ran.exists()
    assert not any(line.endswith("evil.py") for line in hub.requests)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_implementation": "org/kernel"}, "attn_implementation"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
        ({"vision_config": {"attn_implementation": "org/kernel"}}, "attn_implementation"),
    ],
)
def test_settings_of_transformers_that_fetch_or_unpickle_are_refused(changes, words, tmp_path):
    spec = tiny.tiny_transformers_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if key == "vision_config" else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=words):
        load_encoder(spec)


def test_an_adapter_inside_a_transformers_model_is_refused(tmp_path):
    spec = tiny.tiny_transformers_clip(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    with pytest.raises(EncoderError, match=r"adapter_config\.json"):
        load_encoder(spec)


def test_a_pickled_base_is_neither_fetched_nor_loaded(hub, adapter, base, tmp_path, monkeypatch):
    files = dict(base)
    (tmp_path / "weights").write_bytes(files.pop("open_clip_model.safetensors"))
    torch.save(load_file(tmp_path / "weights"), tmp_path / "weights.bin")
    hub.put("org/pickled", files | {"open_clip_pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
    adapter("open_clip:hf-hub:org/pickled")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for load in (
        lambda: CompatibleEncoder.from_pretrained("org/encoder"),
        lambda: load_encoder("open_clip:hf-hub:org/pickled"),
    ):
        with pytest.raises(XbtError, match=r"open_clip_pytorch_model\.bin.*no open_clip_model\.safetensors"):
            load()
    assert not any(line.endswith(".bin") for line in hub.requests)


def test_a_pickled_transformers_model_is_neither_fetched_nor_loaded(hub, tmp_path):
    tiny.tiny_transformers_clip(tmp_path)
    files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.put("org/clip", files)
    with pytest.raises(EncoderError, match=r"pytorch_model\.bin.*no model\.safetensors"):
        load_encoder("transformers:org/clip")
    assert not any(line.endswith(".bin") for line in hub.requests)


def test_pickled_weights_of_the_users_own_directory_load_without_running_anything(base, tmp_path):
    spec = write(tmp_path / "own", base)
    expected = load_encoder(spec).encode_texts(TEXTS)
    weights = tmp_path / "own" / "open_clip_model.safetensors"
    torch.save(load_file(weights), tmp_path / "own" / "open_clip_pytorch_model.bin")
    weights.unlink()
    torch.testing.assert_close(load_encoder(spec).encode_texts(TEXTS), expected)


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [
        ("text_cfg", "vocab_size", HUGE),
        ("text_cfg", "context_length", HUGE),
        ("text_cfg", "width", HUGE),
        ("text_cfg", "layers", HUGE),
        ("vision_cfg", "image_size", HUGE),
        ("vision_cfg", "layers", HUGE),
    ],
)
def test_a_base_that_asks_for_too_much(tower, key, value, hub, adapter, base, tmp_path):
    spoilt = model_config(base, tower, **{key: value})
    hub.put("org/huge", spoilt)
    adapter("open_clip:hf-hub:org/huge")
    for load in (
        lambda: CompatibleEncoder.from_pretrained("org/encoder"),
        lambda: load_encoder(write(tmp_path / "huge", spoilt)),
    ):
        with pytest.raises(EncoderError, match=r"open_clip_config\.json asks for"):
            load()


@pytest.mark.parametrize(
    ("tower", "key"),
    [
        ("text_config", "vocab_size"),
        ("text_config", "num_hidden_layers"),
        ("text_config", "max_position_embeddings"),
        ("vision_config", "hidden_size"),
    ],
)
def test_a_transformers_model_that_asks_for_too_much(tower, key, tmp_path):
    spec = tiny.tiny_transformers_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[tower][key] = HUGE
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=r"config\.json asks for"):
        load_encoder(spec)


def test_pixels_and_contexts_beyond_measure(tmp_path):
    spec = tiny.tiny_transformers_clip(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    config = json.loads(file.read_text())
    for key, value in (("size", {"shortest_edge": HUGE}), ("crop_size", {"height": HUGE, "width": HUGE})):
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(EncoderError, match=r"pixels"):
            load_encoder(spec)


@pytest.mark.parametrize(
    "name", ["hf-hub:org/tower", "local-dir:/tmp/tower", "hf_hub:org/tower", "org/tower"]
)
def test_a_config_that_fetches_a_tower_is_refused(name, hub, base, tmp_path):
    hub.put("org/tower", {"config.json": json.dumps({"architecture": "resnet18"}).encode()})
    with pytest.raises(EncoderError, match=r"timm_model_name"):
        load_encoder(write(tmp_path / "timm", model_config(base, "vision_cfg", timm_model_name=name)))
    config = tiny.open_clip_config() | {"vision_cfg": {"image_size": 32, "timm_model_name": name}}
    described = {"library": "open_clip", "config": config}
    with pytest.raises(EncoderError, match=r"timm_model_name"):
        rebuild_backbone({"spec": "clip:x", "image_size": 32, "architecture": described})
    assert hub.requests == []


def test_settings_of_a_backbones_tower_that_fetch_are_refused(tmp_path):
    for config in (
        {"model_type": "clip", "vision_config": {"attn_implementation": "org/kernel"}},
        {"model_type": "clip", "vision_config": {}, "attn_implementation": "org/kernel"},
    ):
        described = {"library": "transformers", "config": config}
        with pytest.raises(EncoderError, match=r"attn_implementation"):
            rebuild_backbone({"spec": "clip:x", "image_size": 32, "architecture": described})


def test_the_cache_alone_makes_no_requests(hub, adapter, hosted, tmp_path):
    adapter(hosted[0])
    first = CompatibleEncoder.from_pretrained("org/encoder")
    hub.requests.clear()
    again = CompatibleEncoder.from_pretrained("org/encoder", local_files_only=True)
    assert hub.requests == []
    assert torch.equal(again.encode_texts(TEXTS), first.encode_texts(TEXTS))
    shutil.rmtree(tmp_path / "hf" / "hub" / "models--org--new-clip")
    with pytest.raises(EncoderError, match=r"not in the cache.*pass base="):
        CompatibleEncoder.from_pretrained("org/encoder", local_files_only=True)
    assert hub.requests == []


def test_another_cache_holds_the_base_too(hub, adapter, hosted, tmp_path):
    adapter(hosted[0])
    shutil.rmtree(tmp_path / "hf" / "hub")
    other = tmp_path / "other"
    encoder = CompatibleEncoder.from_pretrained("org/encoder", cache_dir=other)
    assert {each.name for each in other.glob("models--*")} == {
        "models--org--encoder",
        "models--org--new-clip",
    }
    assert not (tmp_path / "hf" / "hub").exists()
    assert encoder.new.revision == hub.repos["org/new-clip"].refs["main"]


def test_a_private_base_is_fetched_with_the_token(hub, adapter, hosted, monkeypatch, tmp_path):
    adapter(hosted[0])
    hub.repos["org/new-clip"].private = True
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(tmp_path / "hf" / "hub")
    with pytest.raises(EncoderError, match="private and needs a token"):
        CompatibleEncoder.from_pretrained("org/encoder")
    assert CompatibleEncoder.from_pretrained("org/encoder", token=READER).dim == 12


@pytest.mark.parametrize("backend", ["open_clip", "transformers"])
def test_the_base_is_loaded_at_the_recorded_revision(backend, hub, hosted, tmp_path):
    spec = hosted[0]
    if backend == "transformers":
        tiny.tiny_transformers_clip(tmp_path / "clip", seed=1)
        hub.put("org/clip", {each.name: each.read_bytes() for each in (tmp_path / "clip").iterdir()})
        spec = "transformers:org/clip"
    repo = spec.rpartition(":")[2]
    encoder = adapted(spec, hosted[1], tmp_path / "adapter")
    encoder.push_to_hub("org/encoder")
    made_with = hub.repos[repo].refs["main"]
    maker = tiny.tiny_open_clip if backend == "open_clip" else tiny.tiny_transformers_clip
    maker(tmp_path / "later", seed=9)
    hub.put(repo, {each.name: each.read_bytes() for each in (tmp_path / "later").iterdir()})
    for source in ("org/encoder", tmp_path / "adapter"):
        loaded = CompatibleEncoder.from_pretrained(source)
        assert loaded.new.revision == made_with != hub.repos[repo].refs["main"]
        assert torch.equal(loaded.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
    with pytest.raises(XbtError):  # named by the user, it is what the repository has now
        CompatibleEncoder.from_pretrained("org/encoder", base=spec)
    assert load_encoder(spec, revision=made_with).space.same_as(load_encoder(f"{spec}@{made_with}").space)


@pytest.fixture
def tag(hub, hosted, monkeypatch):
    """A tag of open_clip's own list whose weights are in a repository."""
    trained = {"hf_hub": "org/new-clip/", "mean": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", tiny.open_clip_config())
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-arch", {"ours": trained})
    return "open_clip:tiny-arch/ours"


def test_a_tag_of_open_clips_own_list(tag, hub, hosted, models, tmp_path):
    encoder = load_encoder(tag)
    model, _, transform = open_clip.create_model_and_transforms("tiny-arch", pretrained="ours")
    tokens = open_clip.get_tokenizer("tiny-arch")(TEXTS)
    with torch.no_grad():
        expected = model.eval().encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, rtol=0, atol=1e-5)
    image = draw_probe_images()[0]
    assert torch.equal(encoder.preprocess(image), transform(image))
    first = hub.repos["org/new-clip"].refs["main"]
    assert encoder.revision == first
    files = {each.name: each.read_bytes() for each in (models / "new-clip").iterdir()}
    hub.put("org/new-clip", model_config(files, "text_cfg", heads=1))
    hub.requests.clear()
    for options in ({"local_files_only": True}, {"revision": first}):
        again = load_encoder(tag, **options)
        assert torch.equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))
        assert again.preprocessing == encoder.preprocessing
        assert hub.requests == []
    with pytest.raises(EncoderError, match="not in the cache, and local_files_only is set"):
        load_encoder(tag, cache_dir=tmp_path / "empty", local_files_only=True)
    assert hub.requests == []


def test_a_text_tower_of_transformers_and_its_tokenizer_come_from_their_repositories(hub, base, tmp_path):
    text = tmp_path / "text"
    vocabulary = tiny.write_clip_tokenizer(text, context_length=32)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(**sizes, vocab_size=len(vocabulary)).save_pretrained(text)
    hub.put("bert-tiny", {each.name: each.read_bytes() for each in text.iterdir()} | {"x.py": CODE.encode()})
    config = tiny.open_clip_config()
    config["text_cfg"] = {
        "context_length": 32, "hf_model_name": str(text), "hf_tokenizer_name": str(text),
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip
    made = OpenClipEncoder.create(config)
    made.save_pretrained(tmp_path / "model")
    assert made.model_config["text_cfg"]["hf_model_name"] == str(text)
    files = {each.name: each.read_bytes() for each in (tmp_path / "model").iterdir()}
    kept = ("open_clip_config.json", "open_clip_model.safetensors")
    names = {"hf_model_name": "bert-tiny", "hf_tokenizer_name": "bert-tiny"}
    hub.put("org/clip", model_config({name: files[name] for name in kept}, "text_cfg", **names))
    loaded = load_encoder("open_clip:hf-hub:org/clip")
    assert torch.equal(loaded.encode_texts(TEXTS), made.encode_texts(TEXTS))
    assert loaded.model_config["text_cfg"]["hf_model_name"] == "bert-tiny"
    assert not any(line.endswith(".py") for line in hub.requests)
    hub.requests.clear()
    again = load_encoder("open_clip:hf-hub:org/clip", local_files_only=True)
    assert hub.requests == []
    assert torch.equal(again.encode_texts(TEXTS), made.encode_texts(TEXTS))
    hub.put("org/path", model_config({name: files[name] for name in kept}, "text_cfg"))
    with pytest.raises(EncoderError, match="is not a Hub repository"):
        load_encoder("open_clip:hf-hub:org/path")  # it names a directory of whoever shared it
