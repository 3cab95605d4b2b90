"""Elements of a page. Text is escaped when the tree is written, so that no caption can become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

Child = Element | str

_LESS = "\ue000"
"""Stands for < in attributes until the tree is written: ElementTree leaves it as it is there."""
_NOT_IN_HTML = re.compile("[\ue000\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: Child, **attributes: str) -> Element:
    """An element with text and elements in it.

    Args:
        tag: Its name.
        *children: In order.
        **attributes: A trailing underscore is dropped (``class_``), others become hyphens (``aria_label``).
    """
    made = Element(
        tag, {_attribute(key): _clean(value).replace("<", _LESS) for key, value in attributes.items()}
    )
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + _clean(child)
        else:
            made.text = (made.text or "") + _clean(child)
    return made


def to_html(root: Element) -> str:
    """The whole page as text."""
    written: str = tostring(root, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{written.replace(_LESS, '&lt;')}\n"


def scrolling_table(heads: Sequence[str], rows: Iterable[Sequence[Child]], caption: str) -> Element:
    """A table in a box of its own, which scrolls where it is wider than the page.

    Args:
        heads: Of the columns; the first names the rows.
        rows: As many values each.
        caption: What the table shows, above it.
    """
    head = element("tr", *(element("th", each, scope="col") for each in heads))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", each) for each in row[1:]))
        for row in rows
    ]
    table = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def listed(items: Iterable[Child]) -> Element:
    """A list with bullets."""
    return element("ul", *(element("li", each) for each in items))


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _clean(text: str) -> str:
    return _NOT_IN_HTML.sub("\ufffd", text)
