"""The pages of docs/ that are made from the code are up to date, and no variable is left out."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_nsa_meta
from cupy_nsa_meta.cli import environment

ROOT = Path(__file__).resolve().parent.parent
make_docs = runpy.run_path(str(ROOT / "docs" / "make_docs.py"))
#: How code names a variable that it reads.
READS = re.compile(
    r"""environ(?:\.get|\.setdefault|\.pop)?\s*[\(\[]\s*["'](\w+)["']|getenv\(["'](\w+)["']"""
)
#: A macro of the compile options; Python's own, passed on to child processes.
NOT_VARIABLES = {"CUPY_NSA_META_SOURCES", "CUPY_NSA_META_PROGRAM", "PYTHONPATH"}


@pytest.mark.parametrize("name", make_docs["PAGES"])
def test_the_made_pages_are_up_to_date(name):
    wanted = make_docs["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text() == wanted, "run python docs/make_docs.py"


def test_the_check_of_the_script():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "make_docs.py"), "--check"])
    assert done.returncode == 0


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in cupy_nsa_meta.__all__:
        if callable(getattr(cupy_nsa_meta, name)):
            assert page.count(f"### `{name}`\n") == 1, name
    assert "``" not in page.replace("```", ""), "reStructuredText was left"


def code_files() -> list[Path]:
    folders = ("cupy_nsa_meta", "benchmarks", "tests", "docs")
    return [
        *(path for folder in folders for path in (ROOT / folder).rglob("*.py")),
        ROOT / "bench.py",
    ]


def variables_read(path: Path) -> set[str]:
    text = path.read_text()
    found = set(re.findall(r"\bCUPY_NSA_META_[A-Z_]*[A-Z]\b", text))
    if not path.name.startswith("test_"):  # a test may invent one
        found |= {name for pair in READS.findall(text) for name in pair if name}
    return found - NOT_VARIABLES


def test_every_variable_that_is_read_is_in_the_table():
    known = set(environment.NAMES)
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in code_files()
        if path.name != "test_cli.py"  # which misspells some
        for name in variables_read(path) - known
    }
    assert not missing, "add them to VARIABLES of cupy_nsa_meta/cli/environment.py"


def test_the_search_for_variables_finds_them():
    assert "CUDA_HOME" in variables_read(ROOT / "benchmarks" / "build.py")
    assert "TRITON_INTERPRET" in variables_read(ROOT / "tests" / "conftest.py")
    assert "CUPY_NSA_META_BACKEND" in variables_read(ROOT / "cupy_nsa_meta" / "_env.py")


def test_every_variable_of_the_table_is_read_somewhere():
    text = "".join(path.read_text() for path in code_files())
    text = text.replace((ROOT / "cupy_nsa_meta/cli/environment.py").read_text(), "")
    text += (ROOT / ".ci" / "run").read_text() if (ROOT / ".ci").is_dir() else "PYTHON"
    for variable in environment.VARIABLES:
        assert variable.name in text, variable.name
    assert len(environment.NAMES) == len(environment.VARIABLES), "each once"
