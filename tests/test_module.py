"""Sources to kernels: CuPy's cache, what can go wrong and what is said about it, the logger."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cupy_nsa_meta
import fake_cuda
import kernel_cache
from cupy_nsa_meta import _launch, _module, dispatch

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

from cupy.cuda import compiler  # noqa: E402
from cupy.cuda._compiler_cache import DiskKernelCacheBackend  # noqa: E402

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
STEM = "fused"


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def cache(cuda, monkeypatch, tmp_path):
    """CuPy's own compiler and cache behind ``_module.load``; the folder of the cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    monkeypatch.setattr(compiler, "_kernel_cache_backend", DiskKernelCacheBackend(str(folder)))
    for name in ("function", "_get_arch_for_options_for_nvrtc"):  # which kernel_cache replaces
        monkeypatch.setattr(compiler, name, getattr(compiler, name))
    monkeypatch.setattr(cuda.cupy, "RawModule", kernel_cache.raw_module)
    return folder


def digest(kernels):
    return sha256(next(iter(kernels.values())).module.binary).hexdigest()


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "cupy_nsa_meta"]


# ---- The logger ---------------------------------------------------------------------------------

LINE = (
    r"cuda_src/fused\.cu for sm_90 \(cuda:0\): (\d+\.\d) ms, cache hit: (yes|no), cubin, "
    r"CuPy (\S+), NVRTC (\d+\.\d)"
)


def test_one_line_for_each_load(cache, caplog):
    caplog.set_level(logging.DEBUG, logger="cupy_nsa_meta")
    for hit in ("no", "yes", "yes"):
        caplog.clear()
        _module.load(STEM, 0)
        (line,) = lines_of(caplog)
        found = re.fullmatch(LINE, line)
        assert found, line
        assert found[2] == hit
        assert float(found[1]) > 0
        assert found[3] == cupy.__version__
        assert found[4] == ".".join(map(str, cupy.cuda.nvrtc.getVersion()))


def test_a_cache_in_memory_is_never_hit(cache, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, logger="cupy_nsa_meta")
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    _module.load(STEM, 0)
    (line,) = lines_of(caplog)
    assert "cache hit: no" in line


def test_every_file_of_a_device_is_logged_once(cuda, caplog):
    caplog.set_level(logging.DEBUG, logger="cupy_nsa_meta")
    for device in (1, 0, 1):
        for stem in _module.KERNELS:
            _launch.device_state(device, stem)
    assert [re.match(r"cuda_src/(\w+).cu for sm_90 \((cuda:\d)\)", line).groups()
            for line in lines_of(caplog)] == [
        (stem, device) for device in ("cuda:1", "cuda:0") for stem in _module.KERNELS
    ]  # fmt: skip


