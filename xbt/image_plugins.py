"""Image formats that Pillow reads only where another package, or a newer Pillow, helps it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from PIL import Image

HEAD = 16
"""Bytes at the beginning of a file that tell these formats."""


@dataclass(frozen=True)
class Plugin:
    """What it takes to read a format.

    Attributes:
        format: Its name.
        suffix: Its usual suffix.
        begins: What its files begin with.
        module: The module that teaches Pillow to read it.
        package: How to install that.
    """

    format: str
    suffix: str
    begins: re.Pattern[bytes]
    module: str
    package: str

    def load(self) -> bool:
        """Whether Pillow reads the format, once the module has been imported where there is one."""
        return _load(self)


_PLUGINS = (
    Plugin("AVIF", ".avif", re.compile(rb"....ftypavi[fs]", re.DOTALL), "pillow_avif", "pillow-avif-plugin"),
    Plugin(
        "HEIC",
        ".heic",
        re.compile(rb"....ftyp(he[iv][cxms]|mif1|msf1)", re.DOTALL),
        "pillow_heif",
        "pillow-heif",
    ),
    Plugin("JPEG XL", ".jxl", re.compile(rb"\xff\n|\0\0\0\x0cJXL "), "pillow_jxl", "pillow-jxl-plugin"),
)


def plugin_for(head: bytes) -> Plugin | None:
    """The plugin for what begins with these bytes; ``None`` for what no plugin makes readable."""
    return next((plugin for plugin in _PLUGINS if plugin.begins.match(head)), None)


@cache
def _load(plugin: Plugin) -> bool:
    if plugin.suffix not in Image.registered_extensions():
        try:
            module = import_module(plugin.module)
        except ImportError:
            return False
        if plugin.module == "pillow_heif":  # the others register themselves when they are imported
            module.register_heif_opener()
    return plugin.suffix in Image.registered_extensions()
