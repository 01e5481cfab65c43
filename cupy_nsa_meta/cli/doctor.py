"""``doctor``: what works on this machine, what does not, why, and what to do.

One finding per check. A check that fails itself is a finding too: the doctor does not crash. The
exit status is 1 where a finding is ``fail``, which the CUDA backend that cannot run here always is;
``note`` is for what is unusual or absent and not needed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

import cupy_nsa_meta

from .. import _env, _launch, _module, dispatch
from . import FAILED, OK
from .environment import NAMES, PREFIX
from .terminal import Painter, columns, describe, one_line, print_json

MINIMUM_CAPABILITY = (7, 5)
VOLTA = (7, 0)  # with NVRTC 12, which still knows it
MINIMUM_DRIVER_CUDA = 12
ARCHITECTURE_WITHOUT_GPU = "sm_90"  # what is compiled for where there is no GPU to ask
CHILD_TIMEOUT_S = 300
COLOURS = {"ok": "green", "note": "yellow", "fail": "red"}


class Finding(NamedTuple):
    """What one check saw."""

    name: str
    state: str  # ok, note, fail
    found: str
    remedy: str | None = None
    data: dict[str, Any] | None = None  # numbers for --json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0 the CUDA backend runs here and nothing else is broken; 1 something does "
        "not work, the CUDA backend on a machine without a GPU included; 2 bad options."
    )


def run(args: argparse.Namespace) -> int:
    findings = examine()
    healthy = all(finding.state != "fail" for finding in findings)
    if args.json:
        print_json(
            {
                "command": "doctor",
                "version": cupy_nsa_meta.__version__,
                "ok": healthy,
                "checks": [finding._asdict() for finding in findings],
            }
        )
    else:
        print(report(findings))
    return OK if healthy else FAILED


def examine(checks: Iterable[tuple[str, Callable[[], Iterable[Finding]]]] = ()) -> list[Finding]:
    """Run the checks in order, each guarded."""
    findings: list[Finding] = []
    for name, check in checks or CHECKS:
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding(name, "fail", f"the check itself failed: {describe(error)}"))
    return findings


def report(findings: list[Finding]) -> str:
    """The findings as text: one line each, the remedy below."""
    paint = Painter()
    lines = columns(
        [(finding.state, finding.name, one_line(finding.found)) for finding in findings]
    )
    out = []
    for finding, line in zip(findings, lines, strict=True):
        width = len(finding.state)
        out.append(paint(line[:width], COLOURS[finding.state]) + line[width:])
        if finding.remedy is not None:
            out.append(f"      -> {one_line(finding.remedy)}")
    failed = [finding.name for finding in findings if finding.state == "fail"]
    out.append("")
    out.append(
        paint(f"does not work: {', '.join(failed)}", "red")
        if failed
        else paint("everything works", "green")
    )
    return "\n".join(out)


# ---- The machine --------------------------------------------------------------------------------


def check_python() -> Iterable[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding(
        "package",
        "ok",
        f"cupy_nsa_meta {cupy_nsa_meta.__version__}, {Path(_module.__file__).parent}",
    )


def check_torch() -> Iterable[Finding]:
    version = f"torch {torch.__version__}"
    if torch.version.hip:
        yield Finding("torch", "note", f"{version}, a ROCm build", "the CUDA backend needs NVIDIA")
    elif torch.version.cuda:
        yield Finding("torch", "ok", f"{version}, built for CUDA {torch.version.cuda}")
    else:
        yield Finding(
            "torch", "note", f"{version}, built without CUDA",
            "enough for the CPU; a GPU needs a CUDA build of torch",
        )  # fmt: skip


def check_gpu() -> Iterable[Finding]:
    if not torch.cuda.is_available():
        yield Finding(
            "gpu", "note", "torch sees no CUDA device",
            "with a GPU in the machine: nvidia-smi must list it, CUDA_VISIBLE_DEVICES must not "
            "hide it, and torch must be a CUDA build",
        )  # fmt: skip
        return
    nvrtc = (_module.versions()["nvrtc_version"] or "").partition(".")[0]
    minimum = VOLTA if nvrtc == "12" else MINIMUM_CAPABILITY
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        mark = ", current" if device == torch.cuda.current_device() else ""
        text = (
            f"cuda:{device} {torch.cuda.get_device_name(device)}, {_module.architecture(device)}"
            f"{mark}"
        )
        if capability >= minimum:
            yield Finding("gpu", "ok", text)
        else:
            yield Finding(
                "gpu", "fail", text,
                f"compute capability {minimum[0]}.{minimum[1]} or newer is needed",
            )  # fmt: skip


def check_driver() -> Iterable[Finding]:
    known = _module.driver_version()
    if known is None:
        state = "fail" if torch.cuda.is_available() else "note"
        yield Finding("driver", state, "libcuda.so.1 is not there", "install the NVIDIA driver")
        return
    nvrtc = _module.versions()["nvrtc_version"]
    needed = max(MINIMUM_DRIVER_CUDA, int((nvrtc or "0").partition(".")[0]))
    text = f"knows CUDA {known[0]}.{known[1]}, CUDA {needed} is needed"
    if known[0] >= needed:
        yield Finding("driver", "ok", text)
    else:
        yield Finding(
            "driver", "fail", text,
            f"update the driver, or install torch and CuPy for CUDA {known[0]}",
        )  # fmt: skip


# ---- CuPy, NVRTC, sources -----------------------------------------------------------------------


def check_cupy() -> Iterable[Finding]:
    needed = torch.cuda.is_available()
    distributions = _module._cupy_distributions()
    names = ", ".join(distributions) or "none"
    if len(distributions) > 1:
        yield Finding(
            "cupy", "fail", f"several CuPy distributions, which break each other: {names}",
            f"pip uninstall {' '.join(distributions)}, then install one",
        )  # fmt: skip
        return
    try:
        import cupy
    except Exception as error:  # a broken installation raises in many ways
        yield Finding(
            "cupy", "fail" if needed else "note",
            f"CuPy cannot be imported; distributions: {names}; {describe(error)}",
            "pip install 'cupy-nsa-meta[cuda12]', or [cuda13] with a CUDA 13 build of torch"
            + ("" if needed else "; without a GPU nothing needs it"),
        )  # fmt: skip
        return
    version = cupy.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _module.MINIMUM_CUPY:
        yield Finding(
            "cupy", "fail" if needed else "note", f"CuPy {version} ({names})",
            f"CuPy {_module.MINIMUM_CUPY[0]} or newer is needed",
        )  # fmt: skip
    else:
        yield Finding("cupy", "ok", f"CuPy {version} ({names})")


def check_nvrtc() -> Iterable[Finding]:
    version = _module.versions()["nvrtc_version"]
    needed = torch.cuda.is_available()
    if version is None:
        yield Finding(
            "nvrtc", "fail" if needed else "note", "NVRTC cannot be loaded through CuPy",
            "it comes with cupy-nsa-meta[cuda12] or [cuda13]; a CuPy installed by hand needs "
            "nvidia-cuda-nvrtc (for CUDA 12 nvidia-cuda-nvrtc-cu12)",
        )  # fmt: skip
        return
    from cupy.cuda import nvrtc

    known = [f"sm_{architecture}" for architecture in nvrtc.getSupportedArchs()]
    text = f"NVRTC {version}, {known[0]} to {known[-1]}"
    if needed:
        wanted = _module.architecture(torch.cuda.current_device())
        if wanted not in known:
            yield Finding(
                "nvrtc", "note", f"{text}; {wanted} of the GPU is not among them",
                "where the cuda backend cannot run because of it: the CUDA extra that fits torch, "
                "in its newest version",
            )  # fmt: skip
            return
        text += f", {wanted} of the GPU among them"
    yield Finding("nvrtc", "ok", text)


def check_headers() -> Iterable[Finding]:
    """The kernels of this package include none; CuPy's own do."""
    try:
        from cuda import pathfinder  # a part of every CuPy since 14

        found = pathfinder.find_nvidia_header_directory("cudart")
    except ImportError:
        found = None
    if found:
        yield Finding("cuda headers", "ok", str(found))
    else:
        yield Finding(
            "cuda headers", "note", "not found; the kernels of this package include none",
            "nvidia-cuda-runtime (for CUDA 12 nvidia-cuda-runtime-cu12) brings them for CuPy's own "
            "kernels",
        )  # fmt: skip


