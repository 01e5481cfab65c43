"""docs/add-a-kernel.md is true: its files, in a copy of the repository, pass the checks it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cpu_kernels
from cupy_nsa_meta import _launch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "add-a-kernel.md"
STEM = "clamp_lengths"
COPIED = ("bench.py", "benchmarks", "cuda_src", "cupy_nsa_meta", "pyproject.toml", "tests")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the page's code blocks."""
    return re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)


def write_files(page: str, folder: Path) -> list[str]:
    """Write the page's new files and lines; returns their paths in order."""
    written = []
    for language, text in blocks(page):
        first, _, rest = text.partition("\n")
        name = first.split()[-1]
        path = folder / name
        if language == "diff":
            lines = rest.splitlines()
            (context,) = (line[1:] for line in lines if line.startswith(" "))
            added = [line[1:] for line in lines if line.startswith("+")]
            before = path.read_text()
            assert before.count(f"{context}\n") == 1, f"{name}: {context!r} is not there once"
            path.write_text(before.replace(f"{context}\n", "\n".join([context, *added, ""])))
        else:
            assert not path.exists(), f"{name} is new"
            path.write_text(text if language == "cpp" else rest)
        written.append(name)
    return written


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the kernel of the page in it."""
    folder = tmp_path_factory.mktemp("kernel")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    written = write_files(PAGE.read_text(), folder)
    assert written == [
        "cuda_src/clamp_lengths.cu", "cupy_nsa_meta/clamp_lengths.py", "cupy_nsa_meta/_module.py",
        "cupy_nsa_meta/reference_clamp_lengths.py", "tests/clamp_lengths_cases.py",
        "tests/operations.py", "tests/operations.py", "benchmarks/suites/clamp_lengths.py",
        "benchmarks/suites/__init__.py",
    ]  # fmt: skip
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_tests(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "-m", "pytest", "-v", "-p", "no:cacheprovider", *words)


def passed(output: str) -> list[str]:
    return re.findall(r"::(\S+) PASSED", output)


def test_the_compile_tests_pick_it_up(copy):
    pytest.importorskip("cupy", reason="CuPy is not installed")
    done = run_tests(copy, "tests/test_compile.py", "-k", f"{STEM} or listed")
    assert done.returncode == 0, done.stdout
    names = passed(done.stdout)
    assert "test_every_source_file_is_listed" in names
    assert sum(STEM in name for name in names) >= 7, "once for each architecture"


@pytest.mark.skipif(not cpu_kernels.has_compiler, reason="g++ is not installed")
def test_the_kernel_tests_pick_it_up(copy):
    done = run_tests(copy, "tests/test_operations.py", "-k", f"{STEM} or twin")
    assert done.returncode == 0, done.stdout
    assert set(passed(done.stdout)) >= {
        "test_every_source_file_has_cases_and_a_python_twin",
        f"test_kernels_on_the_cpu[plain-{STEM}]",
        f"test_kernels_on_the_cpu[address-{STEM}]",
        f"test_kernels_on_the_cpu_under_thread_sanitizer[{STEM}]",
        f"test_public_function_on_the_cpu[{STEM}]",
    }


@pytest.mark.skipif(not cpu_kernels.has_compiler, reason="g++ is not installed")
def test_a_mistake_in_it_is_found(copy, tmp_path):
    """The checks are checks: without the clamp at 0 the case that needs it fails."""
    shutil.copytree(copy, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "copy" / "cuda_src" / f"{STEM}.cu"
    text = source.read_text()
    source.write_text(text.replace("max(args.seq_lens[idx], 0)", "args.seq_lens[idx]"))
    assert source.read_text() != text
    done = run_tests(tmp_path / "copy", "tests/test_operations.py", "-k", f"plain and {STEM}")
    assert done.returncode == 1
    assert "AssertionError: edges:" in done.stdout


def test_a_kernel_without_cases_fails(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "operations.py", tmp_path / "copy" / "tests")
    done = run_tests(tmp_path / "copy", "tests/test_operations.py", "-k", "twin")
    assert done.returncode == 1
    assert STEM in done.stdout


def test_the_benchmark_picks_it_up(copy):
    words = ("bench.py", "--suite", STEM, "--device", "cpu", "--quick", "--json", "out.json")
    done = run(copy, *words)
    assert done.returncode == 0, done.stderr
    document = json.loads((copy / "out.json").read_text())
    assert document["mismatches"] == 0
    measured = {(row["suite"], row["provider"]) for row in document["rows"]}
    assert measured == {(STEM, "cuda"), (STEM, "torch")}


def test_the_doctor_picks_it_up(copy):
    pytest.importorskip("cupy", reason="CuPy is not installed")
    done = run(copy, "-m", "cupy_nsa_meta", "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks[f"kernel {STEM}"]["state"] == "ok", checks


def test_the_launch_path_has_what_the_page_uses(fake_device):
    page = PAGE.read_text()
    used = set(re.findall(r"\b(_launch|state)\.(\w+)", page))
    assert len(used) >= 5
    for owner, name in used:
        assert hasattr(_launch if owner == "_launch" else fake_device, name), f"{owner}.{name}"


@pytest.mark.gpu
def test_it_runs_on_a_gpu(copy):
    done = run_tests(copy, "-m", "gpu", "tests/test_operations.py", "-k", STEM)
    assert done.returncode == 0, done.stdout
    assert passed(done.stdout) == [f"test_public_function_on_the_gpu[{STEM}]"]
    code = "import cupy_nsa_meta; cupy_nsa_meta.warmup(); print('warm')"
    assert run(copy, "-c", code).stdout == "warm\n"
    done = run(copy, "bench.py", "--suite", STEM, "--quick", "--json", "gpu.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((copy / "gpu.json").read_text())["rows"]
    assert {(row["provider"], row["metric"]) for row in rows} >= {
        ("cuda", "host_us"), ("cuda", "gpu_us"), ("torch", "gpu_us"),
    }  # fmt: skip
