"""Weights files of many kinds: those that hold a model's weights load, others are refused with a reason."""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from fuzzing import damaged, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from xbt.encoders import load_encoder
from xbt.encoders.weights_files import load_weights_file
from xbt.errors import EncoderError, XbtError

SMALL = tiny.open_clip_config(dim=8, width=16, layers=1) | {"quick_gelu": True}
SMALL["text_cfg"] |= {"vocab_size": 49408, "width": 16, "heads": 1}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build()


def build():
    from xbt.encoders.open_clip_loading import build as build_model
    from xbt.encoders.quiet import quiet

    with quiet():
        return build_model(SMALL, {})


@pytest.fixture(scope="module")
def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


def numpy_optimizer():
    kinds = (np.float64(1e-3), np.float32(0.1), np.int64(7), np.bool_(True), np.arange(3), np.dtype("<f8"))
    return {"state": {}, "param_groups": [{"lr": kind} for kind in kinds]}


WRAPPED = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "training": lambda s: {
        "epoch": 2,
        "state_dict": renamed(s, "module.{}".format),
        "optimizer": numpy_optimizer(),
    },
    "model": lambda s: {"model": s, "scaler": {"scale": 1.0}, "args": ["--lr", 3]},
    "model_state_dict": lambda s: {
        "model_state_dict": renamed(s, "_orig_mod.module.{}".format),
        "loss": np.float32(1),
    },
    "nested": lambda s: {"model": {"state_dict": renamed(s, "module._orig_mod.{}".format)}},
    "lightning": lambda s: {"state_dict": renamed(s, "model.{}".format), "hyper_parameters": {"seed": 1}},
    "compiled tower": lambda s: renamed(s, lambda name: name.replace("visual.", "visual._orig_mod.")),
    "mixed": lambda s: renamed(s, lambda name: f"module.{name}" if name < "m" else name),
    "openai": lambda s: (
        s | {name: torch.tensor(9) for name in ("input_resolution", "context_length", "vocab_size")}
    ),
    "half": lambda s: {name: tensor.half() for name, tensor in s.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found(name, model, state, tmp_path):
    legacy = name in ("plain", "training")
    torch.save(WRAPPED[name](state), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    other = build()
    load_weights_file(other, tmp_path / "a.pt")
    tolerance = 1e-3 if name == "half" else 0
    for key, tensor in other.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=tolerance)


def test_a_file_is_known_by_its_content_not_by_its_name(state, tmp_path):
    save_file(state, tmp_path / "weights.pt")
    load_weights_file(build(), tmp_path / "weights.pt")
    torch.save(state, tmp_path / "weights.bin")
    load_weights_file(build(), tmp_path / "weights.bin")
    torch.save(state, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match=r"checkpoint of torch\.save, not safetensors"):
        load_weights_file(build(), tmp_path / "model.safetensors")


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


ARCHIVES = {
    "zip": (["readme.txt"], zipfile.ZIP_STORED),
    "bomb": (["archive/data.pkl"], zipfile.ZIP_DEFLATED),
    "TorchScript": (["a/code/a.py", "a/data.pkl", "a/constants.pkl"], zipfile.ZIP_DEFLATED),
}


def archived(kind):
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("sys_info"))
    else:
        names, method = ARCHIVES[kind]
        with zipfile.ZipFile(file, "w", method) as archive:
            for name in names:
                archive.writestr(name, bytes(100_000))
    return file.getvalue()


class Whole(torch.nn.Linear):
    """A module that somebody saved whole."""


def expanded(state):
    return saved(state | {"positional_embedding": torch.ones(1, 1).expand(10**6, 16)})