def check_sources() -> Iterable[Finding]:
    try:
        folder = _module.source_dir()
    except _module.KernelUnavailableError as error:
        yield Finding("cuda_src", "fail", str(error))
        return
    missing = [stem for stem in _module.KERNELS if not (folder / f"{stem}.cu").is_file()]
    if missing:
        yield Finding(
            "cuda_src", "fail", f"{folder} lacks {', '.join(missing)}", "reinstall cupy-nsa-meta"
        )
    else:
        yield Finding("cuda_src", "ok", f"{folder}, digest {_module.source_digest()}")


def check_cache() -> Iterable[Finding]:
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        yield Finding("kernel cache", "note", "CUPY_CACHE_IN_MEMORY=1: every process compiles")
        return
    folder = Path(_module.cache_dir())
    remedy = "set CUPY_CACHE_DIR to a folder that can be written"
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding("kernel cache", "fail", f"{folder} cannot be written: {error}", remedy)
        return
    yield Finding(
        "kernel cache", "ok", f"{folder}, {'can be made' if existing != folder else 'written'}"
    )


# ---- Compiling and loading ----------------------------------------------------------------------


def check_kernels() -> Iterable[Finding]:
    if _module.versions()["nvrtc_version"] is None:
        return  # check_nvrtc has said so
    on_gpu = torch.cuda.is_available()
    for stem in _module.KERNELS:
        name = f"kernel {stem}"
        try:
            yield _loaded(name, stem) if on_gpu else _compiled(name, stem)
        except Exception as error:
            yield Finding(
                name, "fail", describe(error),
                "the checks above name what NVRTC, the driver or the cache folder lack",
            )  # fmt: skip


