"""Weights as safetensors, which are only read after names, shapes and sizes are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from xbt.errors import SavedPartError
from xbt.hub.files import require_file

ModuleT = TypeVar("ModuleT", bound=nn.Module)

MAX_HEADER = 4 * 2**20
"""Longest header of a safetensors file that is parsed, in bytes; 1,000 tensors need a 30th of it."""
SPARE_BYTES = 4 * 2**20
"""Bytes that a build may allocate beyond :data:`_BUDGET_FACTOR` times the size of the saved weights."""
_SPARE_TENSORS = 10_000
_BUDGET_FACTOR = 8
"""A build may allocate this many times the size and number of the saved tensors."""
_FLOATS = ("F16", "BF16", "F32", "F64")
_DTYPES = {
    **{torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"},
    **{torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16"},
    **{torch.int32: "I32", torch.int64: "I64"},
}


class Stored(NamedTuple):
    """Shape and type, such as ``"F32"``, of a tensor in the header of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state as safetensors; only plain dense tensors with finite values are accepted."""
    for name, tensor in module.state_dict().items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise SavedPartError(
                f"tensor {name} of the {type(module).__name__} is on {tensor.device}, {tensor.layout} and "
                f"{tensor.dtype}; only plain dense tensors can be saved"
            )
    # Clones, because safetensors refuses tensors that share memory.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    _require_finite(state, f"the {type(module).__name__}")
    save_file(state, path)


def read_header(path: Path) -> dict[str, Stored]:
    """Read names, shapes and types of the tensors of a safetensors file, without their values."""
    require_file(path)
    try:
        with path.open("rb") as start:
            # The format begins with the header's length: 8 bytes, little-endian.
            length = int.from_bytes(start.read(8), "little")
        # A header length beyond the file's end is damage, which safetensors refuses without reading it.
        if MAX_HEADER < length < path.stat().st_size:
            raise SavedPartError(
                f"{path} has a header of {length:,} bytes, but at most {MAX_HEADER:,} are read; a model has "
                "far fewer tensors: save or download it again"
            )
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SavedPartError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise SavedPartError(f"{path} is damaged ({error}); save or download it again") from error


def build_and_load(
    path: Path, build: Callable[[], ModuleT], config: Path, spare_bytes: int = SPARE_BYTES
) -> ModuleT:
    """Build the module that a config describes, and load its weights once both agree.

    A config is not trusted. While the module is built, tensors that are far larger than the saved weights are
    refused, so that a width of a thousand million allocates nothing. Names, shapes and types are then
    compared with the file's header, and only after that the weights are read. ``config`` is the config's
    file, for messages. The module is in evaluation mode.
    """
    # The random weights are overwritten, so drawing them must not change the caller's random state.
    with torch.random.fork_rng(devices=[]), limit_allocations([path], config, spare_bytes):
        module = build()
    load_weights(module, path)
    return module.eval()


@contextmanager
def limit_allocations(files: Sequence[Path], config: Path, spare_bytes: int = SPARE_BYTES) -> Iterator[None]:
    """Refuse tensors within the block that are far larger than the weights in the files.

    That is more than eight times the files' size and ``spare_bytes``. ``config`` is the file that describes
    the module, for messages.
    """
    n_bytes = sum(file.stat().st_size for file in map(require_file, files))
    n_tensors = sum(len(read_header(file)) for file in files if file.suffix == ".safetensors")
    guard = _Budget(_BUDGET_FACTOR * n_bytes + spare_bytes, _BUDGET_FACTOR * n_tensors + _SPARE_TENSORS)
    try:
        with guard:
            yield
    except Exception as error:
        if guard.refused is None:
            raise
        raise SavedPartError(
            f"{files[0]} does not fit its config: {config} asks for {guard.refused}, but the weights have "
            f"{n_bytes:,} bytes in {n_tensors} tensors; save or download it again"
        ) from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Load safetensors into a module, strictly, or leave it as it was.

    Every name, shape and type must agree, but any float type is accepted for a float. All values must be
    finite.
    """
    needed = {
        name: Stored(tuple(tensor.shape), _DTYPES.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in module.state_dict().items()
    }
    header = read_header(path)
    missing, extra = sorted(needed.keys() - header.keys()), sorted(header.keys() - needed.keys())
    if missing or extra:
        raise SavedPartError(
            f"{path} does not fit its config: missing tensors {_some(missing)}, unexpected {_some(extra)}"
        )
    for name, (shape, dtype) in header.items():
        if shape != needed[name].shape:
            raise SavedPartError(
                f"{path} does not fit its config: tensor {name} has the shape {shape}, the config needs "
                f"{needed[name].shape}"
            )
        if dtype != needed[name].dtype and not {dtype, needed[name].dtype} <= set(_FLOATS):
            raise SavedPartError(
                f"{path} does not fit its config: tensor {name} has the type {dtype}, the config needs "
                f"{needed[name].dtype}"
            )
    module.load_state_dict(read_tensors(path))


def read_tensors(path: Path, *, unused: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; all values must be finite.

    ``unused`` are prefixes of the names of tensors whose values do not matter.
    """
    require_file(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SavedPartError(f"{path} is damaged ({error}); save or download it again") from error
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    _require_finite(used, str(path))
    return tensors


def _require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SavedPartError(
                f"tensor {name} of {what} holds NaN or infinite values; train or download it again"
            )


def _some(names: list[str]) -> str:
    return str(names) if len(names) <= 8 else f"{names[:8]} and {len(names) - 8} more"


class _Budget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations, before they run, that create or read a tensor beyond a memory budget.

    Attributes:
        refused: Description of the refused allocation, or ``None``.
    """

    def __init__(self, n_bytes: int, n_tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes, self._tensors = n_bytes, n_tensors
        self._largest = n_bytes
        self.refused: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        # An expanded tensor is small until it is copied.
        largest = max((tensor.numel() * tensor.element_size() for tensor in inputs), default=0)
        if largest > self._largest:
            self._refuse(f"a tensor of {largest:,} bytes")
        n_elements = _factory_elements(func, args, inputs)
        if n_elements is not None:
            self._bytes -= n_elements * 4
            self._tensors -= 1
            if self._bytes < 0:
                self._refuse(
                    f"tensors of more than {self._largest:,} bytes, the last of them {n_elements * 4:,}"
                )
            if self._tensors < 0:
                self._refuse("more tensors than that")
        return func(*args, **(kwargs or {}))

    def _refuse(self, what: str) -> None:
        self.refused = what
        raise MemoryError(what)


def _factory_elements(func: Any, args: tuple[Any, ...], inputs: list[Tensor]) -> int | None:
    """Number of elements that a factory function creates; ``None`` for every other operation."""
    name = func.overloadpacket.__name__
    if inputs and not name.startswith("new_"):
        return None
    numbers = [arg for arg in args if isinstance(arg, int | float) and not isinstance(arg, bool)]
    if name == "eye":
        return int(numbers[0]) * int(numbers[-1])
    if name in ("arange", "linspace", "logspace"):
        # An estimate: the largest of both ends and the number of steps. Models use steps of 1 or more.
        return int(max(map(abs, numbers), default=0))
    shape = next((arg for arg in args if isinstance(arg, list | tuple)), None)
    return None if shape is None else math.prod(map(int, shape))
