"""Export of projection and ensemble as one ONNX model, for query code without torch."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from xbt.compatible.encoder import CompatibleEncoder
from xbt.errors import ConfigError, XbtError
from xbt.files import whole_file, write_record
from xbt.optional import optional
from xbt.projections.base import Modality, Projection
from xbt.projections.combinations import Adaptive, Combination
from xbt.projections.ensemble import QueryEnsemble, direction_of
from xbt.projections.forward import ForwardMap
from xbt.projections.head_projection import HeadProjection
from xbt.space import EmbeddingSpace
from xbt.version import __version__


class WholeAdaptive(Adaptive):
    """:class:`Adaptive` without a loop over blocks of queries, which a traced graph cannot have."""

    def shares(self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See :meth:`Combination.shares`."""
        confidence_gap = None
        if self.confidence:
            reference = tensors["reference"]
            confidence_gap = _confidence(new, reference) - _confidence(old, reference)
        beta = self.weights((old * new).sum(dim=-1, keepdim=True), confidence_gap)
        return 1 - beta, beta


class _HeadMap(nn.Module):
    """The map of a :class:`HeadProjection` without its training parts."""

    def __init__(self, projection: HeadProjection) -> None:
        super().__init__()
        self.embedding, self.head = projection.embedding, projection.head
        for name, child in list(self.head.named_children()):
            if parametrize.is_parametrized(child, "weight"):
                setattr(self.head, name, _plain(child))
        self.whole = projection.output == "full"

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """As :meth:`Projection.project`."""
        full: Tensor = self.head.embedded(self.embedding(vectors))[1]
        return full if self.whole else full[:, : self.head.old_dim]


