"""CUDA sources to loaded kernels: find, compile (NVRTC through CuPy's RawModule), load per device.

CuPy is imported in here only, and only when a kernel is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import threading
from pathlib import Path
from typing import Any

import torch

MINIMUM_CUPY = (14, 0)
SPLIT_COMPILE_NVRTC = (12, 9)
#: Kernels of each source file in ``cuda_src/``; the tests compile all of them.
KERNELS: dict[str, tuple[str, ...]] = {
    "draft_extend": (
        "draft_extend_warp",
        "draft_extend_warp_quads",
        "draft_extend_block",
        "draft_extend_block4",
        "draft_extend_block4_quads",
        "draft_extend_large",
        "draft_extend_tiles",
        "draft_extend_tiled",
    ),
    "fused": ("fused", "fused_direct", "fused_direct_uniform", "fused_tiles"),
}

_compile_lock = threading.RLock()


class KernelUnavailableError(RuntimeError):
    """The CUDA backend cannot run here; the message names the reason and the remedy."""


def source_dir() -> Path:
    """``cuda_src/``: inside the package in a wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "cuda_src", package.parent / "cuda_src"):
        if (candidate / "common.cuh").is_file():
            return candidate
    raise KernelUnavailableError(
        f"the CUDA sources are missing: expected cuda_src/ in {package} or beside it; "
        "reinstall cupy-nsa-meta"
    )


@functools.cache
def source_digest() -> str:
    """Digest of every file in ``cuda_src/``: CuPy's cache key does not see included files."""
    digest = hashlib.sha256()
    for path in sorted(source_dir().iterdir()):
        if path.suffix in (".cu", ".cuh"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compile_options() -> tuple[str, ...]:
    """NVRTC options, the architecture apart."""
    return (
        "-std=c++17",
        f"-I{source_dir()}",
        f"-DCUPY_NSA_META_SOURCES=0x{source_digest()}ull",
    )


def source(stem: str) -> str:
    """The text of ``cuda_src/<stem>.cu``."""
    return (source_dir() / f"{stem}.cu").read_text()


@functools.cache
def import_cupy() -> Any:
    """CuPy, or a ``KernelUnavailableError`` that says why not and what to do."""
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        raise KernelUnavailableError(
            f"torch {torch.__version__} ({built}) sees no CUDA device; the CUDA backend needs an "
            "NVIDIA GPU, its driver (nvidia-smi should list it) and a CUDA build of torch"
        )
    if torch.version.hip:
        raise KernelUnavailableError(
            "this torch is a ROCm build; the CUDA backend needs an NVIDIA GPU"
        )
    cuda_major = (torch.version.cuda or "12").partition(".")[0]
    install = f"pip install 'cupy-nsa-meta[cuda{'13' if cuda_major == '13' else '12'}]'"
    try:
        import cupy
    except ImportError as error:
        raise KernelUnavailableError(f"CuPy cannot be imported ({error}); {install}") from error
    version = tuple(int(part) for part in cupy.__version__.split(".")[:2])
    if version < MINIMUM_CUPY:
        raise KernelUnavailableError(
            f"CuPy {cupy.__version__} is too old, >= {MINIMUM_CUPY[0]} is needed; {install}"
        )
    distributions = _cupy_distributions()
    if len(distributions) > 1:
        raise KernelUnavailableError(
            f"several CuPy distributions are installed ({', '.join(distributions)}) and break each "
            "other; uninstall all of them, then install one"
        )
    return cupy


def _cupy_distributions() -> list[str]:
    names = {
        (distribution.metadata["Name"] or "").lower()
        for distribution in importlib.metadata.distributions()
    }
    return sorted(
        name for name in names if name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm"))
    )


def load(stem: str, device: int) -> dict[str, Any]:
    """Compile (or take from CuPy's cache) and load ``cuda_src/<stem>.cu`` for one device.

    Not allowed while a CUDA graph is being captured, in this or any other thread.
    """
    cupy = import_cupy()
    with _compile_lock, cupy.cuda.Device(device):
        try:
            options = compile_options()
            if cupy.cuda.nvrtc.getVersion() >= SPLIT_COMPILE_NVRTC:
                options += ("--split-compile=0",)  # the kernels of a file on all cores
            module = cupy.RawModule(code=source(stem), options=options, backend="nvrtc")
            return {name: module.get_function(name).kernel for name in KERNELS[stem]}
        except Exception as error:
            raise KernelUnavailableError(
                f"cuda_src/{stem}.cu cannot be compiled or loaded for "
                f"{torch.cuda.get_device_name(device)} ({architecture(device)}): {error}; "
                "NVRTC and the CUDA headers come with cupy-nsa-meta[cuda12] or [cuda13], and "
                "CUPY_CACHE_DIR must be a folder that can be written"
            ) from error


def architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def versions() -> dict[str, str | None]:
    """CuPy and NVRTC versions, also where there is no GPU; None where they cannot be had."""
    found: dict[str, str | None] = {"cupy_version": None, "nvrtc_version": None}
    try:
        import cupy

        found["cupy_version"] = cupy.__version__
        found["nvrtc_version"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except Exception:  # not installed, or broken: the reason is that of import_cupy()
        pass
    return found
