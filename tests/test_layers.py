"""Layers of the package: a file imports only from lower layers, and few packages may import a backend."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "xbt"
LAYERS = [
    {
        "batches",
        "config",
        "config_files",
        "errors",
        "files",
        "hub",
        "images",
        "losses",
        "optional",
        "processes",
        "run_dir",
        "space",
        "store",
        "vectors",
        "version",
    },
    {"encoders", "data", "heads"},
    {"evaluation", "embedding", "backbones"},
    {"projections"},
    {"compatible", "index"},
    {"training", "serve", "backfill", "evaluation.job"},
    {"report"},
    {"demo", "cli"},
    {"__main__"},
]
BACKENDS = {
    "open_clip": {"encoders"},
    "transformers": {"encoders"},
    "peft": {"encoders", "training"},
    "faiss": {"index"},
    "accelerate": {"processes", "training", "embedding", "backfill"},
    "datasets": {"data"},
    "timm": {"backbones"},
    "torchvision": {"backbones"},
    "matplotlib": {"report"},
    "qdrant_client": {"index"},
    "onnx": {"serve"},
    "onnxruntime": {"serve"},
    "onnxscript": {"serve"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def package_of(path: Path) -> str:
    return layered_name(list(path.relative_to(PACKAGE).with_suffix("").parts))


def layered_name(parts: list[str]) -> str:
    """The name under which a module is listed: ``evaluation.job`` has a layer of its own."""
    full = ".".join(parts[:2])
    return full if any(full in packages for packages in LAYERS) else parts[0]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return modules


def layer(name: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if name in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lower_layers(path):
    package = package_of(path)
    for module in imported_modules(path):
        parts = module.split(".")
        imported = layered_name(parts[1:]) if parts[0] == "xbt" and len(parts) > 1 else package
        if imported != package:
            is_lower = layer(imported) < layer(package) or layer(imported) == layer(package) == 0
            assert is_lower, f"{path.name} of {package} imports {module}"
        assert package in BACKENDS.get(parts[0], {package}), f"{path.name} of {package} imports {module}"


def test_import_is_quick_and_faiss_lazy():
    code = (
        "import sys, xbt; heavy = {'torch', 'faiss', 'open_clip', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; import xbt.index; assert 'faiss' not in sys.modules; "
        "assert set(xbt.__all__) <= set(dir(xbt))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    import xbt

    assert all(getattr(xbt, name) is not None for name in xbt.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = xbt.nothing_such
