"""Environment variables of the package, read at each call.

``os.environ.get`` costs 0.4 us because it encodes the key and decodes the value, and the calls here
are a few microseconds long: the underlying mapping of bytes, where the platform has one, tells what
is not set. ``DEBUG_SYNC in variables`` may even stand before the call of ``debug_sync``.
"""

from __future__ import annotations

import os
from collections.abc import Container

BACKENDS = ("auto", "cuda", "triton", "python")
BACKEND = b"CUPY_NSA_META_BACKEND"
DEBUG_SYNC = b"CUPY_NSA_META_DEBUG_SYNC"
GRAPH_CACHE = b"CUPY_NSA_META_GRAPH_CACHE"


class _Everything:
    """Contains every name, so that each variable is read."""

    def __contains__(self, name: object) -> bool:
        return True


def _names() -> Container[bytes]:
    mapping = getattr(os.environ, "_data", None)
    return mapping if isinstance(mapping, dict) and os.name == "posix" else _Everything()


#: The names of the variables that are set, or of more.
variables = _names()


def backend() -> str:
    """``CUPY_NSA_META_BACKEND``: which backend the choosing functions take; default ``auto``."""
    if BACKEND not in variables:
        return "auto"
    name = os.environ.get("CUPY_NSA_META_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(
            f"CUPY_NSA_META_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}"
        )
    return name


def debug_sync() -> bool:
    """``CUPY_NSA_META_DEBUG_SYNC=1``: every call reads its status and raises."""
    if DEBUG_SYNC not in variables:
        return False
    return os.environ.get("CUPY_NSA_META_DEBUG_SYNC", "0") not in ("", "0")


def graph_cache() -> bool:
    """``CUPY_NSA_META_GRAPH_CACHE=0``: the drop-in call captures and reuses no launches."""
    return GRAPH_CACHE not in variables or os.environ.get("CUPY_NSA_META_GRAPH_CACHE") != "0"


SGLANG_VALUES = ("0", "1", "force")


def sglang() -> str:
    """``CUPY_NSA_META_SGLANG``: what the plugin for SGLang does; default ``0``, nothing."""
    value = os.environ.get("CUPY_NSA_META_SGLANG") or "0"
    if value not in SGLANG_VALUES:
        raise ValueError(
            f"CUPY_NSA_META_SGLANG: expected one of {', '.join(SGLANG_VALUES)}, got {value!r}"
        )
    return value
