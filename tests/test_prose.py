"""The project's words: plain English in names, docstrings, comments, messages and pages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = [
    path
    for folder in ("xbt", "recipes", "notebooks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__)
]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BANNED = re.compile(
    r"\b(mend(?:s|ed|ing)?|told|stands|anew|reckon(?:s|ed|ing)?|shall|desks?|homes?|books?|paces?|paced"
    r"|settle(?:s|d)?|settling|houses?|floors?|rooms?|born compatible)\b",
    re.IGNORECASE,
)
ALLOWED = re.compile(
    r"(?:math|np|torch)\.floor|floor_divide|Path\.home|/home/|HF_(?:CACHE_)?HOME|['\"]HOME['\"]"
    r"|\bhome (?:page|directory)\b"
)
OPENERS = {"What", "Whether", "How", "Where", "Who", "Whose", "Which"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def banned_words(text: str) -> list[str]:
    """Banned words, also as parts of names such as ``settle_scores`` and ``HomePage``."""
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", ALLOWED.sub("", text)).replace("_", " ")
    return BANNED.findall(split)


def test_code_uses_the_words_of_the_field():
    found = []
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        if not banned_words(text):  # most files, and tokens take long
            continue
        code = io.StringIO(text)
        before = ["", ""]
        for token in tokenize.generate_tokens(code.readline):
            if token.type in (tokenize.NAME, tokenize.COMMENT, tokenize.STRING):
                place = f"{path.relative_to(ROOT)}:{token.start[0]}"
                qualified = "".join([*before, token.string]) if before[1] == "." else token.string
                found += [f"{place}: {word}" for word in banned_words(qualified)]
            before = [before[1], token.string]
    assert not found, "\n".join(found)


def test_pages_use_the_words_of_the_field():
    found = []
    for path in PAGES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in banned_words(line)]
    assert not found, "\n".join(found)


def test_docstrings_open_with_a_verb_or_a_noun():
    found = []
    for path in CODE:
        if not path.is_relative_to(ROOT / "xbt"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if docstring and docstring.split()[0] in OPENERS:
                place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                found.append(f"{place}: {docstring.splitlines()[0]}")
    assert not found, "\n".join(found)


def test_the_words_are_found_in_names_too():
    assert banned_words("settle_scores HomePage the ROOM_SIZE of a bookshelf") == ["settle", "Home", "ROOM"]