def _compiled(name: str, stem: str) -> Finding:
    """Compile without loading, for an architecture that is not here."""
    from cupy.cuda import nvrtc

    begin = perf_counter()
    program = nvrtc.createProgram(_module.source(stem), f"{stem}.cu", (), ())
    try:
        options = (*_module.compile_options(), f"-arch={ARCHITECTURE_WITHOUT_GPU}")
        nvrtc.compileProgram(program, options)
        size = len(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)
    ms = 1e3 * (perf_counter() - begin)
    return Finding(
        name, "ok", f"compiled for {ARCHITECTURE_WITHOUT_GPU} in {ms:.0f} ms, {size:,} bytes; "
        "not loaded: no GPU",
        data={"compile_ms": round(ms, 1)},
    )  # fmt: skip


def _loaded(name: str, stem: str) -> Finding:
    """Compile and load in a fresh process with an empty kernel cache, and again with it filled."""
    device = torch.cuda.current_device()
    times: list[float] = []
    with tempfile.TemporaryDirectory(prefix="cupy_nsa_meta_doctor_") as folder:
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-m", "cupy_nsa_meta.cli.doctor", stem, str(device)],
                env=os.environ | {"CUPY_CACHE_DIR": folder, "PYTHONPATH": _search_path()},
                capture_output=True,
                text=True,
                timeout=CHILD_TIMEOUT_S,
            )
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
            times.append(float(json.loads(done.stdout.splitlines()[-1])["ms"]))
    cold, warm = times
    return Finding(
        name, "ok", f"compiled and loaded in {cold:.0f} ms, from the kernel cache in {warm:.0f} ms",
        data={"cold_ms": round(cold, 1), "warm_ms": round(warm, 1)},
    )  # fmt: skip


