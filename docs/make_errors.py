"""Writes docs/errors.md: every error that xbt raises on purpose and every warning, from the source itself.

    python docs/make_errors.py            # writes docs/errors.md
    python docs/make_errors.py --check    # exits with status 1 if it is out of date

The source is parsed and never imported. Line numbers are left out on purpose: the page changes when a message
does, not when a line moves.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
BASE = "XbtError"
WARN = "warnings.warn"
Function = ast.FunctionDef | ast.AsyncFunctionDef
Owners = list[ast.ClassDef | Function]
Names = dict[str, ast.expr]
TEXTS = ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp

INTRODUCTION = """# Every error and warning

Written by `docs/make_errors.py` from the source; do not edit it. What stands between braces is filled in
when the error is raised. Search this page for the words of your message that name no value of yours.

Recipes print `<recipe>: error: <message>` and end with status 2. In Python, catch `xbt.XbtError` (a
`ValueError`), or one of its kinds. Most messages say what to do; [troubleshooting.md](troubleshooting.md) has
what happens without any message.
"""


@dataclass(frozen=True)
class Entry:
    """One place that raises an error or warns."""

    kind: str
    message: str
    place: str
    when: str


def error_kinds(trees: dict[Path, ast.Module]) -> dict[str, str]:
    """Names of the package's error classes and what their docstrings say, base first."""
    classes = {n.name: n for tree in trees.values() for n in tree.body if isinstance(n, ast.ClassDef)}
    kinds = {BASE: _summary(classes[BASE])}
    grown = True
    while grown:
        grown = False
        for name, node in classes.items():
            if name not in kinds and any(isinstance(b, ast.Name) and b.id in kinds for b in node.bases):
                kinds[name], grown = _summary(node), True
    return kinds


def _summary(node: ast.ClassDef | Function) -> str:
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def entries_of(path: Path, tree: ast.Module, kinds: set[str]) -> Iterator[Entry]:
    """The errors and warnings of one file, in its order."""
    module = path.relative_to(ROOT).as_posix()
    yield from _walk(tree, kinds, module, [], _assigned(tree))


def _walk(
    node: ast.AST,
    kinds: set[str],
    module: str,
    owners: list[ast.ClassDef | Function],
    names: dict[str, ast.expr],
) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        inner, known = owners, names
        if isinstance(child, Function):
            inner, known = [*owners, child], names | _assigned(child)
        elif isinstance(child, ast.ClassDef):
            inner = [*owners, child]
        if isinstance(child, ast.Call) and (kind := _called(child)) and (kind in kinds or kind == WARN):
            place = f"{module}: {'.'.join(o.name for o in inner)}" if inner else module
            shown = "warning" if kind == WARN else kind
            message = _text(child.args[0], known)
            if re.search(r"\w \w", re.sub(r"\{.*?\}", "", message)):  # else another error's text, passed on
                yield Entry(shown, message, place, _when(inner, kind))
        yield from _walk(child, kinds, module, inner, known)


def _called(call: ast.Call) -> str:
    """The name of what is called with a message, if it may be an error or a warning."""
    if not call.args:
        return ""
    if isinstance(call.func, ast.Name):
        return call.func.id
    return WARN if ast.unparse(call.func) == WARN else ""


def _assigned(scope: ast.AST) -> Names:
    """What the names of a scope are bound to, where that is a text."""
    return {
        target.id: node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, TEXTS)
    }  # fmt: skip


def _text(node: ast.expr, names: Names, depth: int = 0) -> str:
    """A message with its values between braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, names, depth) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names, depth) + _text(node.right, names, depth)
    if isinstance(node, ast.IfExp):
        return f"[{_text(node.body, names, depth)} | {_text(node.orelse, names, depth)}]"
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.IfExp):
        return _text(value, names, depth)
    if isinstance(value, ast.Name) and value.id in names and depth < 2:
        return _text(names[value.id], names, depth + 1)
    return "{" + re.sub(r"\s+", " ", ast.unparse(value)) + "}"


def _when(owners: Owners, kind: str) -> str:
    """What the Raises section of the nearest docstring says of this kind, without its markup."""
    for owner in reversed(owners):
        said = ast.get_docstring(owner) or ""
        section = re.search(r"^Raises:\n(.*?)(?:\n\S|\Z)", said, re.S | re.M)
        for line in re.split(r"\n    (?=\S)", section[1].strip("\n")) if section else []:
            names, _, meaning = line.strip().partition(":")
            if kind in re.split(r",\s*", names):
                return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`|``(.*?)``", r"\1\2", " ".join(meaning.split()))
    return ""


def _cell(text: str) -> str:
    """Text for a table's cell, in which nothing is Markdown."""
    text = " ".join(text.split()).replace("|", "¦")
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", text)


def make_page() -> str:
    """The page."""
    files = sorted((ROOT / "xbt").rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    kinds = error_kinds(trees)
    lines = [INTRODUCTION, "| kind | means |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in kinds.items()]
    rooms: dict[str, list[Entry]] = {}
    for path, tree in trees.items():
        room = path.relative_to(ROOT / "xbt").parts[0].removesuffix(".py")
        rooms.setdefault(room, []).extend(entries_of(path, tree, set(kinds)))
    for room, entries in sorted(rooms.items()):
        if not entries:
            continue
        lines += ["", f"## {room}", "", "| message | kind | where | when |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(each.message)} | {each.kind} | {_cell(each.place)} | {_cell(each.when)} |"
            for each in dict.fromkeys(entries)
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description="Writes docs/errors.md from the source.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    page = make_page()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit("docs/errors.md is out of date; write it anew: python docs/make_errors.py")


if __name__ == "__main__":
    main()
