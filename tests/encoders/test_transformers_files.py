"""Folders of transformers that are not a plain CLIP: loaded correctly, or refused with a reason."""

from __future__ import annotations

import json
import shutil
import string

import pytest
import tiny
import torch
from fuzzing import damaged, damaged_json, dump, fuzzed, fuzzed_in, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import Siglip2Tokenizer

import xbt.encoders.transformers_files as files
from xbt.encoders import load_encoder
from xbt.errors import EncoderError

ST = "sentence_transformers.models"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "0_CLIPModel"
    tiny.tiny_transformers_clip(folder, layers=1)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def modules(*kinds, path="0_CLIPModel"):
    listed = [
        {"idx": i, "name": str(i), "path": path if i == 0 else f"{i}", "type": kind}
        for i, kind in enumerate(kinds)
    ]
    return json.dumps(listed)


@pytest.mark.parametrize("path", ["0_CLIPModel", "towers", ""])
def test_models_of_sentence_transformers_load(path, clip, tmp_path):
    shutil.copytree(clip, tmp_path / path, dirs_exist_ok=True)
    (tmp_path / "modules.json").write_text(modules(f"{ST}.CLIPModel", f"{ST}.Normalize", path=path))
    loaded, direct = load_encoder(f"transformers:{tmp_path}"), load_encoder(f"transformers:{clip}")
    assert torch.equal(loaded.encode_texts(["a dog"]), direct.encode_texts(["a dog"]))


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        (modules(f"{ST}.Transformer", f"{ST}.Pooling"), "first module is Transformer, not CLIPModel"),
        (modules(f"{ST}.CLIPModel", f"{ST}.Dense"), "with Dense after the CLIP"),
        (modules(f"{ST}.CLIPModel", path="../0_CLIPModel"), "must be one inside"),
        (modules(f"{ST}.CLIPModel", path="/tmp"), "must be one inside"),
        (modules(f"{ST}.CLIPModel", path="1_CLIPModel"), "1_CLIPModel, which is missing"),
        ("{}", "must hold a list"),
        ("[", "not valid JSON"),
        ("[]", "first module is none"),
    ],
)
def test_other_folders_of_sentence_transformers_are_named(listing, words, clip, tmp_path):
    shutil.copytree(clip, tmp_path / "st" / "0_CLIPModel")
    (tmp_path / "st" / "modules.json").write_text(listing)
    with pytest.raises(EncoderError, match=words):
        load_encoder(f"transformers:{tmp_path / 'st'}")


def test_a_folder_with_a_clip_inside_is_pointed_at(clip):
    with pytest.raises(EncoderError, match=r"no config\.json.*0_CLIPModel in it looks like one"):
        load_encoder(f"transformers:{clip.parent}")


