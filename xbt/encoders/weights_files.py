"""Loading weights files of several formats into an open_clip model, without running code in them."""

from __future__ import annotations

import re
import string
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from xbt.encoders.quiet import brief
from xbt.errors import EncoderError
from xbt.hub.weights import read_tensors

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training loops save the weights."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that distributed training, ``torch.compile`` and Lightning add to a name."""
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Numbers beside the weights in OpenAI's archives."""
_NUMPY = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool", "UInt32")),
)
"""Numpy objects that are common in the state of optimizers and schedulers."""
_AGAIN = "download or save it again"
_PRINTABLE = frozenset(string.printable.encode())
_SHOWN = 3
_LOCK = threading.Lock()


class _Ignored:
    """Placeholder for an object that is not part of the weights; it ignores its arguments and state."""

    def __new__(cls, *_: Any) -> _Ignored:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_LFS = "is a git-lfs pointer, which only names the weights; run git lfs pull, or download the file itself"
_KINDS = {
    b"version https://git-lfs": _LFS,
    b"<": "is a web page (HTML or XML) that was saved under this name; download the file itself",
    b"{": "is a text file (JSON), which holds no weights; give the weights file",
    b"\x89HDF": "is an HDF5 file of another library (such as Keras); save the weights as safetensors",
    b"\x1f\x8b": "is a gzip archive; unpack it and give the weights file in it",
}
"""First bytes of files that hold no usable weights → end of the error."""


def load_weights_file(module: nn.Module, path: Path) -> None:
    """Load a weights file into an open_clip model, strictly, without running code in the file.

    Safetensors, checkpoints of ``torch.save`` and Google's ``.npz`` files are recognised by their content.
    Usual wrapper keys and name prefixes of training loops are removed.
    """
    if not path.is_file():
        raise EncoderError(f"the weights file {path} does not exist; check the path")
    path = path.resolve()
    names = _archive_names(path)
    if names is not None and any(name.endswith(".npy") for name in names):
        _load_numpy(module, path)
        return
    if _is_safetensors(path):
        # The decoder of CoCa writes captions and embeds nothing; open_clip leaves one weight uninitialised.
        state: Any = read_tensors(path, unused=("text_decoder.",))
    else:
        _require_checkpoint(path, names)
        state = _unpickled(path)
    _load_state(module, _plain_state(state, path), path)


def _archive_names(path: Path) -> list[str] | None:
    """The names of the files in a zip archive; ``None`` for other files."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # a damaged directory raises errors of many types
        raise EncoderError(f"{path} is damaged or was cut short ({brief(error)}); {_AGAIN}") from error
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") for name in names):
        raise EncoderError(
            f"{path} is a TorchScript archive, which holds code, and code in files is not run; if you trust "
            "it, save its weights alone: torch.save(torch.jit.load(path).state_dict(), 'weights.pt')"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise EncoderError(
            f"{path} is a compressed zip archive, which is not a format of weights; unpack it and give the "
            "weights file in it"
        )
    return names


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return not _kind_of(path)
    with path.open("rb") as file:
        start = file.read(9)
    # The first eight bytes are the length of the header, which is JSON.
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _kind_of(path: Path) -> str:
    """The end of an error about a file that is not a weights file; empty if it may be one."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return f"is empty; {_AGAIN}"
    if start.startswith(b"PK\x03\x04") or start[:2] == b"\x80\x02":
        if path.suffix == ".safetensors":
            return "is a checkpoint of torch.save, not safetensors; give it a name that ends in .pt"
        return ""
    sentence = next((_KINDS[kind] for kind in _KINDS if start.lstrip().startswith(kind)), "")
    if not sentence and all(byte in _PRINTABLE for byte in start):
        return f"is a text file that begins with {start[:20].decode()!r}; download the weights file itself"
    return sentence


def _require_checkpoint(path: Path, names: list[str] | None) -> None:
    """Refuse what ``torch.load`` cannot read, or must not."""
    sentence = _kind_of(path)
    if not sentence and names is not None and not any(name.endswith("data.pkl") for name in names):
        sentence = "is a zip archive, but no checkpoint of torch.save; give the weights file"
    if not sentence and names is None and tarfile.is_tarfile(path):
        sentence = (
            "is a tar archive; unpack it and give the weights file in it, or, where torch itself wrote it "
            "(before version 0.2), load and save it with today's torch"
        )
    if sentence:
        raise EncoderError(f"{path} {sentence}")


def _unpickled(path: Path) -> Any:
    with _LOCK:  # safe_globals is a setting of the whole process
        allowed: list[Any] = [(_Ignored, name) for name in _NUMPY]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            try:
                warnings.simplefilter("ignore")  # warnings about unusual pickle protocols
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged pickle raises errors of many types
                _explain(path, error)


