"""Every environment variable that the package, its command line, its tests and its benchmark read.

The table of ``docs/environment.md`` is made from this one, ``doctor`` reports what is set and what
is misspelled, and a test looks for variables in the code that are missing here.
"""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "CUPY_NSA_META_"


class Variable(NamedTuple):
    """One environment variable; ``read_by`` is package, command line, tests or benchmark."""

    name: str
    read_by: str
    values: str
    effect: str


VARIABLES = (
    Variable(
        "CUPY_NSA_META_BACKEND",
        "package",
        "`auto` (default), `cuda`, `triton`, `python`",
        "the backend of `fill_draft_extend_metadata` and its async form and plan; with `triton` or "
        "`python` the fused family runs in plain torch; one that cannot run raises `RuntimeError`",
    ),
    Variable(
        "CUPY_NSA_META_DEBUG_SYNC",
        "package",
        "`0` (default), `1`",
        "every call reads its status and raises",
    ),
    Variable(
        "CUPY_NSA_META_GRAPH_CACHE",
        "package",
        "`1` (default), `0`",
        "0: calls capture and reuse no launches; plans do",
    ),
    Variable(
        "CUPY_NSA_META_SGLANG",
        "package",
        "`0` (default), `1`, `force`",
        "the plugin for SGLang: nothing, install, install on any version of SGLang",
    ),
    Variable(
        "CUPY_CACHE_DIR",
        "package",
        "a folder; default `~/.cupy/kernel_cache`",
        "where CuPy keeps compiled kernels; read when CuPy is imported",
    ),
    Variable(
        "CUPY_CACHE_IN_MEMORY",
        "package",
        "`0` (default), `1`",
        "1: CuPy keeps compiled kernels in memory only, so that every process compiles",
    ),
    Variable(
        "TRITON_INTERPRET",
        "package",
        "`0` (default), `1`",
        "1: the Triton backend runs in Triton's interpreter, on the CPU; the tests set it where "
        "there is no GPU",
    ),
    Variable(
        "NO_COLOR",
        "command line",
        "anything but the empty text",
        "no colours, on a terminal too",
    ),
    Variable("TERM", "command line", "`dumb`", "no colours"),
    Variable(
        "CUPY_NSA_META_REQUIRE_GPU",
        "tests",
        "`0` (default), `1`",
        "1: a missing GPU fails the GPU tests instead of skipping them",
    ),
    Variable(
        "CUPY_NSA_META_REQUIRE_CPU_GROUPS",
        "tests",
        "`0` (default), `1`",
        "1: a skipped test that needs no GPU is a failure",
    ),
    Variable(
        "CUPY_NSA_META_SGLANG_SOURCE",
        "tests, benchmark",
        "a folder with an unpacked `sglang/`",
        "default: SGLang 0.5.23 as installed; the tests also download it",
    ),
    Variable(
        "BENCH_COMMIT",
        "benchmark",
        "a commit",
        "the commit that is stored with the results, of a copy that does not know it",
    ),
    Variable(
        "CUDA_HOME",
        "benchmark",
        "a folder; default `CUDA_PATH`, else `/usr/local/cuda`",
        "where `bin/nvcc` is looked for when it is not on `PATH`",
    ),
    Variable("CUDA_PATH", "benchmark", "a folder", "the same, where `CUDA_HOME` is not set"),
    Variable(
        "TRITON_CACHE_DIR",
        "benchmark",
        "a folder",
        "where Triton keeps compiled kernels; the suite `cold` counts the files in it",
    ),
    Variable("PYTHON", "tests", "a command; default `python3`", "the interpreter of `.ci/run`"),
)

NAMES = frozenset(variable.name for variable in VARIABLES)


def table() -> str:
    """The variables as a Markdown table."""
    lines = ["| variable | read by | values | effect |", "|---|---|---|---|"]
    lines += [f"| `{v.name}` | {v.read_by} | {v.values} | {v.effect} |" for v in VARIABLES]
    return "\n".join(lines) + "\n"