NAMESPACE = {"args": argparse.Namespace(lr=1), "epoch": 1}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FOREIGN = {
    "namespace": (lambda s: saved(NAMESPACE | {"state_dict": s}), r"object argparse\.Namespace"),
    "path": (lambda s: saved({"where": Path("x"), "state_dict": s}), r"an object pathlib"),
    "whole module": (lambda s: saved(Whole(2, 2)), r"an object .*Whole, which needs code to be run"),
    "function": (lambda s: saved({"f": print, "state_dict": s}), "an object .*print, which needs"),
    "TorchScript": (lambda s: archived("TorchScript"), "TorchScript archive, which holds code"),
    "git-lfs": (lambda s: POINTER, "git lfs pull"),
    "cut short": (lambda s: saved(s)[:9_000], "damaged or was cut short"),
    "legacy cut short": (
        lambda s: saved(s, _use_new_zipfile_serialization=False)[:9_000], "damaged or was cut short",
    ),
    "empty": (lambda s: b"", "is empty"),
    "web page": (lambda s: b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "JSON": (lambda s: b'{"error": "not found"}', r"is a text file \(JSON\)"),
    "text": (lambda s: b"Entry not found", "begins with 'Entry not found'"),
    "HDF5": (lambda s: b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "gzip": (lambda s: gzip.compress(saved(s)), "gzip archive; unpack it"),
    "tar": (lambda s: archived("tar"), "tar archive"),
    "zip": (lambda s: archived("zip"), "zip archive, but no checkpoint"),
    "bomb": (lambda s: archived("bomb"), "compressed zip archive"),
    "pickle": (lambda s: pickle.dumps({"a": 1}, protocol=4), "pickle.dump|damaged"),
    "list": (lambda s: saved([1, 2]), "holds a list instead of weights by name"),
    "no weights": (lambda s: saved({"epoch": 1, "loss": 0.5}), "holds no weights, but epoch, loss"),
    "other": (lambda s: saved({"text_model.a": torch.ones(1)}), "transformers model: load its folder"),
    "expanded": (expanded, "not stored whole"),
    "sparse": (lambda s: saved(s | {"logit_scale": torch.ones(1).to_sparse()}), "not stored whole"),
    "twice": (lambda s: saved(s | {"module.logit_scale": torch.ones(())}), "two tensors for"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_named(name, state, tmp_path):
    make, words = FOREIGN[name]
    (tmp_path / "a.pt").write_bytes(make(state))
    with pytest.raises(XbtError, match=words) as caught:
        load_weights_file(build(), tmp_path / "a.pt")
    message = str(caught.value)
    assert str(tmp_path / "a.pt") in message
    assert not any(word in message for word in ("weights_only", "\x1b", "\n"))


def test_missing_and_unexpected_names_are_both_reported(state, tmp_path):
    odd = renamed(state, lambda name: name.replace("visual.proj", "visual.projection"))
    torch.save(odd, tmp_path / "a.pt")
    with pytest.raises(EncoderError, match=r"missing are visual\.proj, unexpected are visual\.projection;"):
        load_weights_file(build(), tmp_path / "a.pt")
    torch.save({name: tensor for name, tensor in state.items() if "visual" not in name}, tmp_path / "b.pt")
    with pytest.raises(EncoderError, match=r"missing are visual.* and \d+ more, unexpected are none"):
        load_weights_file(build(), tmp_path / "b.pt")
    torch.save(state | {"logit_scale": torch.ones(2)}, tmp_path / "c.pt")
    with pytest.raises(EncoderError, match="logit_scale"):
        load_weights_file(build(), tmp_path / "c.pt")


def test_a_tilde_in_a_path_is_expanded(state, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small-arch", SMALL)
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "a.pt")
    direct = load_encoder(f"open_clip:small-arch/{tmp_path}/a.pt")
    assert torch.equal(
        direct.encode_texts(["rain"]), load_encoder("open_clip:small-arch/~/a.pt").encode_texts(["rain"])
    )


def test_files_of_open_clip_are_found_in_a_directory(model, state, tmp_path):
    from xbt.encoders.open_clip_loading import write_config

    write_config(tmp_path, SMALL, {})
    torch.save({"epoch": 1, "state_dict": renamed(state, "module.{}".format)}, tmp_path / "epoch_1.pt")
    encoder = load_encoder(f"open_clip:local-dir:{tmp_path}")
    assert torch.equal(encoder.module.visual.proj, model.visual.proj)
    torch.save(state, tmp_path / "epoch_2.pt")
    with pytest.raises(EncoderError, match=r"2 weights files, epoch_1\.pt, epoch_2\.pt, but"):
        load_encoder(f"open_clip:local-dir:{tmp_path}")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    load_encoder(f"open_clip:local-dir:{tmp_path}")


@pytest.fixture(scope="module")
def written(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    few = {name: tensor for name, tensor in state.items() if tensor.numel() < 5_000}
    contents = {
        "checkpoint": saved({"epoch": 1, "state_dict": few, "optimizer": numpy_optimizer()}),
        "legacy": saved({"state_dict": few}, _use_new_zipfile_serialization=False),
    }
    save_file(few, folder / "a.safetensors")
    return folder, contents | {"safetensors": (folder / "a.safetensors").read_bytes()}


@pytest.mark.parametrize("kind", ["checkpoint", "legacy", "safetensors"])
@fuzzed
@given(data=st.data())
def test_fuzz_weights_files(kind, data, written, model):
    folder, contents = written
    content = data.draw(damaged(contents[kind]))
    file = folder / f"damaged-{kind}.pt"
    file.write_bytes(content)
    loads_or_refuses(lambda: load_weights_file(model, file), len(content))