def _explain(path: Path, error: Exception) -> NoReturn:
    global_name = re.search(r"GLOBAL ([\w.]+)", str(error))
    if global_name is None and "Unsupported operand" in str(error):
        raise EncoderError(
            f"{path} is damaged, or pickled in a form that cannot be read without running code (such as that "
            "of pickle.dump); save the weights with torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    if global_name is None:
        raise EncoderError(f"{path} is damaged or was cut short, or is no weights file; {_AGAIN}") from error
    raise EncoderError(
        f"{path} holds more than weights: an object {global_name[1]}, which needs code to be run; if you "
        "trust the file, load it with the program that wrote it, and save the weights alone: "
        "torch.save(model.state_dict(), 'weights.pt')"
    ) from error


def _plain_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights in a file's content, without wrapper keys and name prefixes."""
    inside: Any = content
    for _ in range(len(_WRAPPERS)):
        if not isinstance(inside, Mapping):
            break
        wrapped = [inside[key] for key in _WRAPPERS if isinstance(inside.get(key), Mapping)]
        if not wrapped:
            break
        inside = wrapped[0]
    if not isinstance(inside, Mapping):
        raise EncoderError(
            f"{path} holds a {type(inside).__name__} instead of weights by name; save model.state_dict()"
        )
    state: dict[str, Tensor] = {}
    for key, value in inside.items():
        name = _plain_name(str(key))
        if not isinstance(value, Tensor) or name in _NO_WEIGHTS:
            continue
        if name in state:
            raise EncoderError(
                f"{path} has two tensors for the weight {name}, one of them as {key}; save one model's "
                "state_dict() alone"
            )
        state[name] = _whole(value, name, path)
    if not state:
        keys = ", ".join(map(str, list(inside)[:_SHOWN])) or "nothing"
        raise EncoderError(f"{path} holds no weights, but {keys:.200}; save model.state_dict()")
    return state


def _plain_name(key: str) -> str:
    name = key.replace("._orig_mod.", ".")
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _whole(tensor: Tensor, name: str, path: Path) -> Tensor:
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    # An expanded tensor can have any size over a small storage, and would take all this memory when copied.
    if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise EncoderError(
            f"the tensor {name} of {path} is not stored whole (it is sparse, quantised or expanded); save "
            "dense weights"
        )
    return tensor.detach()


def _load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        fitting = _converted(module, state)
    except Exception as error:  # open_clip's conversions assume that the weights fit
        fitting, cause = state, error
        _require_fit(module, fitting, path)
        raise EncoderError(f"{path} cannot be converted for the model: {brief(cause)}") from cause
    _require_fit(module, fitting, path)
    module.load_state_dict(fitting, strict=True)


def _converted(module: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The steps of ``open_clip.load_checkpoint`` between reading and loading."""
    state = convert_state_dict(module, state)
    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        needed = getattr(module, name, None)
        if name in state and needed is not None and state[name].ndim != needed.ndim:
            state[name] = state[name].reshape(needed.shape)
    if "logit_bias" not in state and getattr(module, "logit_bias", None) is not None:
        state["logit_bias"] = torch.zeros_like(module.logit_bias)
    # Text models of transformers do not save this buffer since version 4.31.
    if "text.transformer.embeddings.position_ids" not in module.state_dict():
        state.pop("text.transformer.embeddings.position_ids", None)
    resize_pos_embed(state, module)
    resize_text_pos_embed(state, module)
    return state


def _require_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights whose names or shapes are not the model's."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        hint = "give weights of this architecture"
        if any(name.startswith(("text_model.", "vision_model.")) for name in extra):
            hint = "they belong to a transformers model: load its folder as transformers:DIRECTORY"
        raise EncoderError(
            f"the weights in {path} do not fit the model: missing are {_some(missing)}, unexpected are "
            f"{_some(extra)}; {hint}"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise EncoderError(
                f"the weights in {path} do not fit the model: {name} has the shape "
                f"{tuple(state[name].shape)}, the model needs {shape}; give weights of this architecture"
            )


def _some(names: list[str]) -> str:
    listed = ", ".join(name[:100] for name in names[:_SHOWN]) or "none"
    return listed if len(names) <= _SHOWN else f"{listed} and {len(names) - _SHOWN} more"


def _load_numpy(module: nn.Module, path: Path) -> None:
    try:
        load_big_vision_weights(module, str(path))
    except Exception as error:  # a file that does not fit raises errors of many types
        raise EncoderError(
            f"{path} holds numpy arrays, but not big_vision weights for this model ({brief(error)}); "
            "give weights of this architecture"
        ) from error
