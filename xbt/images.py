"""Reading of images, including formats that Pillow only reads with a plugin package or in a newer version."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Self

from PIL import Image, UnidentifiedImageError

from xbt.errors import DataError, ImageError

_HEAD = 16
"""Number of bytes at the start of a file that identify a plugin's format."""
ImageSource = Image.Image | str | os.PathLike[str] | bytes

MAX_PIXELS = 89_478_485
"""Maximum number of pixels, at which Pillow warns of decompression bombs; larger images are not decoded."""
MAX_ASPECT_RATIO = 100
"""Maximum ratio of the longer to the shorter side. A CLIP resizes the shorter side to a few hundred pixels,
which would make the longer side of a narrower image huge."""

_DEEP_MODES = ("I", "F")  # and I;16, I;16B, ...
_WORDS = {"1": "black and white", "L": "grayscale", "LA": "grayscale", "P": "palette", "PA": "palette"}
_SYSTEM_ERRORS = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.ETIMEDOUT,
    errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH,
)  # fmt: skip
_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]+://|https?:/|data:image/)", re.IGNORECASE)


@dataclass(frozen=True)
class Plugin:
    """Pillow plugin for an image format.

    Attributes:
        format: Name of the format.
        suffix: Usual suffix of its files.
        begins: Pattern of the first bytes of its files.
        module: Module of the plugin.
        package: Package that contains the module.
    """

    format: str
    suffix: str
    begins: re.Pattern[bytes]
    module: str
    package: str

    def load(self) -> bool:
        """Import the plugin if necessary and installed; return True if Pillow can then read the format."""
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
    """Return the plugin for a file that begins with these bytes; ``None`` if there is none."""
    return next((plugin for plugin in _PLUGINS if plugin.begins.match(head)), None)


@cache
def _load(plugin: Plugin) -> bool:
    if plugin.suffix not in Image.registered_extensions():
        try:
            module = import_module(plugin.module)
        except ImportError:
            return False
        if plugin.module == "pillow_heif":  # the others register themselves on import
            module.register_heif_opener()
    return plugin.suffix in Image.registered_extensions()


def is_url(text: str) -> bool:
    """Return True if a string that names an image is a URL; URLs are never fetched."""
    return _URL.match(text) is not None


class ListedPath(str):
    """A path with the folder it was listed from, to distinguish a missing file from an unmounted disk.

    A path that leaves the folder is refused, because names come from untrusted files.

    Attributes:
        root: The folder.
    """

    root: str

    def __new__(cls, path: str, root: str) -> Self:
        """Keep a path that already includes the root."""
        listed = super().__new__(cls, path)
        listed.root = root
        return listed

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # for pickling
        return str(self), self.root


class ReadImage(NamedTuple):
    """A decoded image, and a note of what was lost in the conversion.

    Attributes:
        image: RGB, completely decoded.
        note: The conversions and losses, such as ``"CMYK converted to RGB"`` or ``"first of 12 frames"``;
            ``None`` if the image was plain RGB.
    """

    image: Image.Image
    note: str | None


def read_image(source: ImageSource, name: str | None = None) -> ReadImage:
    """Decode one image completely, convert it to RGB, and note what the conversion changed.

    As in CLIP's own preprocessing, colour profiles and EXIF orientation are ignored, transparency is dropped
    rather than blended, and only the first of several frames is used.

    Args:
        source: A PIL image, a path, or the bytes of an encoded image.
        name: Name of the image in error messages; the path by default.

    Returns:
        The RGB image and the note.

    Raises:
        ImageError: If the file is missing, not a regular file, unreadable, empty, truncated or not an image.
            If it is a URL, or a listed path that leaves its folder. If it has more than :data:`MAX_PIXELS`
            pixels, an aspect ratio above :data:`MAX_ASPECT_RATIO`, or more than 8 bits per pixel in one
            channel (the conversion would clip these). Any other error of a decoder also becomes an
            ImageError.
        DataError: If the system, not the image, is at fault: a disk or network fails, memory or file handles
            run out, or the folder that the image was listed from is gone.
    """
    label = _label(source, name)
    try:
        with _caught_warnings() as caught, _open(source) as opened:
            _check_size(opened)
            notes = _conversions(opened)
            opened.load()
            _check_size(opened)  # an icon's header may give another size than the image in it
            image = opened.convert("RGB")
            notes += _dropped_frames(opened)
    except ImageError as error:
        raise ImageError(f"image {label} cannot be decoded: it {error}") from None
    except FileNotFoundError as error:
        _require_folder(source, label, error)
        raise ImageError(f"image {label} does not exist") from error
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise ImageError(f"image {label} cannot be decoded: it is in no format that Pillow reads") from error
    except Exception as error:  # decoders raise struct.error, EOFError, OverflowError, ...
        blame_the_system(error, f"image {label}")
        raise ImageError(f"image {label} cannot be decoded: {_one_line(error)}") from error
    notes += caught
    return ReadImage(image, "; ".join(dict.fromkeys(notes)) or None)


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Decode one image completely and convert it to RGB: :func:`read_image` without the note."""
    return read_image(source, name).image


@contextmanager
def _caught_warnings() -> Iterator[list[str]]:
    """Collect Pillow's warnings in the yielded list, which is complete when the context ends."""
    texts: list[str] = []
    # Catching warnings changes global state: in several threads at once, it would swallow other warnings.
    if threading.current_thread() is not threading.main_thread():
        yield texts
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            # _check_size already covers the decompression-bomb warning; all others belong in the note.
            texts += [_one_line(warning.message) for warning in caught]