def _plain(layer: nn.Module) -> nn.Linear:
    """Linear layer with the weight of a parametrised one.

    The parametrised layer is not changed: removing its parametrisation would affect its copies as well.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear.requires_grad_(False)


class QueryGraph(nn.Module):
    """Traceable module from encoder vectors to queries, as in :class:`~xbt.compatible.CompatibleEncoder`.

    Projection and ensemble are copied to float32 on the CPU; the originals do not change. The graph takes new
    vectors, old vectors, or both: old ones come last.

    Raises:
        ConfigError: If the ensemble was not made for queries of this modality.
    """

    def __init__(self, projection: Projection, ensemble: QueryEnsemble | None, modality: Modality) -> None:
        super().__init__()
        copied = copy.deepcopy(projection).float().cpu().eval().requires_grad_(False)
        self.map = _HeadMap(copied) if isinstance(copied, HeadProjection) else copied
        self.modality = modality
        self.combination: Combination | None = None
        self.takes_new, self.takes_old = True, False
        self.names: list[str] = []
        if ensemble is not None:
            direction = direction_of(modality)
            self.combination = ensemble.combination(direction)
            if isinstance(self.combination, Adaptive):
                self.combination = WholeAdaptive(**asdict(self.combination))
            self.takes_new = self.combination.needs_new
            self.takes_old = self.combination.needs_old
            for name, tensor in ensemble.tensors(direction).items():
                self.register_buffer(name, tensor.detach().float().cpu().clone())
                self.names.append(name)

    def forward(self, *vectors: Tensor) -> Tensor:
        """Map (n, new_dim) new and (n, old_dim) old vectors, each if needed, to (n, old_dim) unit rows."""
        new = self.map.project(vectors[0], self.modality) if self.takes_new else None
        if self.combination is None:
            assert new is not None
            return normalize(new, dim=-1)
        old = normalize(vectors[-1], dim=-1) if self.takes_old else None
        tensors = {name: self.get_buffer(name) for name in self.names}
        return normalize(self.combination.combine(old, new, tensors), dim=-1)


def _confidence(queries: Tensor, reference: Tensor) -> Tensor:
    scores = queries @ reference.T
    mean = scores.mean(dim=1, keepdim=True)
    spread = (scores - mean).square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
    result: Tensor = (scores.amax(dim=1, keepdim=True) - mean) / spread
    return result


def example_inputs(graph: QueryGraph, new_dim: int, old_dim: int, rows: int) -> tuple[Tensor, ...]:
    """Fixed random unit rows for the inputs of a graph."""
    generator = torch.Generator().manual_seed(0)
    dims = [dim for dim, taken in ((new_dim, graph.takes_new), (old_dim, graph.takes_old)) if taken]
    return tuple(normalize(torch.randn(rows, dim, generator=generator), dim=1) for dim in dims)


FORMAT = 1
CONTRACT = "xbt_contract"
"""Metadata key of the contract as JSON; the contract is also in a file next to the model."""
TOLERANCE = 1e-4
"""Maximum difference to torch; a model that differs more is not written."""

_ROWS = (1, 7)
_MAX_ROWS = 2**62
"""Stated because torch 2.7 refuses graphs whose rows could be 2**63 - 1."""


def export_onnx(
    model: Projection | CompatibleEncoder,
    path: str | Path,
    *,
    modality: Modality = "text",
    ensemble: QueryEnsemble | None = None,
) -> dict[str, Any]:
    """Write the map between the encoders and the old gallery as an ONNX model.

    Its inputs are ``new_vectors`` (n, new_dim) and, if an ensemble needs them, ``old_vectors`` (n, old_dim):
    unit rows from the encoders. Its output ``queries`` (n, old_dim) are unit rows in the old space. n is at
    least 1. The encoders are not exported.

    Args:
        model: A projection, or a compatible encoder with its ensemble.
        path: The file, such as ``query.onnx``; an existing one is replaced. The contract (names, dimensions
            and spaces) is written next to it as ``query.json`` and into the metadata of the model.
        modality: Modality of the queries: ``"text"`` or ``"image"``.
        ensemble: An ensemble for a projection without a compatible encoder.

    Returns:
        The contract.

    Raises:
        ConfigError: If onnx, onnxruntime or onnxscript is not installed, an argument does not fit, or the
            ensemble was not made for the modality.
        XbtError: If the exported model does not agree with torch; nothing is written then.
        StoreError: If the file cannot be written.
    """
    runtime, *_ = (optional(name, "onnx") for name in ("onnxruntime", "onnx", "onnxscript"))
    projection, combined = _parts(model, ensemble)
    if modality not in ("text", "image"):
        raise ConfigError(f"the modality of queries is 'text' or 'image', got {modality!r}")
    file = Path(path).expanduser()
    if file.suffix != ".onnx":
        raise ConfigError(f"the file of an ONNX model ends in .onnx, got {file.name!r}; rename it")
    graph = QueryGraph(projection, combined, modality).eval()
    about = _contract(graph, projection, modality, model)
    program = _traced(graph, projection, [each["name"] for each in about["inputs"]])
    program.model.metadata_props[CONTRACT] = json.dumps(about)
    with whole_file(file) as partial:
        program.save(partial, external_data=False)
        _compare(runtime, partial, graph, projection)
    write_record(file.with_suffix(".json"), about)
    return about


def _parts(
    model: Projection | CompatibleEncoder, ensemble: QueryEnsemble | None
) -> tuple[Projection, QueryEnsemble | None]:
    if isinstance(model, CompatibleEncoder):
        if ensemble is not None:
            raise ConfigError("a compatible encoder has its own ensemble; leave out ensemble=")
        return model.projection, model.ensemble
    if not isinstance(model, Projection):
        raise ConfigError(f"give a Projection or a CompatibleEncoder to export, not a {type(model).__name__}")
    if isinstance(model, ForwardMap) and model.side_dim:
        raise ConfigError(
            f"the map needs {model.side_dim}-d side information, which queries do not have; run it with torch"
        )
    if ensemble is not None and ensemble.old_dim != model.old_dim:
        raise ConfigError(
            f"the ensemble combines {ensemble.old_dim}-d vectors, but the projection returns "
            f"{model.old_dim}-d ones; export it with the projection that it was fitted to"
        )
    return model, ensemble


def _traced(graph: QueryGraph, projection: Projection, names: list[str]) -> Any:
    rows = torch.export.Dim("n", min=1, max=_MAX_ROWS)
    examples = example_inputs(graph, projection.new_dim, projection.old_dim, 3)
    with warnings.catch_warnings(), redirect_stdout(StringIO()), torch.no_grad():
        # The exporter's warnings and prints (torch 2.7 ignores verbose=False) concern only its internals.
        # The result is compared with torch afterwards.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            examples,
            input_names=names,
            output_names=["queries"],
            dynamic_shapes=(tuple({0: rows} for _ in examples),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # local file names and line numbers
    return program


def _contract(
    graph: QueryGraph, projection: Projection, modality: Modality, model: Projection | CompatibleEncoder
) -> dict[str, Any]:
    old_space = projection.old_space
    # With LoRA the encoder has a space of its own, which the projection does not know.
    new_space = model.new.space if isinstance(model, CompatibleEncoder) else projection.new_space
    inputs = []
    if graph.takes_new:
        inputs.append(_side("new_vectors", projection.new_dim, new_space))
    if graph.takes_old:
        inputs.append(_side("old_vectors", projection.old_dim, old_space))
    return {
        "format": FORMAT,
        "xbt_version": __version__,
        "modality": modality,
        "projection": projection.kind,
        "ensemble": None if graph.combination is None else graph.combination.to_dict(),
        "inputs": inputs,
        "output": _side("queries", projection.old_dim, old_space),
    }


def _side(name: str, dim: int, space: EmbeddingSpace | None) -> dict[str, Any]:
    kept = None if space is None else space.to_dict()
    return {"name": name, "dtype": "float32", "dim": dim, "rows": "unit", "space": kept}


def _compare(runtime: Any, file: Path, graph: QueryGraph, projection: Projection) -> None:
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for rows in _ROWS:
        given = example_inputs(graph, projection.new_dim, projection.old_dim, rows)
        with torch.no_grad():
            wanted = graph(*given)
        feed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        got = torch.from_numpy(session.run(["queries"], feed)[0])
        difference = float((got - wanted).abs().max())
        if not difference <= TOLERANCE:
            raise XbtError(
                f"the ONNX model of a {projection.kind} projection differs from torch by {difference:.2g} on "
                f"{rows} rows; update onnx, onnxruntime and onnxscript, or serve with torch"
            )
