"""Exports for other systems: files and SQL for vector databases, ONNX for query encoders without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xbt.serve.export import PgvectorTable as PgvectorTable
    from xbt.serve.export import export_interchange as export_interchange
    from xbt.serve.export import export_pgvector as export_pgvector
    from xbt.serve.onnx import export_onnx as export_onnx

# Loaded at first use: each needs other optional packages.
_MODULES = {
    "PgvectorTable": "xbt.serve.export",
    "export_interchange": "xbt.serve.export",
    "export_onnx": "xbt.serve.onnx",
    "export_pgvector": "xbt.serve.export",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'xbt.serve' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
