"""Choosing a backend, what the package says about itself, and what importing it does."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cupy_nsa_meta
from cupy_nsa_meta import _env, _module, dispatch

ROOT = Path(__file__).resolve().parent.parent


def call(**options):
    outs = torch.full((2, 8), -1, dtype=torch.int32)
    total = cupy_nsa_meta.fill_draft_extend_metadata(
        torch.tensor([3, 2]), torch.tensor([10, 4]), 9, outs[0], outs[1], **options
    )
    return total, outs.tolist()


EXPECTED = (5, [[8, 9, 10, 3, 4, -1, -1, -1], [8, 9, 9, 3, 4, -1, -1, -1]])


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_cuda_reasons", {})
    return monkeypatch


@pytest.mark.parametrize("backend", [None, "", "auto", "python"])
def test_cpu_tensors_go_to_python(fresh_choice, backend):
    if backend is not None:
        fresh_choice.setenv("CUPY_NSA_META_BACKEND", backend)
    assert dispatch.choose(-1) is dispatch.PYTHON
    assert call() == EXPECTED


def test_a_forced_cuda_backend_that_cannot_run(fresh_choice):
    fresh_choice.setenv("CUPY_NSA_META_BACKEND", "cuda")
    fresh_choice.setattr(torch.cuda, "is_available", lambda: False)
    _module.import_cupy.cache_clear()
    with pytest.raises(
        RuntimeError, match="CUPY_NSA_META_BACKEND=cuda cannot run: .*no CUDA device"
    ):
        call()


def test_a_forced_triton_backend(fresh_choice):
    from triton import knobs

    fresh_choice.setenv("CUPY_NSA_META_BACKEND", "triton")
    fresh_choice.setattr(torch.cuda, "is_available", lambda: False)
    fresh_choice.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(
        RuntimeError, match="CUPY_NSA_META_BACKEND=triton cannot run: .*no CUDA device"
    ):
        call()
    fresh_choice.setattr(dispatch, "_chosen", {})
    fresh_choice.setattr(knobs.runtime, "interpret", True)
    assert dispatch.choose(-1).name == "triton"


def test_triton_missing(fresh_choice):
    fresh_choice.setenv("CUPY_NSA_META_BACKEND", "triton")
    fresh_choice.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Triton is not installed; pip install triton"):
        call()


def test_auto_on_a_gpu_without_cupy_or_triton(fresh_choice):
    reasons = {"cuda": "no CuPy", "triton": None}
    fresh_choice.setattr(dispatch, "cuda_unavailable_reason", lambda device=None: reasons["cuda"])
    fresh_choice.setattr(dispatch, "triton_unavailable_reason", lambda: reasons["triton"])
    assert dispatch.choose(0).name == "triton"
    reasons["triton"] = "no Triton"
    assert dispatch.choose(0).name == "triton", "decided once per device"
    assert dispatch.choose(1) is dispatch.PYTHON
    reasons["cuda"] = None
    assert dispatch.choose(2) is dispatch.CUDA


def test_an_error_in_a_call_changes_no_choice(fresh_choice):
    fresh_choice.setattr(dispatch, "cuda_unavailable_reason", lambda device=None: None)
    assert dispatch.choose(0) is dispatch.CUDA
    with pytest.raises(TypeError):
        call(total_tokens="5")
    assert dispatch.choose(0) is dispatch.CUDA


def test_an_unknown_backend_is_named(fresh_choice):
    fresh_choice.setenv("CUPY_NSA_META_BACKEND", "cudda")
    with pytest.raises(
        ValueError,
        match="CUPY_NSA_META_BACKEND: expected one of auto, cuda, triton, python, got 'cudda'",
    ):
        call()


def test_the_environment_is_read_at_each_call(monkeypatch):
    assert not _env.debug_sync()
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    assert _env.debug_sync()
    with pytest.raises(ValueError, match="total_tokens: expected .* = 5, got 6"):
        call(total_tokens=6)
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "0")
    assert not _env.debug_sync()
    assert call(total_tokens=6)[0] == 6
    # Platforms without the mapping of bytes.
    monkeypatch.setattr(_env, "variables", _env._Everything())
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    assert _env.debug_sync()


def test_kernel_info():
    info = cupy_nsa_meta.get_kernel_info()
    assert info["backend"] == "CUDA C++"
    assert info["adaptive"] is True
    assert info["binary_search_threshold"] == 16
    assert info["block_size"] == 256
    assert info["available"] is cupy_nsa_meta.is_cuda_kernel_available()
    assert (info["reason"] is None) == info["available"]
    for key in ("device", "architecture", "nvrtc_version", "cupy_version", "torch_version"):
        assert key in info


def test_kernel_info_names_the_versions_without_a_gpu_too():
    cupy = pytest.importorskip("cupy")
    info = cupy_nsa_meta.get_kernel_info()
    assert info["cupy_version"] == cupy.__version__
    assert info["nvrtc_version"] == ".".join(map(str, cupy.cuda.nvrtc.getVersion()))


def test_reasons_name_the_remedy(fresh_choice):
    _module.import_cupy.cache_clear()
    fresh_choice.setattr(torch.cuda, "is_available", lambda: True)
    fresh_choice.setattr(torch.version, "hip", None)
    fresh_choice.setattr(torch.version, "cuda", "13.0")
    fresh_choice.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        _module.KernelUnavailableError, match=r"pip install 'cupy-nsa-meta\[cuda13\]'"
    ):
        _module.import_cupy()

    class Old:
        __version__ = "13.6.0"

    fresh_choice.setattr(torch.version, "cuda", "12.8")
    fresh_choice.setitem(sys.modules, "cupy", Old)
    with pytest.raises(_module.KernelUnavailableError, match=r"CuPy 13.6.0 is too old.*\[cuda12\]"):
        _module.import_cupy()

    class New:
        __version__ = "14.0.1"

    fresh_choice.setitem(sys.modules, "cupy", New)
    fresh_choice.setattr(_module, "_cupy_distributions", lambda: ["cupy-cuda12x", "cupy-cuda13x"])
    with pytest.raises(_module.KernelUnavailableError, match="several CuPy distributions"):
        _module.import_cupy()
    _module.import_cupy.cache_clear()


def test_warmup_says_why_it_cannot(fresh_choice):
    fresh_choice.setattr(torch.cuda, "is_available", lambda: False)
    _module.import_cupy.cache_clear()
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        cupy_nsa_meta.warmup()


def run(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_importing_touches_nothing():
    assert (
        run(
            """
        import sys, torch
        before = set(sys.modules)
        import cupy_nsa_meta
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert not new & {"cupy", "triton", "cupy_backends"}, new
        assert not torch.cuda.is_initialized()
        assert set(cupy_nsa_meta.__all__) <= set(dir(cupy_nsa_meta))
        for name in cupy_nsa_meta.__all__:
            assert getattr(cupy_nsa_meta, name) is not None
        """
        )
        == ""
    )


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cupy_nsa_meta.nothing  # noqa: B018


def snippet(heading: str) -> str:
    """The first Python block under a heading of the README."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index(heading) :]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_the_ten_lines_of_the_readme(capsys):
    printed = run(snippet("## Ten lines"))
    expected = re.findall(r"# -> (.*)", snippet("## Ten lines"))
    assert expected
    assert printed.splitlines() == expected


@pytest.mark.parametrize(
    ("missing", "chosen"), [("", "cuda"), ("cuda", "inplace"), ("triton", "python")]
)
def test_the_integration_snippet_of_the_readme(missing, chosen, monkeypatch):
    """CUDA, else Triton, else Python; the later ones are reached by taking the earlier ones away."""
    monkeypatch.setattr(cupy_nsa_meta, "is_cuda_kernel_available", lambda: not missing)
    if missing == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "cupy_nsa_meta.draft_extend_triton", raising=False)
        monkeypatch.delattr(cupy_nsa_meta, "draft_extend_triton", raising=False)
    namespace: dict[str, object] = {}
    exec(snippet("## In a serving engine"), namespace)
    fill = namespace["fill_draft_extend_metadata"]
    assert fill.__name__ == f"fill_draft_extend_metadata_{chosen}"
    if chosen != "cuda":
        outs = torch.full((2, 8), -1, dtype=torch.int32)
        total = fill(torch.tensor([3, 2]), torch.tensor([10, 4]), 9, outs[0], outs[1])
        assert (total, outs.tolist()) == EXPECTED