CODE = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}
MAPPED = {"auto_map": CODE}


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (
            "config.json",
            {"model_type": "odd_clip", "auto_map": CODE},
            "'odd_clip' model, not a CLIP.*is not run",
        ),
        (
            "config.json",
            {"auto_map": CODE},
            r"refers to its own code \(auto_map in config\.json\), which is not run",
        ),
        ("config.json", {"model_type": ["clip"]}, "not a CLIP"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "OddTokenizer", "auto_map": CODE},
            "tokenizer .* is not run",
        ),
        (
            "preprocessor_config.json",
            {"image_processor_type": "Odd", "auto_map": {"AutoImageProcessor": "evil.P"}},
            "image processor .* is not run",
        ),
    ],
)
def test_code_of_a_repository_is_not_run(file, changes, words, clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / "evil.py").write_text("raise SystemExit")
    edit(tmp_path / file, **changes)
    with pytest.raises(EncoderError, match=words):
        load_encoder(f"transformers:{tmp_path}")


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        (["preprocessor_config.json"], r"preprocessor_config\.json is missing; save the one"),
        (
            ["vocab.json", "merges.txt", "tokenizer_config.json"],
            "tokenizer .* has no words",
        ),
        (["config.json"], r"has no config\.json"),
        (["model.safetensors"], r"has no model\.safetensors; save the model as safetensors"),
    ],
)
def test_missing_files_are_named(removed, words, clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    for name in removed:
        (tmp_path / name).unlink()
    with pytest.raises(EncoderError, match=words):
        load_encoder(f"transformers:{tmp_path}")


def test_a_processor_config_alone_suffices_if_it_describes_images(clip, tmp_path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    described = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    with pytest.raises(EncoderError, match=r"preprocessor_config\.json is missing"):
        load_encoder(f"transformers:{tmp_path}")
    edit(tmp_path / "processor_config.json", image_processor=described)
    load_encoder(f"transformers:{tmp_path}")


def test_a_missing_package_is_named(clip, monkeypatch):
    def fail(*_args, **_options):
        raise ImportError(
            "SiglipTokenizer requires the SentencePiece library but it was not found. Install it"
        )

    monkeypatch.setattr(files.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(EncoderError, match="pip install sentencepiece"):
        load_encoder(f"transformers:{clip}")


def gemma(folder, normalizer=None, **config):
    """A SigLIP with a tokenizer that keeps capitals and punctuation, as that of SigLIP 2."""
    tiny.tiny_siglip(folder, layers=1)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    known = dict.fromkeys(
        [*special, *string.ascii_letters, *string.digits, *string.punctuation, "ä", "Ä", "σ", "Σ"]
    )
    vocabulary = {token: number for number, token in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer or normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    settings = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right"} | tokens | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_encoder(f"transformers:{folder}")


def test_siglip_2_reads_lower_case_as_its_own_tokenizer_does(tmp_path):
    encoder = gemma(tmp_path)
    reference = Siglip2Tokenizer.from_pretrained(tmp_path)
    for text in ("A Red DOG", "a red dog", "Two DOGS & a Cat!!", "ÄΣ ΑΣ", "STOP.", ""):
        ids = reference(text)["input_ids"]
        assert encoder.tokenize([text])[0, : len(ids)].tolist() == ids, text
    vectors = encoder.encode_texts(["A Red DOG", "a red dog", "a red dog."])
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2], atol=1e-4)
    assert encoder.space.settings["text_cleaning"] == "lower"


def test_a_tokenizer_that_lowers_itself_or_must_not_is_left_alone(tmp_path):
    lowering = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    encoder = gemma(tmp_path / "lowering", lowering)
    assert str(encoder.tokenizer.backend_tokenizer.normalizer).count("Lowercase") == 1
    keeping = gemma(tmp_path / "keeping", do_lower_case=False)
    assert keeping.space.settings["text_cleaning"] == "none"


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
)
@fuzzed_in(5)
@given(data=st.data())
def test_fuzz_folders(name, data, clip, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"fuzzed-{name}"
    if not folder.exists():
        shutil.copytree(clip, folder)
    whole = (clip / name).read_bytes()
    variants = damaged(whole)
    if name.endswith("config.json"):
        variants = st.one_of(damaged_json(json.loads(whole)).map(dump), variants)
    (folder / name).write_bytes(data.draw(variants))
    loads_or_refuses(lambda: load_encoder(f"transformers:{folder}").encode_texts(["a dog"]))


def test_a_tokenizer_whose_library_panics_is_refused(tmp_path):
    tiny.tiny_siglip(tmp_path, layers=1)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}  # of which the template needs one
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        EncoderError, match=r"the tokenizer of .* is damaged or of another version \(no entry"
    ):
        load_encoder(f"transformers:{tmp_path}")


@fuzzed
@given(data=st.data())
def test_fuzz_fast_tokenizers(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-siglip"
    if not folder.exists():
        tiny.tiny_siglip(folder, layers=1)
        (folder / "whole").write_bytes((folder / "tokenizer.json").read_bytes())
    whole = (folder / "whole").read_bytes()
    variants = st.one_of(damaged_json(json.loads(whole)).map(dump), damaged(whole))
    (folder / "tokenizer.json").write_bytes(data.draw(variants))
    loads_or_refuses(lambda: load_encoder(f"transformers:{folder}").encode_texts(["a dog"]))
