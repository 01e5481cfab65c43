"""The fused family in the place of SGLang's own metadata functions.

``install()`` replaces SGLang's functions in this process. SGLang's workers are spawned processes,
so the wheel also declares ``plugin`` in SGLang's entry-point group ``sglang.srt.plugins``, which
every worker loads; it installs only under ``CUPY_NSA_META_SGLANG=1`` (or ``force``).
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from .. import _env, _module, dispatch, fused

#: Versions whose files the tests have been run against.
KNOWN_VERSIONS = ("0.5.23",)

_METADATA = "sglang.kernels.ops.attention.dsa.metadata"
_PAD = "sglang.kernels.ops.attention.pad"

#: SGLang's name of a function -> the module that defines it, and ours.
REPLACEMENTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "fused_dsa_decode_metadata": (_METADATA, fused.fused_dsa_decode_metadata),
    "fused_dsa_target_verify_metadata": (_METADATA, fused.fused_dsa_target_verify_metadata),
    "fused_dsa_draft_extend_metadata": (_METADATA, fused.fused_dsa_draft_extend_metadata),
    "seqlens_expand_triton": (_PAD, fused.seqlens_expand),
}

#: SGLang's functions, while ours are in their place.
_originals: dict[str, Callable[..., Any]] = {}
#: SGLang's functions as of the last install(), kept for status().
_last_originals: dict[str, Callable[..., Any]] = {}


def install(*, force: bool = False, warm: bool = True) -> None:
    """Put our functions in the place of SGLang's, in every module of SGLang that holds them.

    Replaced are ``fused_dsa_decode_metadata``, ``fused_dsa_target_verify_metadata``,
    ``fused_dsa_draft_extend_metadata`` and ``seqlens_expand_triton``, in the modules that define
    them, so also for modules imported later, and in the modules of SGLang that imported them
    before. The kpool variants stay SGLang's. An attention backend that already exists keeps what it
    took when it was built (``status``), so install before the engine starts. A second call changes
    nothing but to look for new holders.

    Args:
        force: also for a version of SGLang that is not in ``KNOWN_VERSIONS``.
        warm: compile and load everything for the current CUDA device now (``warmup``), where torch
            sees one; else the first call does.

    Raises:
        ImportError: SGLang is not installed, or has no such functions.
        RuntimeError: an unknown version without ``force``; SGLang's functions take arguments that
            ours do not know; torch sees a CUDA device, but our kernels cannot run. Nothing has been
            replaced then.

    Stream: none; waits for the device where it warms up.
    """
    version = _require_sglang()
    if version not in KNOWN_VERSIONS and not force:
        raise RuntimeError(
            f"sglang: expected version {' or '.join(KNOWN_VERSIONS)}, got {version}; "
            "install(force=True) or CUPY_NSA_META_SGLANG=force takes it as it is"
        )
    found = {name: _defined(name, module) for name, (module, _) in REPLACEMENTS.items()}
    for name, theirs in found.items():
        ours = REPLACEMENTS[name][1]
        if theirs is not ours:
            _check_parameters(name, theirs, ours, version)
    if torch.cuda.is_available() and _env.backend() in ("auto", "cuda"):
        _module.import_cupy()  # without it, CUDA tensors would go to plain torch
        if warm:
            dispatch.warmup()
    for name, theirs in found.items():
        ours = REPLACEMENTS[name][1]
        if theirs is not ours:
            _originals[name] = _last_originals[name] = theirs
        if name in _originals:
            _replace(_originals[name], ours)


def uninstall() -> None:
    """Give SGLang its functions back, in every module of SGLang that holds ours.

    Without an ``install`` before it, nothing happens. An attention backend that was built in the
    meantime keeps ours (``status``).
    """
    for name, theirs in _originals.items():
        _replace(REPLACEMENTS[name][1], theirs)
    _originals.clear()


def status() -> dict[str, Any]:
    """What is in force in this process.

    Returns:
        ``installed`` (bool); ``sglang_version`` (None: not imported here); ``functions``: for each
        name, ``"cupy_nsa_meta"`` or ``"sglang"`` (None: its module is not imported); ``modules``:
        for each name, the modules of SGLang that hold ours; ``devices``: for each CUDA device that
        ours have been called on, ``"CUDA C++"``, or why our kernels cannot run there, so that plain
        torch does; ``built_before``: objects of SGLang, such as attention backends, that hold a
        function from before the last ``install`` or ``uninstall``, each with the names of the
        attributes.

    Walks over all objects of the process: for a look, not for a loop.
    """
    functions: dict[str, str | None] = {}
    modules: dict[str, list[str]] = {}
    for name, (defining, ours) in REPLACEMENTS.items():
        held = getattr(sys.modules.get(defining), name, None)
        functions[name] = None if held is None else "cupy_nsa_meta" if held is ours else "sglang"
        modules[name] = sorted({module.__name__ for module, _ in _holders(ours)})
    sglang = sys.modules.get("sglang")
    outdated = (
        list(_originals.values())
        if _originals
        else [REPLACEMENTS[name][1] for name in _last_originals]
    )
    return {
        "installed": bool(_originals),
        "sglang_version": None if sglang is None else _version(sglang),
        "functions": functions,
        "modules": modules,
        "devices": {
            f"cuda:{device}": reason or "CUDA C++"
            for device, reason in dispatch._cuda_reasons.items()
            if device >= 0
        },
        "built_before": _objects_holding(outdated),
    }


def plugin() -> None:
    """Entry point of SGLang's plugin group: install where ``CUPY_NSA_META_SGLANG`` says so.

    SGLang calls it early in every process, before a worker has chosen its GPU. Nothing is warmed up
    then, which would take memory of GPU 0 in each of them; the first call compiles.

    Raises:
        ValueError: ``CUPY_NSA_META_SGLANG`` is neither empty, 0, 1 nor ``force``.
        ImportError, RuntimeError: as ``install``. SGLang logs it and keeps its own functions.
    """
    wanted = _env.sglang()
    if wanted != "0":
        install(force=wanted == "force", warm=_uses_cuda())


def _uses_cuda() -> bool:
    """This process has a CUDA context already."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


