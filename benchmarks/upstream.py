"""SGLang's own functions, from its files: of an installed SGLang, or of an unpacked one.

A file is executed by itself, so that its functions run where the rest of SGLang and its
dependencies are missing. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType

from .measure import Absent

SOURCE_VARIABLE = "CUPY_NSA_META_SGLANG_SOURCE"  # a folder that holds sglang/
VERSION = "0.5.23"  # whose fused functions are compared
METADATA = "sglang.kernels.ops.attention.dsa.metadata"


def folder() -> Path:
    """The folder that holds ``sglang/``.

    Raises:
        Absent: there is none.
    """
    given = os.environ.get(SOURCE_VARIABLE)
    if given:
        if not Path(given, "sglang").is_dir():
            raise Absent(f"{SOURCE_VARIABLE}: expected a folder with sglang/ in it, got {given}")
        return Path(given)
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        raise Absent(f"sglang is not installed, and {SOURCE_VARIABLE} names no unpacked one")
    return Path(next(iter(found.submodule_search_locations))).parent


def version(source: Path) -> str | None:
    """What ``sglang/_version.py`` says."""
    names: dict[str, str] = {}
    path = source / "sglang" / "_version.py"
    if path.is_file():
        exec(path.read_text(encoding="utf-8"), names)
    return names.get("__version__")


def module(name: str) -> ModuleType:
    """A module of SGLang by its full name, one object for each file."""
    path = folder().joinpath(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        raise Absent(f"this sglang has no {name}")
    return _executed(name, path)


@cache  # Triton's compiled kernels belong to the module's objects
def _executed(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    executed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(executed)
    return executed


def fused_metadata() -> ModuleType:
    """The module of ``fused_dsa_*_metadata``, of the version that is compared."""
    found = version(folder())
    if found != VERSION:
        raise Absent(f"SGLang {VERSION} is compared, this one is {found or 'of no known version'}")
    return module(METADATA)
