"""CUDA sources to loaded kernels: find, compile (NVRTC through CuPy's RawModule), load per device.

CuPy is imported in here only, and only when a kernel is asked for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("cupy_nsa_meta")
logger.addHandler(logging.NullHandler())  # silent unless the application asks

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
BLOCK_THREADS = 256  # kBlockThreads of common.cuh: threads of a block
#: Threads of the blocks of other kernels.
LARGER_BLOCKS = {"draft_extend_large": 512}  # kLargeThreads of draft_extend.cu
#: Files whose kernels are compiled as several programs, side by side: the first call waits for the
#: slowest one only. Two, as ``draft_extend_large`` alone takes half as long as the rest together,
#: and each program costs 40 ms of a core. ``NSA_IN_PROGRAM`` in the file draws the same lines.
PROGRAMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "draft_extend": (
        ("draft_extend_large",),
        tuple(name for name in KERNELS["draft_extend"] if name != "draft_extend_large"),
    ),
}

_compile_lock = threading.RLock()


class KernelUnavailableError(RuntimeError):
    """The CUDA backend cannot run here; the message names the reason and the remedy."""


class Fault(NamedTuple):
    """What keeps the kernels from running: how it shows, what it is, what to do."""

    pattern: str  # searched for in "ErrorType: text"
    cause: str
    remedy: str


#: The first row that fits speaks. ``{cuda}`` is the extra that fits torch, ``{cache}`` the folder.
FAULTS = (
    Fault(
        r"libnvrtc",
        "NVRTC, the compiler, is missing or incomplete",
        "pip install 'cupy-nsa-meta[{cuda}]', which brings it",
    ),
    Fault(
        r"annot open source file|ould not open source file|auto-detect CUDA root",
        "the CUDA headers are missing",
        "pip install 'cupy-nsa-meta[{cuda}]', which brings them, or set CUDA_PATH to a toolkit",
    ),
    Fault(
        r"InsufficientDriver|UNSUPPORTED_PTX_VERSION|UnsupportedPtxVersion|failed to load libcuda",
        "the NVIDIA driver is too old for this CuPy and NVRTC, or missing",
        "update the driver, or install the extra (cuda12, cuda13) of the CUDA version that "
        "nvidia-smi shows",
    ),
    Fault(
        r"INVALID_IMAGE|INVALID_SOURCE|InvalidKernelImage|INVALID_PTX|InvalidPtx",
        "the driver refuses the compiled kernels: they are damaged, or the driver is too old",
        "delete {cache}, they are compiled anew; if that does not help, update the driver",
    ),
    Fault(
        r"NO_BINARY_FOR_GPU|NoKernelImageForDevice",
        "the GPU is newer than NVRTC",
        "install a newer CUDA version of CuPy and NVRTC (the extra cuda13) and of the driver",
    ),
    Fault(
        r"invalid value for --gpu-architecture",
        "NVRTC does not know this GPU",
        "a GPU before compute capability 7.5 needs the extra cuda12, a new one a newer NVRTC",
    ),
    Fault(
        r"cudaErrorMemoryAllocation",
        "no pinned host memory is left",
        "raise the memory limit of the container or of the user (ulimit -l), or stop processes "
        "that pin memory",
    ),
    Fault(
        r"CUDA_ERROR_OUT_OF_MEMORY|OutOfMemoryError",
        "no GPU memory is left for the kernels",
        "call warmup() before the memory is given to others, or free some",
    ),
    Fault(
        r"^(OSError|PermissionError|FileNotFoundError|FileExistsError|NotADirectoryError"
        r"|IsADirectoryError|BlockingIOError):",
        "a file cannot be read or written",
        "set CUPY_CACHE_DIR (now {cache}) to a folder that can be written, and TMPDIR too where "
        "the message names it",
    ),
)
UNKNOWN = Fault("", "the reason is not a known one", "CUPY_NSA_META_BACKEND=triton goes without")


def explain(what: str, error: BaseException) -> KernelUnavailableError:
    """One line for whatever CuPy, NVRTC or the driver has raised."""
    text = f"{type(error).__name__}: {error}"
    fault = next((row for row in FAULTS if re.search(row.pattern, text)), UNKNOWN)
    remedy = fault.remedy.format(cuda=cuda_extra(), cache=cache_dir())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = next((line for line in lines if re.search(fault.pattern, line)), lines[0])
    if fault is UNKNOWN:  # of a compiler's log the errors, not the warnings before them
        telling = next((line for line in lines if "error" in line.lower()), lines[0])
    if not telling.startswith(type(error).__name__):
        telling = f"{type(error).__name__}: {telling}"
    return KernelUnavailableError(f"{what}: {fault.cause} ({telling}); {remedy}")


def cache_dir() -> str:
    """Where CuPy keeps compiled kernels."""
    return os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")


def cuda_extra() -> str:
    """The extra of this package that fits torch."""
    major = (torch.version.cuda or "12").partition(".")[0]
    return "cuda13" if major == "13" else "cuda12"


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
    """The text of ``cuda_src/<stem>.cu``: all of its kernels."""
    return (source_dir() / f"{stem}.cu").read_text()


def program_source(stem: str, number: int) -> str:
    """The text of one of the ``PROGRAMS`` of a file.

    The number is in the text: CuPy compiles an empty program for each new set of options.
    """
    return f"#define CUPY_NSA_META_PROGRAM {number}\n#line 1\n{source(stem)}"


@functools.cache
def import_cupy() -> Any:
    """CuPy, or a ``KernelUnavailableError`` that says why not and what to do."""
    if not torch.cuda.is_available():
        raise KernelUnavailableError(_no_device())
    if torch.version.hip:
        raise KernelUnavailableError(
            "this torch is a ROCm build; the CUDA backend needs an NVIDIA GPU"
        )
    install = f"pip install 'cupy-nsa-meta[{cuda_extra()}]'"
    try:
        import cupy
    except ImportError as error:
        raise KernelUnavailableError(f"CuPy cannot be imported ({error}); {install}") from error
    except Exception as error:  # it makes its cache folder, and asks the driver
        raise explain("CuPy cannot be imported", error) from error
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


def _no_device() -> str:
    """Why torch has no CUDA device, as far as the driver tells."""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = f"torch {torch.__version__} ({built}) sees no CUDA device"
    driver = driver_version()
    wanted = int((torch.version.cuda or "0").partition(".")[0])
    if wanted and driver is not None and driver[0] < wanted:
        return (
            f"{found}: the NVIDIA driver is too old, it is for CUDA {driver[0]}.{driver[1]}; "
            f"update the driver, or install a torch that is built for CUDA {driver[0]}"
        )
    return (
        f"{found}; the CUDA backend needs an NVIDIA GPU, its driver (nvidia-smi should list it) "
        "and a CUDA build of torch"
    )


def driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver is for; None without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def block_threads(kernel: str) -> int:
    """The threads of a kernel's blocks."""
    return LARGER_BLOCKS.get(kernel, BLOCK_THREADS)