# ---- SGLang's modules ---------------------------------------------------------------------------


def _require_sglang() -> str:
    """Import SGLang; return its version."""
    try:
        return _version(importlib.import_module("sglang"))
    except ImportError as error:
        known = KNOWN_VERSIONS[-1]
        raise ImportError(
            "cupy_nsa_meta.integrations.sglang: SGLang cannot be imported; install it, "
            f"pip install sglang=={known} ({error})"
        ) from error


def _version(sglang: ModuleType) -> str:
    version = getattr(sglang, "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version("sglang")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
    return str(version)


def _defined(name: str, module: str) -> Callable[..., Any]:
    """SGLang's function, or what stands in its place, from the module that defines it."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"sglang: expected {name} in {module}, got {error}") from error
    return function


def _check_parameters(
    name: str, theirs: Callable[..., Any], ours: Callable[..., Any], version: str
) -> None:
    """Ours take SGLang's parameters, by the same names in the same order."""
    known = list(inspect.signature(ours).parameters)
    wanted = list(inspect.signature(theirs).parameters)
    if "real_page_size" in wanted:  # its name until 0.5.18, which ours take too
        wanted[wanted.index("real_page_size")] = "physical_page_size"
    if wanted != known[: len(wanted)]:
        raise RuntimeError(
            f"{name}: expected the parameters {', '.join(known)}, "
            f"got {', '.join(wanted)} in SGLang {version}"
        )


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if (name == "sglang" or name.startswith("sglang.")) and isinstance(module, ModuleType):
            yield module


def _holders(function: Callable[..., Any]) -> Iterator[tuple[ModuleType, str]]:
    """Modules of SGLang that hold a function, and the name that each has for it."""
    for module in _modules():
        for attribute, value in list(vars(module).items()):
            if value is function:
                yield module, attribute


def _replace(function: Callable[..., Any], by: Callable[..., Any]) -> None:
    for module, attribute in list(_holders(function)):
        setattr(module, attribute, by)


def _objects_holding(functions: list[Callable[..., Any]]) -> list[str]:
    """Instances of SGLang's classes, and of classes derived from them, that hold a function."""
    found = []
    is_of_sglang: dict[type, bool] = {}
    for candidate in gc.get_objects():
        cls = type(candidate)
        if cls not in is_of_sglang:
            is_of_sglang[cls] = any(
                str(vars(base).get("__module__")).partition(".")[0] == "sglang"
                for base in type.mro(cls)
            )
        if not is_of_sglang[cls]:
            continue
        attributes = getattr(candidate, "__dict__", {})
        held = sorted(
            name
            for name, value in list(attributes.items())
            if any(value is function for function in functions)
        )
        if held:
            found.append(f"{cls.__qualname__} at {id(candidate):#x}: {', '.join(held)}")
    return found
