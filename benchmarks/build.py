"""Programs and extensions that are compiled on request: the floor program, the C++ extension.

They need nvcc. Builds lie in a folder of the temporary directory named after their sources, tools
and torch, and are used again. The extension is compiled by three commands rather than by
``torch.utils.cpp_extension.load``, which takes the toolkit's folder from where nvcc's name lies.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from .measure import Absent, one_line

SOURCES = Path(__file__).resolve().parent / "native"
EXTENSION = "cupy_nsa_meta_bench_extension"
TIMEOUT = 240  # seconds per command
CPP_STANDARD = "-std=c++20"  # what the torch headers need


def nvcc() -> str:
    """The compiler's path."""
    path = shutil.which("nvcc")
    if path is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        path = shutil.which("nvcc", path=os.path.join(home, "bin"))
    if path is None:
        raise Absent("nvcc is not on the PATH")
    return path


def nvcc_version() -> str | None:
    try:
        text = _command([nvcc(), "--version"])
    except Absent:
        return None
    match = re.search(r"release [\d.]+, V([\d.]+)", text)
    return match.group(1) if match else None


def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"-arch=sm_{major}{minor}"


def floor_program(arch: str) -> Path:
    """Compile ``floor.cu``."""
    target = _folder(["floor.cu"], arch) / "floor"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        _command([nvcc(), "-O3", "-std=c++17", arch, str(SOURCES / "floor.cu"), "-o", str(part)])
        part.replace(target)
    return target


def extension_path(arch: str) -> Path:
    """Where the extension lies once it is built."""
    return _folder(["extension.cpp", "extension.cu", "extension.h"], arch) / f"{EXTENSION}.so"


def extension(arch: str) -> ModuleType:
    """Compile and import the C++ extension."""
    target = extension_path(arch)
    if not target.exists():
        _build_extension(arch, target)
    loader = importlib.machinery.ExtensionFileLoader(EXTENSION, str(target))
    spec = importlib.util.spec_from_file_location(EXTENSION, target, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _build_extension(arch: str, target: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Absent("no C++ compiler (c++, g++) is on the PATH")
    folder = target.parent
    objects = [folder / f"{kind}.{os.getpid()}.o" for kind in ("cu", "cpp")]
    commands = extension_commands(nvcc(), compiler, arch, objects, target)
    with ThreadPoolExecutor(2) as pool:  # the two compilations side by side, then the link
        list(pool.map(_command, commands[:2]))
    part = target.with_suffix(f".{os.getpid()}")
    _command([*commands[2], "-o", str(part)])
    part.replace(target)
    for path in objects:
        path.unlink()


def extension_commands(
    nvcc_path: str, compiler: str, arch: str, objects: Sequence[Path], target: Path
) -> list[list[str]]:
    """Compile the kernels, compile the bindings, link (less the name of the result)."""
    torch_folder = Path(torch.__file__).parent
    torch_includes = (torch_folder / "include", torch_folder / "include/torch/csrc/api/include")
    folders = [*torch_includes, *toolkit_includes(), sysconfig.get_paths()["include"]]
    includes = [f"-I{folder}" for folder in folders]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    define = f"-DTORCH_EXTENSION_NAME={EXTENSION}"
    kernels, bindings = objects
    # The private CUDA runtime of nvcc's static library shares torch's context and streams.
    libraries = [f"-L{torch_folder / 'lib'}"]
    libraries += [f"-l{name}" for name in ("c10", "c10_cuda", "torch_cpu", "torch", "torch_python")]
    return [
        [
            *(nvcc_path, "-O3", "-std=c++17", arch, "-Xcompiler", "-fPIC"),
            *("-c", str(SOURCES / "extension.cu"), "-o", str(kernels)),
        ],
        [
            *(compiler, "-O2", CPP_STANDARD, "-fPIC", "-w", abi, define, *includes),
            *("-c", str(SOURCES / "extension.cpp"), "-o", str(bindings)),
        ],
        [nvcc_path, "-shared", arch, str(kernels), str(bindings), *libraries],
    ]


def toolkit_includes() -> list[str]:
    """Header folders of the toolkit that nvcc belongs to, from its own account."""
    done = subprocess.run(
        [nvcc(), "-dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [line for line in done.stderr.splitlines() if "INCLUDES=" in line]
    found = re.findall(r'"(?:-I)?(/[^"]+)"', "\n".join(lines))
    return [path for path in dict.fromkeys(found) if Path(path, "cuda_runtime_api.h").is_file()]


def _folder(names: Sequence[str], arch: str) -> Path:
    digest = hashlib.sha256()
    for part in (torch.__version__, arch, nvcc(), str(nvcc_version())):
        digest.update(part.encode() + b"\0")
    for name in names:
        digest.update((SOURCES / name).read_bytes() + b"\0")
    user = os.getuid() if hasattr(os, "getuid") else 0
    base = Path(tempfile.gettempdir()) / f"cupy_nsa_meta_bench_{user}"
    folder = base / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _command(words: Sequence[str]) -> str:
    """Run a compiler; its first error lines become the reason of an absence."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        raise Absent(f"{Path(words[0]).name}: {one_line(error)}") from error
    if done.returncode:
        text = one_line(done.stderr or done.stdout)
        raise Absent(f"{Path(words[0]).name} failed ({done.returncode}): {text}")
    return done.stdout
