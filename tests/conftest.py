"""Shared by all tests: where the GPU is, and what its absence means."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

# Without a GPU the Triton kernel runs in Triton's interpreter; set before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_device import fake_device  # noqa: F401 (a fixture)

REQUIRE_GPU = os.environ.get("CUPY_NSA_META_REQUIRE_GPU") == "1"
REQUIRE_CPU_GROUPS = os.environ.get("CUPY_NSA_META_REQUIRE_CPU_GROUPS") == "1"


@pytest.fixture
def large_memory():
    """24 GB of GPU memory; torch would keep it, and other processes may share the GPU."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of GPU memory")
    yield
    torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") and not REQUIRE_GPU:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """With CUPY_NSA_META_REQUIRE_CPU_GROUPS=1 only tests that need a GPU may be skipped."""
    report = yield
    if REQUIRE_CPU_GROUPS and report.skipped and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped, but every CPU test has to run here"
    return report