def load(stem: str, device: int) -> dict[str, Any]:
    """Compile (or take from CuPy's cache) and load ``cuda_src/<stem>.cu`` for one device.

    Not allowed while a CUDA graph is being captured, in this or any other thread.
    """
    cupy = import_cupy()
    with _compile_lock, torch.cuda.device(device):
        try:
            options = compile_options()
            if cupy.cuda.nvrtc.getVersion() >= SPLIT_COMPILE_NVRTC:
                options += ("--split-compile=0",)  # the kernels of a file on all cores
            is_logged = logger.isEnabledFor(logging.DEBUG)
            cached = _cache_entries() if is_logged else None
            begin = perf_counter()
            try:
                kernels = _load_cubins(cupy, stem, options, device)
                how = "cubin"
            except cupy.cuda.driver.CUDADriverError as error:
                if "NO_BINARY_FOR_GPU" not in str(error):
                    raise
                kernels = _load_ptx(cupy, stem, options, device)
                how = "PTX, the GPU is newer than CuPy's choice"
            if is_logged:
                _log(stem, device, how, cached, perf_counter() - begin)
            return kernels
        except Exception as error:
            raise explain(
                f"cuda_src/{stem}.cu cannot be compiled or loaded for "
                f"{torch.cuda.get_device_name(device)} ({architecture(device)})",
                error,
            ) from error


def _load_cubins(cupy: Any, stem: str, options: tuple[str, ...], device: int) -> dict[str, Any]:
    """Compile (or take from CuPy's cache) and load the programs of a file, each in a thread.

    NVRTC compiles without Python's lock and without one of its own. ``--split-compile`` alone keeps
    a third of a program in one thread, and each kernel waits for that of all.
    """

    def load_program(code: str, names: tuple[str, ...]) -> dict[str, Any]:
        # Not `with`: on leaving it, setting device 0 would make a context on GPU 0.
        cupy.cuda.Device(device).use()
        module = cupy.RawModule(code=code, options=options, backend="nvrtc")
        return {name: module.get_function(name).kernel for name in names}

    if stem not in PROGRAMS:
        return load_program(source(stem), KERNELS[stem])
    programs = PROGRAMS[stem]
    codes = [program_source(stem, number) for number in range(len(programs))]
    kernels: dict[str, Any] = {}
    with ThreadPoolExecutor(len(programs), "cupy_nsa_meta-compile") as pool:
        try:
            jobs = [pool.submit(load_program, *job) for job in zip(codes, programs, strict=True)]
        except RuntimeError:  # no thread to be had, or the main thread has ended
            return load_program(source(stem), KERNELS[stem])
        for job in jobs:
            kernels |= job.result()
    return kernels


def _load_ptx(cupy: Any, stem: str, options: tuple[str, ...], device: int) -> dict[str, Any]:
    """For a GPU that CuPy or NVRTC do not know: PTX, which the driver compiles to its code.

    CuPy makes a cubin of the newest architecture it knows, which no other GPU loads. NVRTC runs at
    each start then (the driver keeps its own result).
    """
    nvrtc = cupy.cuda.nvrtc
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in nvrtc.getSupportedArchs() if arch <= 10 * major + minor]
    program = nvrtc.createProgram(source(stem), f"{stem}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options, f"-arch=compute_{max(known)}"))
        ptx = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    module = cupy.cuda.function.Module()
    module.load(ptx)
    return {name: module.get_function(name) for name in KERNELS[stem]}


def _cache_entries() -> set[tuple[str, int]] | None:
    """Names and times of the entries of CuPy's cache; None where it keeps none."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return None
    try:
        with os.scandir(cache_dir()) as entries:
            return {
                (entry.name, entry.stat().st_mtime_ns)
                for entry in entries
                if entry.name.endswith(".cubin")
            }
    except OSError:
        return None


def _log(
    stem: str, device: int, how: str, cached: set[tuple[str, int]] | None, seconds: float
) -> None:
    """One line for each file that was compiled or loaded."""
    now = _cache_entries()
    is_hit = how == "cubin" and now is not None and not now - (cached or set())
    found = versions()
    logger.debug(
        "cuda_src/%s.cu for %s (cuda:%d): %.1f ms, cache hit: %s, %s, CuPy %s, NVRTC %s",
        stem,
        architecture(device),
        device,
        1e3 * seconds,
        "yes" if is_hit else "no",
        how,
        found["cupy_version"],
        found["nvrtc_version"],
    )


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
