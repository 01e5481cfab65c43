"""The wheel, the sdist, and a wheel from the sdist hold the CUDA sources and find them elsewhere."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from cupy_nsa_meta import _module

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("hatchling", reason="hatchling is not installed")
pytest.importorskip("build", reason="build is not installed")


def build(folder: Path, *arguments: str, source: Path = ROOT) -> Path:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            *arguments,
            "--outdir",
            str(folder),
            str(source),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    (made,) = folder.iterdir()
    return made


def sources() -> set[str]:
    return {path.name for path in _module.source_dir().iterdir()}


def check_wheel(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        names = archive.namelist()
    assert {Path(n).name for n in names if n.startswith("cupy_nsa_meta/cuda_src/")} == sources()
    assert "cupy_nsa_meta/py.typed" in names
    (entry_points,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
    sections = [part.splitlines() for part in (folder / entry_points).read_text().split("\n\n")]
    assert sections == [
        ["[console_scripts]", "cupy-nsa-meta = cupy_nsa_meta.__main__:main"],
        ["[sglang.srt.plugins]", "cupy_nsa_meta = cupy_nsa_meta.integrations.sglang:plugin"],
    ]
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "cuda_src"))]
    # Imported from there, with the checkout out of reach, the sources are found and are the same.
    done = run(
        folder, "-c",
        "import cupy_nsa_meta as m; from cupy_nsa_meta import _module as d; "
        "print(m.__file__); print(d.source_digest())",
    )  # fmt: skip
    where, digest = done.stdout.split()
    assert Path(where).is_relative_to(folder)
    assert digest == _module.source_digest()
    # So does the command line, less the benchmark, which the wheel does not bring.
    assert "seqlens_expanded" in run(folder, "-m", "cupy_nsa_meta", "demo").stdout
    done = run(folder, "-m", "cupy_nsa_meta", "bench", status=1)
    assert "part of the source checkout and not of the wheel" in done.stderr


def run(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", *words],
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done


def test_wheel(tmp_path):
    check_wheel(build(tmp_path / "dist", "--wheel"), tmp_path / "installed")


def test_wheel_from_the_sdist(tmp_path):
    sdist = build(tmp_path / "dist", "--sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in (
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "tests/cases.py",
        "docs/api.md",
        "examples/data_parallel.py",
    ):
        assert (unpacked / name).is_file(), name
    check_wheel(build(tmp_path / "wheel", "--wheel", source=unpacked), tmp_path / "installed")


def test_a_missing_source_folder_is_named(monkeypatch, tmp_path):
    package = tmp_path / "cupy_nsa_meta"
    package.mkdir()
    monkeypatch.setattr(_module, "__file__", str(package / "_module.py"))
    with pytest.raises(_module.KernelUnavailableError, match="CUDA sources are missing"):
        _module.source_dir()
