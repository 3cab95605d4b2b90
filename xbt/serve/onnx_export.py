"""Projection and ensemble as an ONNX model, for query code that has no torch."""

from __future__ import annotations

import json
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from xbt.compatible import CompatibleEncoder
from xbt.errors import ConfigError, XbtError
from xbt.optional import optional
from xbt.projections import Projection
from xbt.projections.base import Modality
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.forward import ForwardMap
from xbt.serve.files import whole_file
from xbt.serve.onnx_graph import QueryGraph, example_inputs
from xbt.space import EmbeddingSpace
from xbt.store.files import write_record
from xbt.version import __version__

FORMAT = 1
CONTRACT = "xbt_contract"
"""Key of the model's metadata that holds the contract as JSON; a file beside the model holds it too."""
TOLERANCE = 1e-4
"""An exported model that differs more than this from torch is not written."""

_ROWS = (1, 7)
_MOST_ROWS = 2**62
"""Said because torch 2.7 refuses graphs whose rows could be 2**63 - 1."""


def export_onnx(
    model: Projection | CompatibleEncoder,
    path: str | Path,
    *,
    modality: Modality = "text",
    ensemble: QueryEnsemble | None = None,
) -> dict[str, Any]:
    """Write the map between the encoders and the old gallery as an ONNX model.

    Its inputs are ``new_vectors`` (n, new_dim) and, where an ensemble needs them, ``old_vectors``
    (n, old_dim): unit rows as the encoders give them. Its output ``queries`` (n, old_dim) are unit rows in
    the old space. n may be any number from 1 on. The encoders themselves stay what they are.

    Args:
        model: A projection, or a compatible encoder with the ensemble it has.
        path: The file, such as ``query.onnx``; one that is there is replaced. ``query.json`` is written
            beside it: the contract, with names, dimensions and spaces, which the model's metadata hold too.
        modality: What the queries are: ``"text"`` or ``"image"``.
        ensemble: An ensemble for a projection that is given alone.

    Returns:
        The contract.

    Raises:
        ConfigError: If onnx, onnxruntime or onnxscript is not installed, an argument does not fit, or the
            ensemble was not made for the modality.
        XbtError: If the model that came out does not give what torch gives; nothing is written then.
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
            f"the map takes {model.side_dim}-d side information beside the vectors, which queries have not; "
            "run it with torch"
        )
    if ensemble is not None and ensemble.old_dim != model.old_dim:
        raise ConfigError(
            f"the ensemble combines {ensemble.old_dim}-d vectors, but the projection gives {model.old_dim}-d "
            "ones; export it with the projection that it was fitted to"
        )
    return model, ensemble


def _traced(graph: QueryGraph, projection: Projection, names: list[str]) -> Any:
    rows = torch.export.Dim("n", min=1, max=_MOST_ROWS)
    examples = example_inputs(graph, projection.new_dim, projection.old_dim, 3)
    with warnings.catch_warnings(), redirect_stdout(StringIO()), torch.no_grad():
        # What the exporter warns of and prints (torch 2.7 does, verbose or not) is its own insides; what it
        # makes is compared with torch afterwards.
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
    names = [each.name for each in session.get_inputs()]
    for rows in _ROWS:
        given = example_inputs(graph, projection.new_dim, projection.old_dim, rows)
        with torch.no_grad():
            wanted = graph(*given)
        feed = {name: each.numpy() for name, each in zip(names, given, strict=True)}
        got = torch.from_numpy(session.run(["queries"], feed)[0])
        apart = float((got - wanted).abs().max())
        if not apart <= TOLERANCE:
            raise XbtError(
                f"the ONNX model of a {projection.kind} projection differs from torch by {apart:.2g} on "
                f"{rows} rows; update onnx, onnxruntime and onnxscript, or serve with torch"
            )