def run(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_logger_is_silent_unless_asked():
    done = run(
        """
        import logging
        import cupy_nsa_meta
        logger = logging.getLogger("cupy_nsa_meta")
        assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
        assert logger.level == logging.NOTSET and logger.propagate
        logger.warning("nobody shall see this")
        logging.basicConfig(level=logging.DEBUG)
        logger.debug("this line shall be seen")
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == "DEBUG:cupy_nsa_meta:this line shall be seen\n"


# ---- Programs side by side ----------------------------------------------------------------------


def test_the_programs_of_a_file_are_compiled_at_the_same_time(cuda):
    """Each waits until all have begun, on the device that the kernels are for."""
    programs = _module.PROGRAMS["draft_extend"]
    begun = threading.Barrier(len(programs), timeout=60)
    load_one = cuda.cupy.RawModule

    def load_together(code, options, backend):
        begun.wait()
        return load_one(code, options, backend)

    cuda.cupy.RawModule = load_together
    kernels = _module.load("draft_extend", 1)
    assert set(kernels) == set(_module.KERNELS["draft_extend"])
    assert {cuda.kernels[kernel.ptr] for kernel in kernels.values()} == {
        (name, 1) for name in kernels
    }
    assert cuda.current == 0


def test_compiling_for_a_device_leaves_the_others_alone(cuda):
    """cudaSetDevice makes a context, also where it only goes back to what was current before."""
    cuda.current = 1
    cuda.switches.clear()
    _module.load("draft_extend", 1)
    assert set(cuda.switches) == {1}


def test_without_a_thread_the_programs_are_compiled_as_one(cuda, monkeypatch):
    """A thread may make the first call when the main thread has ended: no executor takes jobs."""

    def refused(*job):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(_module.ThreadPoolExecutor, "submit", refused)
    assert set(_module.load("draft_extend", 0)) == set(_module.KERNELS["draft_extend"])


def test_a_fault_in_one_program_is_the_fault_of_the_file(cuda):
    load_one = cuda.cupy.RawModule

    def fail_in_the_last(code, options, backend):
        if code.startswith("#define CUPY_NSA_META_PROGRAM 1\n"):
            raise driver_error("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
        return load_one(code, options, backend)

    cuda.cupy.RawModule = fail_in_the_last
    with pytest.raises(_module.KernelUnavailableError, match="no GPU memory is left"):
        _module.load("draft_extend", 0)
    cuda.cupy.RawModule = load_one
    assert set(_module.load("draft_extend", 0)) == set(_module.KERNELS["draft_extend"])


def test_a_cache_that_lacks_one_program_is_not_a_hit(cache, caplog):
    caplog.set_level(logging.DEBUG, logger="cupy_nsa_meta")
    _module.load("draft_extend", 0)
    entries = [path for path in cache.iterdir() if path.suffix == ".cubin"]
    assert len(entries) == len(_module.PROGRAMS["draft_extend"])
    _module.load("draft_extend", 0)
    entries[0].unlink()
    _module.load("draft_extend", 0)
    hits = [re.search(r"cache hit: (yes|no)", line)[1] for line in lines_of(caplog)]
    assert hits == ["no", "yes", "no"]


# ---- CuPy's cache -------------------------------------------------------------------------------


def entry_of(cache):
    (entry,) = (path for path in cache.iterdir() if path.suffix == ".cubin")
    return entry


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "cut_in_its_digest": lambda data: data[:17],
    "empty": lambda data: b"",
    "one_bit": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"<html>no space left</html>" * 9,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_anew_and_repaired(cache, caplog, damage, monkeypatch):
    # On several cores NVRTC 13.5 puts the kernels of a cubin in any order.
    monkeypatch.setattr(_module, "SPLIT_COMPILE_NVRTC", (99, 0))
    caplog.set_level(logging.DEBUG, logger="cupy_nsa_meta")
    first = digest(_module.load(STEM, 0))
    entry = entry_of(cache)
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGE[damage](whole))
    assert digest(_module.load(STEM, 0)) == first
    assert entry.read_bytes() == whole
    assert ["cache hit: no" in line for line in lines_of(caplog)] == [True, True]
    assert digest(_module.load(STEM, 0)) == first
    assert "cache hit: yes" in lines_of(caplog)[-1]


def test_a_process_that_ends_while_writing_leaves_no_entry(cache, monkeypatch):
    """The file gets its name only once it is whole."""

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            _module.load(STEM, 0)
    assert not [path for path in cache.iterdir() if path.suffix == ".cubin"]
    first = digest(_module.load(STEM, 0))
    assert digest(_module.load(STEM, 0)) == first


def test_sixteen_processes_on_an_empty_cache(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TESTS / "kernel_cache.py"), "cpu", "16"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUPY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 16
    assert re.fullmatch("[0-9a-f]{64}", found[0]), found[0]
    assert set(found) == {found[0]}
    (entry,) = (tmp_path / "cache").iterdir()  # and no half-written file beside it
    data = entry.read_bytes()
    assert sha256(data[40:]).hexdigest() == found[0]


# ---- What can go wrong --------------------------------------------------------------------------


def driver_error(text):
    return fake_cuda.FakeDriverError(text)


def runtime_error(number):
    return cupy.cuda.runtime.CUDARuntimeError(number)


def compile_error(text):
    return compiler.CompileException(text, "source", "/tmp/x/kern.cu", ())


NOT_FOUND = "cannot open shared object file: No such file or directory"
#: name: (what CuPy raises, part of the message, part of the remedy)
FAULTS = {
    "cache_read_only": (
        OSError(30, "Read-only file system", "/home/user/.cupy/kernel_cache/tmpab12"),
        "a file cannot be read or written (OSError: [Errno 30] Read-only file system: '/home",
        "set CUPY_CACHE_DIR (now {cache}) to a folder that can be written",
    ),
    "cache_permission": (
        PermissionError(13, "Permission denied", "/home/somebody/.cupy/kernel_cache/tmpab12"),
        "a file cannot be read or written (PermissionError: [Errno 13] Permission denied: '/home",
        "set CUPY_CACHE_DIR (now {cache})",
    ),
    "cache_full": (
        OSError(28, "No space left on device"),
        "(OSError: [Errno 28] No space left on device)",
        "CUPY_CACHE_DIR",
    ),
    "cache_entry_is_a_folder": (
        IsADirectoryError(21, "Is a directory", "/c/ce17.cubin"),
        "(IsADirectoryError: [Errno 21] Is a directory: '/c/ce17.cubin')",
        "CUPY_CACHE_DIR",
    ),
    "cache_entry_of_another_machine": (
        driver_error("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"),
        "the driver refuses the compiled kernels: they are damaged, or the driver is too old",
        "delete {cache}, they are compiled anew; if that does not help, update the driver",
    ),
    "nvrtc_missing": (
        RuntimeError(f"CuPy failed to load libnvrtc.so.12: OSError: libnvrtc.so.12: {NOT_FOUND}"),
        "NVRTC, the compiler, is missing or incomplete (RuntimeError: CuPy failed to load libnvrtc",
        "pip install 'cupy-nsa-meta[cuda13]'",
    ),
    "nvrtc_incomplete": (
        compile_error(
            "nvrtc: error: failed to open libnvrtc-builtins.so.12.9.\n  Make sure that "
            "libnvrtc-builtins.so.12.9 is installed correctly.\nnvrtc: error: failed to get"
        ),
        "NVRTC, the compiler, is missing or incomplete (CompileException: nvrtc: error: failed to open",
        "pip install",
    ),
    "headers_missing": (
        compile_error(
            '/x/cuda_fp16.h(4101): catastrophic error: cannot open source file "vector_types.h"\n'
            "  #include <vector_types.h>\n\n1 catastrophic error detected in the compilation of ...\n"
        ),
        'the CUDA headers are missing (CompileException: /x/cuda_fp16.h(4101): catastrophic error: cannot open source file "vector_types.h")',
        "or set CUDA_PATH to a toolkit",
    ),
    "headers_not_found": (
        RuntimeError(
            "Failed to auto-detect CUDA root directory. Please specify `CUDA_PATH` environment "
            "variable if you are using CUDA versions not yet supported by CuPy."
        ),
        "the CUDA headers are missing (RuntimeError: Failed to auto-detect CUDA root directory.",
        "pip install 'cupy-nsa-meta[cuda13]', which brings them",
    ),
    "driver_too_old": (
        runtime_error(35),
        "the NVIDIA driver is too old for this CuPy and NVRTC, or missing (CUDARuntimeError: "
        "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version)",
        "update the driver, or install the extra (cuda12, cuda13)",
    ),
    "driver_too_old_for_ptx": (
        driver_error(
            "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported toolchain."
        ),
        "the NVIDIA driver is too old",
        "update the driver",
    ),
    "driver_missing": (
        RuntimeError(f"CuPy failed to load libcuda.so.1: OSError: libcuda.so.1: {NOT_FOUND}"),
        "the NVIDIA driver is too old for this CuPy and NVRTC, or missing",
        "update the driver",
    ),
    "gpu_older_than_nvrtc": (
        compile_error("nvrtc: error: invalid value for --gpu-architecture (-arch)\n"),
        "NVRTC does not know this GPU (CompileException: nvrtc: error: invalid value for",
        "a GPU before compute capability 7.5 needs the extra cuda12",
    ),
    "gpu_memory_full": (
        driver_error("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        "no GPU memory is left for the kernels",
        "call warmup() before",
    ),
    "anything_else": (
        compile_error(
            'common.cuh(3): warning #177-D: variable "x" was declared but never referenced\n'
            'common.cuh(7): error: identifier "y" is undefined\n1 error detected\n'
        ),
        'the reason is not a known one (CompileException: common.cuh(7): error: identifier "y" is undefined)',
        "CUPY_NSA_META_BACKEND=triton",
    ),
}


def raising(error):
    def raw_module(**arguments):
        raise error

    return raw_module


def check_reason(reason, cause, remedy):
    assert "\n" not in reason
    assert cause in reason
    assert reason.index(cause) < reason.index(remedy), "the cause, then what to do"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_auto_goes_on(cuda, monkeypatch, name):
    error, cause, remedy = FAULTS[name]
    monkeypatch.setenv("CUPY_CACHE_DIR", "/the/cache")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(dispatch, "triton_unavailable_reason", lambda: None)
    cuda.cupy.RawModule = raising(error)
    assert dispatch.choose(0).name == "triton"
    assert not cupy_nsa_meta.is_cuda_kernel_available()
    reason = cupy_nsa_meta.get_kernel_info()["reason"]
    assert reason.startswith(
        "cuda_src/draft_extend.cu cannot be compiled or loaded for fake 0 (sm_90): "
    )
    check_reason(reason, cause, remedy.format(cache="/the/cache"))
    # By name it is an error, of the function and of the choice.
    given = (cuda.tensor([1], 0), cuda.tensor([1], 0), 9, cuda.tensor([7], 0), cuda.tensor([7], 0))
    for call in (
        lambda: cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given),
        cupy_nsa_meta.warmup,
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == reason
        assert caught.value.__cause__ is error
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", "cuda")
    for call in (
        lambda: dispatch.choose(0),
        lambda: cupy_nsa_meta.fused_dsa_extend_metadata(
            given[0], given[1], total_len=1, dsa_index_topk=9, ke=given[3]
        ),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == f"CUPY_NSA_META_BACKEND=cuda cannot run: {reason}"
    assert given[3].tolist() == [7]


def test_without_triton_either_auto_goes_on_in_python(cuda, monkeypatch):
    cuda.cupy.RawModule = raising(runtime_error(35))
    monkeypatch.setattr(dispatch, "triton_unavailable_reason", lambda: "no Triton")
    assert dispatch.choose(0) is dispatch.PYTHON


def test_every_row_of_the_table_is_tested():
    texts = [f"{type(error).__name__}: {error}" for error, *_ in FAULTS.values()]
    texts += [
        "CUDARuntimeError: cudaErrorMemoryAllocation",
        "CUDADriverError: CUDA_ERROR_NO_BINARY_FOR_GPU",
    ]
    for row in _module.FAULTS:
        assert any(re.search(row.pattern, text) for text in texts), row


# ---- The same with what CuPy really does --------------------------------------------------------

AS_IF = """
import torch
torch.cuda.is_available = lambda: True
torch.version.cuda = "12.9"
from cupy_nsa_meta import dispatch, _module, _launch
import fake_cuda, pytest
"""


def test_cupy_with_a_cache_folder_that_cannot_be_made(tmp_path):
    """CuPy makes the folder when it is imported, and raises what is no ImportError."""
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "cache")
    done = run(
        AS_IF
        + """
dispatch.triton_unavailable_reason = lambda: None
print(dispatch.choose(0).name)
print(dispatch.cuda_unavailable_reason(0))
""",
        CUPY_CACHE_DIR=folder,
    )
    assert done.returncode == 0, done.stderr
    chosen, reason = done.stdout.splitlines()
    assert chosen == "triton"
    assert reason.startswith("CuPy cannot be imported: a file cannot be read or written (NotADirec")
    assert f"set CUPY_CACHE_DIR (now {folder}) to a folder that can be written" in reason


def test_cupy_without_nvrtc():
    done = run(
        AS_IF
        + """
import ctypes, cuda.pathfinder
real = ctypes.CDLL
class WithoutNvrtc(real):
    def __init__(self, name, *arguments, **options):
        if name and "nvrtc" in str(name):
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        super().__init__(name, *arguments, **options)
ctypes.CDLL = WithoutNvrtc
def nothing(name):
    raise cuda.pathfinder.DynamicLibNotFoundError(
        'Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13')
cuda.pathfinder.load_nvidia_dynamic_lib = nothing
with pytest.MonkeyPatch.context() as patch:
    fake = fake_cuda.install(patch)
    import cupy
    fake.cupy.cuda.nvrtc = cupy.cuda.nvrtc
    print(dispatch.cuda_unavailable_reason(0))
"""
    )
    assert done.returncode == 0, done.stderr
    (reason,) = done.stdout.splitlines()
    assert (
        "NVRTC, the compiler, is missing or incomplete (DynamicLibNotFoundError: Failure finding"
        in reason
    )
    assert reason.endswith("pip install 'cupy-nsa-meta[cuda12]', which brings it")


def test_a_cache_folder_that_has_become_a_file(cache):
    cache.rmdir()
    cache.write_text("")
    with pytest.raises(_module.KernelUnavailableError) as caught:
        _module.load(STEM, 0)
    check_reason(str(caught.value), "a file cannot be read or written (", f"(now {cache})")


def test_an_entry_that_cannot_be_read(cache):
    _module.load(STEM, 0)
    entry = entry_of(cache)
    entry.unlink()
    entry.mkdir()
    with pytest.raises(_module.KernelUnavailableError) as caught:
        _module.load(STEM, 0)
    check_reason(str(caught.value), f"(IsADirectoryError: [Errno 21] Is a directory: '{entry}')",
                 f"set CUPY_CACHE_DIR (now {cache})")  # fmt: skip


def test_a_header_that_nvrtc_does_not_find(cache, monkeypatch):
    monkeypatch.setattr(_module, "source", lambda stem: "#include <vector_types_not_there.h>\n")
    with pytest.raises(_module.KernelUnavailableError) as caught:
        _module.load(STEM, 0)
    check_reason(str(caught.value), "the CUDA headers are missing (CompileException: ", "CUDA_PATH")
    assert 'cannot open source file "vector_types_not_there.h"' in str(caught.value)


@pytest.mark.parametrize("architecture", ["30", "200"])
def test_an_architecture_that_nvrtc_does_not_know(cache, monkeypatch, architecture):
    monkeypatch.setattr(kernel_cache, "ARCHITECTURE", architecture)
    with pytest.raises(_module.KernelUnavailableError) as caught:
        _module.load(STEM, 0)
    check_reason(str(caught.value), "NVRTC does not know this GPU (CompileException: ", "cuda12")


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ((12, 4), "the NVIDIA driver is too old, it is for CUDA 12.4; update the driver, or install a torch that is built for CUDA 12"),
        ((13, 0), "the CUDA backend needs an NVIDIA GPU, its driver"),
        (None, "the CUDA backend needs an NVIDIA GPU, its driver"),
    ],
)  # fmt: skip
def test_a_driver_that_is_too_old_for_torch(monkeypatch, driver, said):
    """torch sees no device then, and the driver's own number tells why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_module, "driver_version", lambda: driver)
    _module.import_cupy.cache_clear()
    with pytest.raises(_module.KernelUnavailableError) as caught:
        _module.import_cupy()
    assert said in str(caught.value)
    assert "(built for CUDA 13.0) sees no CUDA device" in str(caught.value)


# ---- A GPU that is newer than NVRTC -------------------------------------------------------------

NO_BINARY = "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device"


@pytest.fixture
def newer_gpu(cuda, monkeypatch):
    """CuPy's cubin does not load; PTX is kept. Returns the list of what was loaded."""
    loaded = []

    class Module(kernel_cache.KeptModule):
        def load(self, binary):
            super().load(binary)
            loaded.append(binary)

    cuda.cupy.RawModule = raising(driver_error(NO_BINARY))
    cuda.cupy.cuda.nvrtc = cupy.cuda.nvrtc
    cuda.cupy.cuda.function = SimpleNamespace(Module=Module)
    return loaded


@pytest.mark.parametrize("stem", _module.KERNELS)
@pytest.mark.parametrize("capability", [(15, 0), (9, 1)])
def test_ptx_of_the_newest_architecture_that_nvrtc_knows(
    newer_gpu, monkeypatch, caplog, stem, capability
):
    caplog.set_level(logging.DEBUG, logger="cupy_nsa_meta")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels = _module.load(stem, 0)
    assert set(kernels) == set(_module.KERNELS[stem])
    (ptx,) = newer_gpu
    known = [
        arch
        for arch in cupy.cuda.nvrtc.getSupportedArchs()
        if arch <= 10 * capability[0] + capability[1]
    ]
    assert f".target sm_{max(known)}\n".encode() in ptx
    for name in _module.KERNELS[stem]:
        assert f".visible .entry {name}(".encode() in ptx
    (line,) = lines_of(caplog)
    assert "cache hit: no, PTX, the GPU is newer than CuPy's choice, CuPy" in line


def test_a_gpu_that_does_not_take_ptx_either(newer_gpu, cuda):
    def refuse(self, binary):
        raise driver_error(NO_BINARY)

    cuda.cupy.cuda.function.Module.load = refuse
    with pytest.raises(_module.KernelUnavailableError) as caught:
        _module.load(STEM, 0)
    check_reason(
        str(caught.value),
        "the GPU is newer than NVRTC (FakeDriverError: CUDA_ERROR_NO",
        "install a newer",
    )


# ---- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_sixteen_first_calls_on_an_empty_cache(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TESTS / "kernel_cache.py"), "gpu", "16"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUPY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = [5, [[8, 9, 10, 3, 4], [8, 9, 9, 3, 4]], [0, 10, 14]]
    assert json.loads(done.stdout) == [expected] * 16


@pytest.mark.gpu
def test_a_damaged_entry_on_a_gpu(tmp_path):
    text = """
    import logging, sys
    import kernel_cache
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("cupy_nsa_meta").setLevel(logging.DEBUG)
    print(kernel_cache.first_call())
    """
    cache = tmp_path / "cache"
    printed = []
    for hits in (["no", "no"], ["yes", "yes"], ["no", "no"], ["yes", "yes"]):
        done = run(text, CUPY_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr
        assert re.findall(r"cache hit: (yes|no)", done.stderr) == hits
        printed.append(done.stdout)
        if len(printed) == 2:
            for entry in cache.glob("*.cubin"):
                entry.write_bytes(entry.read_bytes()[:1000])
    assert len(set(printed)) == 1
    assert "[8, 9, 10, 3, 4]" in printed[0]


@pytest.mark.gpu
def test_ptx_runs_on_a_gpu():
    """As if NVRTC knew nothing newer than sm_80: the driver compiles its PTX for this GPU."""
    done = run(
        f"""
        import cupy, torch
        from cupy_nsa_meta import _module, fill_draft_extend_metadata_cuda
        from backends import check_case
        from cases import CASES
        from fused_cases import CASES as FUSED, Built, expected

        class Error(cupy.cuda.driver.CUDADriverError):
            def __init__(self):
                RuntimeError.__init__(self, {NO_BINARY!r})

        def refuse(**arguments):
            raise Error
        cupy.RawModule = refuse
        nvrtc = cupy.cuda.nvrtc
        class Old:
            getSupportedArchs = staticmethod(lambda: (75, 80))
            def __getattr__(self, name):
                return getattr(nvrtc, name)
        cupy.cuda.nvrtc = Old()
        for item in CASES:
            check_case(fill_draft_extend_metadata_cuda, item, "cuda")
        for item in FUSED:
            built = Built(item, "cuda")
            built.run()
            built.check(expected(item))
        print(len(CASES), len(FUSED))
        """
    )
    assert done.returncode == 0, done.stderr
    assert min(map(int, done.stdout.split())) > 50
