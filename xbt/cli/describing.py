"""Descriptions of stores and galleries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xbt.backfill.merge_file import MERGE
from xbt.index import Gallery
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore
from xbt.store.layout import read_record


def describe_store(store: EmbeddingStore) -> dict[str, Any]:
    """A store: where it is, how many vectors of what, and its columns."""
    return {
        "store": str(store.path),
        "items": len(store),
        "modality": store.modality,
        "dtype": store.dtype,
        "columns": store.columns,
        "bytes": size_of(store.path),
        **describe_space(store.space, store.dim),
    }


def describe_gallery(gallery: Gallery, path: Path) -> dict[str, Any]:
    """A gallery on disk: its parts, how far it is backfilled, its index, and how its parts are merged."""
    merge = path / MERGE
    return {
        "gallery": str(path),
        "items": len(gallery),
        "fraction_backfilled": gallery.fraction_backfilled,
        "index": gallery.plan.factory,
        "tuning": gallery.plan.tuning,
        "merge": read_record(merge).get("kind") if merge.is_file() else None,
        "bytes": size_of(path),
        "parts": [
            {
                "name": part.name,
                "items": part.count,
                "modality": part.modality,
                "dtype": part.dtype,
                **describe_space(part.space, part.dim),
            }
            for part in gallery.parts
        ],
    }


def describe_space(space: EmbeddingSpace | None, dim: int) -> dict[str, Any]:
    """The model that made vectors; unknown for a folder that clip-retrieval wrote."""
    model, revision = (None, None) if space is None else (space.model, space.revision)
    return {"dim": dim, "model": model, "revision": revision}


def size_of(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def as_text(about: dict[str, Any]) -> str:
    """A description for people: a line for each figure, and a block for each part."""
    plain = {name: value for name, value in about.items() if name != "parts"}
    blocks = [_lines(plain), *(_lines(part, "  ") for part in about.get("parts", ()))]
    return "\n".join(line for block in blocks for line in block)


def _lines(figures: dict[str, Any], indent: str = "") -> list[str]:
    width = max(map(len, figures))
    return [f"{indent}{name.ljust(width)}  {_shown(name, value)}" for name, value in figures.items()]


def _shown(name: str, value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    if name == "fraction_backfilled":
        return f"{100 * value:.1f} %"
    if name == "bytes":
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)