def _search_path() -> str:
    root = str(Path(cupy_nsa_meta.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def time_loading(stem: str, device: int) -> float:
    """Milliseconds to compile or fetch, and load, one source file; CUDA and CuPy are up before."""
    cupy = _module.import_cupy()
    with torch.cuda.device(device):
        torch.zeros(1, device=f"cuda:{device}")
        cupy.cuda.nvrtc.getVersion()
    begin = perf_counter()
    _module.load(stem, device)
    return 1e3 * (perf_counter() - begin)


# ---- Backends -----------------------------------------------------------------------------------


def check_pinned_memory() -> Iterable[Finding]:
    if not torch.cuda.is_available():
        return
    num_bytes = _launch.NUM_SLOTS * _launch.SLOT_BYTES
    try:
        torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        yield Finding(
            "pinned memory", "fail", f"{num_bytes >> 10} KiB cannot be had: {one_line(error)}",
            "raise the limit of locked memory (ulimit -l), or of the container",
        )  # fmt: skip
        return
    yield Finding("pinned memory", "ok", f"{num_bytes >> 10} KiB for result slots can be had")


def check_cuda_backend() -> Iterable[Finding]:
    begin = perf_counter()
    reason = dispatch.cuda_unavailable_reason()
    ms = 1e3 * (perf_counter() - begin)
    if reason is None:
        yield Finding("cuda backend", "ok", f"runs; ready after {ms:.0f} ms in this process")
    else:
        yield Finding("cuda backend", "fail", f"cannot run: {reason}")


def check_triton_backend() -> Iterable[Finding]:
    reason = dispatch.triton_unavailable_reason()
    if reason is not None:
        yield Finding("triton backend", "note", f"cannot run: {reason}")
        return
    where = "GPU" if torch.cuda.is_available() else "interpreter, TRITON_INTERPRET=1"
    yield Finding("triton backend", "ok", f"Triton {importlib.metadata.version('triton')}, {where}")


def check_python_backend() -> Iterable[Finding]:
    extend, seq = torch.tensor([3, 2]), torch.tensor([10, 4])
    outs = torch.zeros((2, 5), dtype=torch.int32)
    total = cupy_nsa_meta.fill_draft_extend_metadata_python(extend, seq, 9, outs[0], outs[1])
    got = [total, *outs.tolist()]
    wanted = [5, [8, 9, 10, 3, 4], [8, 9, 9, 3, 4]]
    if got == wanted:
        yield Finding("python backend", "ok", "runs on any device")
    else:
        yield Finding("python backend", "fail", f"expected {wanted}, got {got}")


def check_choice() -> Iterable[Finding]:
    devices = [-1, torch.cuda.current_device()] if torch.cuda.is_available() else [-1]
    chosen: dict[str, Any] = {}
    for device in devices:
        place = "cpu" if device < 0 else f"cuda:{device}"
        try:
            chosen[place] = dispatch.choose(device).name
        except (RuntimeError, ValueError) as error:
            yield Finding(
                "chosen backend", "fail", f"{place} tensors: {error}",
                "unset CUPY_NSA_META_BACKEND, or make that backend run",
            )  # fmt: skip
            return
    text = ", ".join(f"{name} for {place} tensors" for place, name in chosen.items())
    yield Finding(
        "chosen backend", "ok", f"CUPY_NSA_META_BACKEND={_env.backend()}: {text}", data=chosen
    )


# ---- Surroundings -------------------------------------------------------------------------------


def check_variables() -> Iterable[Finding]:
    in_force = {name: os.environ[name] for name in sorted(NAMES) if name in os.environ}
    in_force.pop("TERM", None)
    text = " ".join(f"{name}={value}" for name, value in in_force.items())
    yield Finding("environment", "ok", text or "no variable is set", data=dict(in_force))
    for read in (_env.backend, _env.sglang):
        try:
            read()
        except ValueError as error:
            yield Finding("environment", "fail", str(error))
    known = sorted(name for name in NAMES if name.startswith(PREFIX))
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in NAMES:
            close = difflib.get_close_matches(name, known, 1)
            yield Finding(
                "environment", "note", f"{name} is not a variable of this package",
                f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}",
            )  # fmt: skip


def check_sglang() -> Iterable[Finding]:
    from ..integrations.sglang import KNOWN_VERSIONS

    wanted = _env.sglang()
    known = " or ".join(KNOWN_VERSIONS)
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        state = "note" if wanted != "0" else "ok"
        yield Finding(
            "sglang", state, f"not installed, CUPY_NSA_META_SGLANG={wanted}",
            f"the plugin is for SGLang {known}" if wanted != "0" else None,
        )  # fmt: skip
        return
    names = {entry.name for entry in importlib.metadata.entry_points(group="sglang.srt.plugins")}
    text = f"SGLang {version}, CUPY_NSA_META_SGLANG={wanted}: "
    if wanted == "0":
        yield Finding("sglang", "ok", f"{text}SGLang keeps its own functions")
    elif version not in KNOWN_VERSIONS and wanted != "force":
        yield Finding(
            "sglang", "fail", f"{text}only {known} is known",
            "CUPY_NSA_META_SGLANG=force takes this version as it is",
        )  # fmt: skip
    elif "cupy_nsa_meta" not in names:
        yield Finding(
            "sglang", "fail", f"{text}the plugin's entry point is not installed",
            "pip install the package; a checkout on PYTHONPATH has no entry points",
        )  # fmt: skip
    else:
        yield Finding("sglang", "ok", f"{text}the plugin installs in SGLang's processes")


CHECKS: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
    ("python", check_python),
    ("torch", check_torch),
    ("gpu", check_gpu),
    ("driver", check_driver),
    ("cupy", check_cupy),
    ("nvrtc", check_nvrtc),
    ("cuda headers", check_headers),
    ("cuda_src", check_sources),
    ("kernel cache", check_cache),
    ("pinned memory", check_pinned_memory),
    ("kernels", check_kernels),
    ("cuda backend", check_cuda_backend),
    ("triton backend", check_triton_backend),
    ("python backend", check_python_backend),
    ("chosen backend", check_choice),
    ("environment", check_variables),
    ("sglang", check_sglang),
)


if __name__ == "__main__":  # the child of _loaded
    print(json.dumps({"ms": time_loading(sys.argv[1], int(sys.argv[2]))}))
