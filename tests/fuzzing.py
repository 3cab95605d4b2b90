"""Strategies and a runner for fuzzed tests of loaders: a loader raises an ``XbtError``, or nothing.

The suite tries a few dozen inputs a loader, always the same ones; ``make test-fuzz`` tries thousands.
"""

from __future__ import annotations

import copy as copy_of
import json
import os
import resource
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from xbt.errors import XbtError

EXAMPLES = int(os.environ.get("XBT_FUZZ_EXAMPLES", "25"))
MAX_SECONDS = 10.0  # of processor time, so that a busy machine is no failure
MAX_EXTRA_BYTES = 1 << 30


def fuzzed_in(variants: int) -> settings:
    """Decorator for one of several variants of a fuzzed test, which together give a loader its inputs."""
    return settings(
        max_examples=-(-EXAMPLES // variants),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


fuzzed = fuzzed_in(1)
"""Decorator for a fuzzed test: bounded, seeded, without a time limit that depends on the machine."""

ODD_STRINGS = [
    *("", " ", "\n", "\x00", "NaN", "../../outside", "/dev/zero"),
    *("\ud83d", "\u202e", "\u00e9", "e\u0301", "a" * 5_000),
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.0, float("nan"), float("inf")),
    *([], {}, [[]], [None], {"": {}}),
]


def odd_values() -> st.SearchStrategy[Any]:
    """JSON values that nobody expects in a place: of another type, out of range, deeply nested."""
    deep = st.integers(1, 3_000).map(_nested)
    return st.one_of(st.sampled_from(ODD_VALUES), st.sampled_from(ODD_STRINGS), st.text(max_size=20), deep)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """Variants of a file: bits flipped, cut short, bytes inserted, removed, repeated or zeroed."""
    edit = st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "remove", "repeat", "zero"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 64),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edited(data, edits))


def damaged_json(value: Any) -> st.SearchStrategy[Any]:
    """Variants of a JSON document: nodes replaced by odd values, removed or renamed."""
    edit = st.tuples(st.integers(0, 10_000), st.sampled_from(["replace", "remove", "rename"]), odd_values())
    return st.lists(edit, min_size=1, max_size=3).map(lambda edits: _edited_json(value, edits))


def dump(value: Any) -> bytes:
    """JSON as bytes; also of what is no JSON by the standard (NaN, surrogates), and of deep nesting."""
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def loads_or_refuses(load: Callable[[], Any], size: int = 0) -> Any:
    """Runs a loader, which may raise an ``XbtError`` and nothing else, and must end soon in little memory.

    Args:
        load: The call.
        size: Bytes of the file, which do not count as extra memory.

    Returns:
        What the loader returned; ``None`` where it refused.
    """
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        return load()
    except XbtError:
        return None
    finally:
        seconds = time.process_time() - start
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        assert seconds < MAX_SECONDS, f"took {seconds:.1f} s of processor time"
        assert extra < MAX_EXTRA_BYTES + size, f"took {extra / 2**20:.0f} MiB more memory"


def _edited(data: bytes, edits: list[tuple[str, float, int, int]]) -> bytes:
    for kind, place, value, length in edits:
        at = int(place * max(len(data), 1))
        end = at + length
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + bytes([value]) * length + data[at:]
        elif kind == "remove":
            data = data[:at] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[at:]
        else:
            data = data[:at] + bytes(min(length, len(data) - at)) + data[end:]
    return data


def _edited_json(value: Any, edits: list[tuple[int, str, Any]]) -> Any:
    value = json.loads(json.dumps(value))
    for number, kind, other in edits:
        places = _places(value)
        if not places:
            return _copied(other)
        holder, key = places[number % len(places)]
        if kind == "replace":
            holder[key] = _copied(other)  # a value that came in twice would hold itself
        elif isinstance(holder, dict) and kind == "rename":
            holder[f"{key}_"] = holder.pop(key)
        else:
            del holder[key]
    return value


def _copied(value: Any) -> Any:
    """A copy without recursion, which deep nesting would exceed."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    copy = copy_of.deepcopy(value)
    for _ in range(depth):
        copy = [copy]
    return copy


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document, outermost first."""
    found: list[tuple[Any, Any]] = []
    queue = deque([value])
    while queue:
        node = queue.popleft()
        if isinstance(node, dict):
            keys: list[Any] = list(node)
        elif isinstance(node, list):
            keys = list(range(len(node)))
        else:
            continue
        found += [(node, key) for key in keys]
        queue += [node[key] for key in keys]
    return found


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value
