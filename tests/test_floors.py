"""The floors of the house: a file imports only from below, and each backend has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "xbt"
FLOORS = [
    {
        "errors",
        "version",
        "config",
        "config_files",
        "run_dir",
        "images",
        "image_plugins",
        "vectors",
        "hub",
        "probe",
        "space",
        "store",
        "batches",
        "bench",
        "losses",
        "optional",
    },
    {"encoders", "data", "heads"},
    {"evaluation", "embedding", "backbones"},
    {"projections"},
    {"compatible", "index"},
    {"training", "serve", "backfill", "evaluation_job", "sharing"},
    {"report"},
    {"demo", "cli"},
    {"__main__"},
]
HOMES = {
    "open_clip": {"encoders"},
    "transformers": {"encoders"},
    "peft": {"encoders"},
    "faiss": {"index"},
    "accelerate": {"training", "embedding", "backfill"},
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


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_below(path):
    own = room(path)
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "xbt" and len(parts) > 1 and parts[1] != own:
            below = floor(parts[1]) < floor(own) or (floor(own) == 0 and floor(parts[1]) == 0)
            assert below, f"{path.name} of {own} imports {module}"
        assert own in HOMES.get(parts[0], {own}), f"{path.name} of {own} imports {module}"


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
