"""The real files of SGLang, and a stand-in for it, both without SGLang's dependencies.

Parent packages are empty modules whose ``__path__`` is the real folder: a file is imported under its
true name, while the ``__init__`` of its parents, which needs all of SGLang, does not run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tomllib
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

VERSION = "0.5.23"
FILES = (
    "sglang/_version.py",
    "sglang/kernels/ops/attention/dsa/kpool_metadata/decode.py",
    "sglang/kernels/ops/attention/dsa/kpool_metadata/scan.py",
    "sglang/kernels/ops/attention/dsa/metadata.py",
    "sglang/kernels/ops/attention/pad.py",
    "sglang/srt/environ.py",
    "sglang/srt/layers/attention/dsa/dsa_backend_mtp_precompute.py",
    "sglang/srt/layers/attention/dsa/dsa_metadata_manager.py",
    "sglang/srt/layers/attention/dsa_backend.py",
    "sglang/srt/plugins/__init__.py",
    "sglang/srt/plugins/hook_registry.py",
)
PARENTS = (
    "sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.attention",
    "sglang.kernels.ops.attention.dsa", "sglang.kernels.ops.attention.dsa.kpool_metadata",
    "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.attention",
    "sglang.srt.layers.attention.dsa",
)  # fmt: skip
METADATA = "sglang.kernels.ops.attention.dsa.metadata"
PAD = "sglang.kernels.ops.attention.pad"
KPOOL = "sglang.kernels.ops.attention.dsa.kpool_metadata.decode"
MANAGER = "sglang.srt.layers.attention.dsa.dsa_metadata_manager"
NAMES = (
    "fused_dsa_decode_metadata",
    "fused_dsa_target_verify_metadata",
    "fused_dsa_draft_extend_metadata",
)


def find(folder: Path) -> Path:
    """A folder that holds ``sglang/``: given, installed, or downloaded into ``folder``; or skip."""
    given = os.environ.get("CUPY_NSA_META_SGLANG_SOURCE")
    if given:
        missing = [name for name in FILES if not (Path(given) / name).is_file()]
        assert not missing, f"CUPY_NSA_META_SGLANG_SOURCE={given}: without {', '.join(missing)}"
        return Path(given)
    installed = importlib.util.find_spec("sglang")
    if installed is not None and installed.origin is not None:
        source = Path(installed.origin).parent.parent
        if (source / FILES[0]).is_file() and version(source) == VERSION:
            return source
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", f"sglang=={VERSION}", "--no-deps", "-q",
         "--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_34_x86_64",
         "--retries=1", "--timeout=30", f"--dest={folder}"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    wheels = list(folder.glob("sglang-*.whl"))
    if done.returncode or not wheels:
        last_line = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        pytest.skip(
            f"SGLang {VERSION} is neither in CUPY_NSA_META_SGLANG_SOURCE nor installed, and pip "
            f"cannot download it ({last_line})"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in FILES:
            archive.extract(name, folder)
    wheels[0].unlink()
    return folder


def version(source: Path) -> str:
    names: dict[str, str] = {}
    exec((source / "sglang/_version.py").read_text(), names)
    return names["__version__"]


def add_to_modules(source: Path) -> None:
    """Make SGLang's files importable in this process."""
    for name in PARENTS:
        module = types.ModuleType(name)
        module.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["sglang"].__version__ = version(source)
    # What dsa_metadata_manager asks for; the real module imports most of SGLang.
    utils = types.ModuleType("sglang.srt.utils")
    utils.is_cuda = utils.is_hip = lambda: False
    sys.modules["sglang.srt.utils"] = utils


@contextlib.contextmanager
def in_modules(source: Path) -> Iterator[None]:
    """SGLang's files importable inside, every module of it gone afterwards."""
    with no_modules():
        add_to_modules(source)
        yield


@contextlib.contextmanager
def no_modules() -> Iterator[None]:
    """No module of SGLang inside but what is imported there; as before afterwards."""
    before = {name: module for name, module in sys.modules.items() if is_sglang(name)}
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if is_sglang(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def is_sglang(name: str) -> bool:
    return name == "sglang" or name.startswith("sglang.")


# ---- A stand-in ---------------------------------------------------------------------------------

_FUNCTION = """
def {name}({parameters}):
    return "sglang"
"""
_BACKEND = """
from {metadata} import {names}
from {pad} import seqlens_expand_triton

class Backend:
    def __init__(self):
        self._fused_decode_metadata = fused_dsa_decode_metadata

    def expand(self, *arguments):
        return seqlens_expand_triton(*arguments)
"""
_KPOOL = """
def fused_dsa_decode_metadata_kpool():
    return "sglang"
"""
_PLUGINS = """
from importlib.metadata import entry_points

def load_plugins():
    for entry in entry_points(group="sglang.srt.plugins"):
        entry.load()()
"""


def write_stand_in(folder: Path, parameters: dict[str, str]) -> Path:
    """A package ``sglang`` with the functions of the true names and parameters, and little else."""
    for name in PARENTS:
        package = folder.joinpath(*name.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    root = folder / "sglang"
    (root / "__init__.py").write_text(f'__version__ = "{VERSION}"\n')
    (root / "_version.py").write_text(f'__version__ = "{VERSION}"\n')
    functions = {
        name: _FUNCTION.format(name=name, parameters=parameters[name]) for name in parameters
    }
    expand = functions.pop("seqlens_expand_triton")
    (root / "kernels/ops/attention/pad.py").write_text(expand)
    (root / "kernels/ops/attention/dsa/metadata.py").write_text("".join(functions.values()))
    (root / "kernels/ops/attention/dsa/kpool_metadata/decode.py").write_text(_KPOOL)
    backend = _BACKEND.format(metadata=METADATA, names=", ".join(NAMES), pad=PAD)
    for name in ("early", "late"):
        (root / f"srt/layers/attention/{name}.py").write_text(backend)
    (root / "srt/plugins").mkdir()
    (root / "srt/plugins/__init__.py").write_text(_PLUGINS)
    return folder


# ---- A worker -----------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


def write_entry_points(folder: Path) -> Path:
    """What an installed wheel tells ``importlib.metadata``, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"cupy_nsa_meta-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run_worker(source: Path, entry_points: Path, is_stand_in: bool) -> dict[str, Any]:
    """Load SGLang's plugins in a spawned process, as its workers do; its status() afterwards."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(theirs, source, entry_points, is_stand_in))
    process.start()
    theirs.close()
    try:
        assert ours.poll(240), "the worker does not answer"
        return ours.recv()
    except EOFError:
        raise AssertionError("the worker has died; its traceback is in stderr") from None
    finally:
        process.join(60)


def _worker(connection: Any, source: Path, entry_points: Path, is_stand_in: bool) -> None:
    sys.path.insert(0, str(entry_points))
    if is_stand_in:
        sys.path.insert(0, str(source))
    else:
        add_to_modules(source)
    importlib.import_module("sglang.srt.plugins").load_plugins()
    used_cuda = torch.cuda.is_initialized()
    importlib.import_module("sglang.srt.layers.attention.late" if is_stand_in else MANAGER)
    importlib.import_module(PAD)
    from cupy_nsa_meta.integrations import sglang

    connection.send(sglang.status() | {"used_cuda": used_cuda})
    connection.close()
