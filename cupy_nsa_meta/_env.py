"""Environment variables of the package, read at each call.

``os.environ.get`` costs 0.4 us because it encodes the key and decodes the value; the calls here are
a few microseconds long, so the underlying mapping of bytes is read where the platform has one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

BACKENDS = ("auto", "cuda", "triton", "python")

_raw: Mapping[bytes, bytes] | None = getattr(os.environ, "_data", None)
if not isinstance(_raw, dict) or os.name != "posix":
    _raw = None


def _read(key: bytes) -> bytes | None:
    value = os.environ.get(key.decode())
    return None if value is None else os.fsencode(value)


def backend() -> str:
    """``CUPY_NSA_META_BACKEND``: which backend the choosing functions take; default ``auto``."""
    key = b"CUPY_NSA_META_BACKEND"
    value = _raw.get(key) if _raw is not None else _read(key)
    if not value:
        return "auto"
    name = os.fsdecode(value)
    if name not in BACKENDS:
        raise ValueError(
            f"CUPY_NSA_META_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}"
        )
    return name


def debug_sync() -> bool:
    """``CUPY_NSA_META_DEBUG_SYNC=1``: every call reads its status and raises."""
    key = b"CUPY_NSA_META_DEBUG_SYNC"
    value = _raw.get(key) if _raw is not None else _read(key)
    return value is not None and value not in (b"", b"0")


def graph_cache() -> bool:
    """``CUPY_NSA_META_GRAPH_CACHE=0``: the drop-in call captures and reuses no launches."""
    key = b"CUPY_NSA_META_GRAPH_CACHE"
    return (_raw.get(key) if _raw is not None else _read(key)) != b"0"


SGLANG_VALUES = ("0", "1", "force")


def sglang() -> str:
    """``CUPY_NSA_META_SGLANG``: what the plugin for SGLang does; default ``0``, nothing."""
    value = os.environ.get("CUPY_NSA_META_SGLANG") or "0"
    if value not in SGLANG_VALUES:
        raise ValueError(
            f"CUPY_NSA_META_SGLANG: expected one of {', '.join(SGLANG_VALUES)}, got {value!r}"
        )
    return value