def _label(source: ImageSource, name: str | None) -> str:
    if name is not None:
        return name
    if isinstance(source, Image.Image):
        return "given as a PIL image"
    if isinstance(source, bytes):
        return f"given as {len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    raise ImageError(f"an image must be a PIL image, a path or bytes, got a {type(source).__name__}")


def _open(source: ImageSource) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, bytes):
        if not source:
            raise ImageError("is empty: it has zero bytes")
        return _identify(io.BytesIO(source))
    _require_path(source)
    status = os.stat(source)  # noqa: PTH116 - avoid a Path per image, of which there may be millions
    # Opening a FIFO may wait forever for a writer; reading a device may never end.
    if not stat.S_ISREG(status.st_mode):
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
        raise ImageError(f"is a {kind}, not a file")
    if not status.st_size:
        raise ImageError("is empty: it has zero bytes")
    return _identify(Path(source))


def _require_path(source: str | os.PathLike[str]) -> None:
    path = os.fspath(source)
    if is_url(path):
        raise ImageError("is a URL, which is not fetched; download it first, for example with img2dataset")
    # Fast path: almost every path visibly starts with its folder.
    if isinstance(source, ListedPath) and (".." in path or not path.startswith(f"{source.root}/")):
        root = os.path.abspath(source.root)  # noqa: PTH100
        if os.path.commonpath([root, os.path.abspath(path)]) != root:  # noqa: PTH100
            raise ImageError(f"lies outside of the folder {root}; set image_root to one that holds it")


def _identify(source: Path | io.BytesIO) -> Image.Image:
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        head = source.getvalue()[:_HEAD] if isinstance(source, io.BytesIO) else _first_bytes(source)
        plugin = plugin_for(head)
        if plugin is None:
            raise
        if not plugin.load():
            raise ImageError(
                f"is {plugin.format}, and there is no decoder for {plugin.suffix}; install {plugin.package}"
            ) from None
        return Image.open(source)


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _check_size(opened: Image.Image) -> None:
    """Check the header before anything is decoded."""
    if opened.format == "EPS":
        raise ImageError("is PostScript, which is a program and is never run; convert it to PNG")
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width} x {height} pixels, more than the {MAX_PIXELS} that are accepted")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"has {width} x {height} pixels; its longer side must not exceed {MAX_ASPECT_RATIO} times the "
            "shorter one"
        )


def _conversions(opened: Image.Image) -> list[str]:
    """List the changes that ``convert("RGB")`` will make."""
    mode = opened.mode
    if mode.split(";")[0] in _DEEP_MODES:
        raise ImageError(
            f"has more than 8 bits per pixel (mode {mode}), which converting to RGB would clip; convert it "
            "to 8 bits"
        )
    notes = []
    # Pillow keeps 16 bits only in single-channel images; otherwise it silently drops the lower 8 bits.
    if any(";16" in str(tile) for tile in getattr(opened, "tile", [])):
        notes.append("16 bits per channel reduced to 8")
    if mode not in ("RGB", "RGBA", "RGBa", "RGBX"):
        notes.append(f"{_WORDS.get(mode, mode)} converted to RGB")
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in opened.info:
        notes.append("transparency dropped")
    return notes


def _dropped_frames(opened: Image.Image) -> list[str]:
    try:
        frames = getattr(opened, "n_frames", 1)
    except Exception:  # the first frame is intact, but a later one is damaged
        return ["first of several frames"]
    return [f"first of {frames} frames"] if frames > 1 else []


def blame_the_system(error: Exception, what: str) -> None:
    """Raise if an error was caused by the system, so that the image is not recorded as rejected for good.

    Args:
        error: The error of reading or preprocessing.
        what: Name of the input, such as ``"image a.png"``.

    Raises:
        DataError: If the system, not the image, caused the error.
    """
    # Torch raises a RuntimeError when memory runs out.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        raise DataError(
            f"{what} cannot be read: memory ran out; free some, or use fewer workers or smaller batches, "
            "and run the same command again"
        ) from error
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        raise DataError(
            f"{what} cannot be read: {error.strerror}, an error of the system, not of the image; fix that, "
            "or remove the image if it is the only one affected, and run the same command again"
        ) from error


def _require_folder(source: ImageSource, label: str, error: FileNotFoundError) -> None:
    if isinstance(source, Image.Image | bytes):
        return
    listed = isinstance(source, ListedPath)
    folder = source.root if isinstance(source, ListedPath) else os.path.dirname(source) or "."  # noqa: PTH120
    try:
        with os.scandir(folder) as entries:
            # An unmounted disk leaves an empty folder, but the folder had entries when it was listed.
            if not listed or next(entries, None) is not None:
                return
    except PermissionError:
        return
    except OSError:
        pass
    raise DataError(
        f"image {label} cannot be read: the folder {os.fspath(folder)} is gone or empty; put it back and "
        "run the same command again"
    ) from error


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if not isinstance(error, OSError | Warning) else text
