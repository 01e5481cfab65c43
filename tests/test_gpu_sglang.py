"""SGLang's real Triton kernels as a second oracle on a GPU, and the plugin where there is one.

SGLang's files come from CUPY_NSA_META_SGLANG_SOURCE, a folder with ``sglang/`` in it, or as
``sglang_files.find`` says.
"""

from __future__ import annotations

import importlib

import pytest
import torch

import cupy_nsa_meta
import sglang_files
import sglang_oracle
from cupy_nsa_meta.integrations import sglang as bridge
from fused_cases import BY_NAME, CASES, LARGE_CASES, Built, expected, random_cases
from sglang_files import MANAGER, METADATA, PAD

pytestmark = [pytest.mark.gpu, pytest.mark.sglang]
DEVICE = "cuda"
COMPARED = [item for item in CASES + LARGE_CASES if sglang_oracle.is_defined(item)]
EXPANDED = [item for item in CASES + LARGE_CASES if sglang_oracle.has_expansion(item)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    assert torch.cuda.is_available(), "CUPY_NSA_META_REQUIRE_GPU=1, but torch sees no CUDA device"
    return sglang_files.find(tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="module", autouse=True)
def real(source):
    """SGLang's files as its modules, for all tests here: their kernels stay compiled."""
    with sglang_files.in_modules(source):
        cupy_nsa_meta.warmup()
        yield


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.delenv("CUPY_NSA_META_SGLANG", raising=False)
    cupy_nsa_meta.last_status()
    yield
    bridge.uninstall()
    bridge._last_originals.clear()


def theirs(op):
    return getattr(importlib.import_module(METADATA), sglang_oracle.NAMES[op])


@pytest.mark.parametrize("item", COMPARED, ids=lambda item: item.name)
def test_cases(item):
    sglang_oracle.check(item, theirs(item.op), DEVICE)
    assert cupy_nsa_meta.last_status() == 0


@pytest.mark.parametrize("op", sglang_oracle.NAMES)
def test_random_batches(op):
    """Few: SGLang's kernels are compiled anew for every batch size, stride and flag."""
    items = [item for item in random_cases(op, 100, seed=71) if sglang_oracle.is_defined(item)]
    for item in items[:12]:
        sglang_oracle.check(item, theirs(op), DEVICE)


@pytest.mark.parametrize("item", EXPANDED, ids=lambda item: item.name)
def test_seqlens_expand(item):
    expand = importlib.import_module(PAD).seqlens_expand_triton
    sglang_oracle.check_expansion(item, expand, DEVICE)


def test_a_real_backend_takes_ours():
    """Installed and warmed up; called as SGLang's backend calls, also into a captured graph."""
    manager = importlib.import_module(MANAGER)
    bridge.install()

    class Backend(manager.DSAMetadataManagementMixin):
        dsa_index_kpool, physical_page_size, dsa_index_topk = 1, 64, 2048

    backend = Backend()
    backend._init_kpool_metadata_fusion()
    for op, name in (
        ("decode", "_fused_decode_metadata"),
        ("verify", "_fused_verify_metadata"),
        ("draft_extend", "_fused_draft_extend_metadata"),
    ):
        item = BY_NAME[f"{op}_basic_ps64"]
        built = Built(item, DEVICE)
        getattr(backend, name)(**built.arguments)
        built.check(expected(item))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            getattr(backend, name)(**built.arguments)
        built.poison()
        graph.replay()
        built.check(expected(item))
    status = bridge.status()
    assert status["installed"] is True
    assert status["built_before"] == []
    assert status["devices"][f"cuda:{torch.cuda.current_device()}"] == "CUDA C++"


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_spawned_worker_does_not_touch_the_gpu(value, source, tmp_path, monkeypatch):
    """SGLang loads plugins in each process, before a worker has chosen its GPU."""
    monkeypatch.setenv("CUPY_NSA_META_SGLANG", value)
    entry_points = sglang_files.write_entry_points(tmp_path / "site")
    status = sglang_files.run_worker(source, entry_points, is_stand_in=False)
    assert status["installed"] is (value == "1")
    assert status["used_cuda"] is False
