"""Every source file of cuda_src/ on its named cases: right, free of bad accesses and of races."""

from __future__ import annotations

import pytest

import cpu_kernels
from cupy_nsa_meta import _module
from operations import OPERATIONS

needs_compiler = pytest.mark.skipif(not cpu_kernels.has_compiler, reason="g++ is not installed")


def test_every_source_file_has_cases_and_a_python_twin():
    assert set(OPERATIONS) == set(_module.KERNELS)
    package = _module.source_dir().parent / "cupy_nsa_meta"
    for stem, operation in OPERATIONS.items():
        assert (package / f"{stem}.py").is_file(), stem
        names = [case.name for case in operation.cases]
        assert names
        assert len(set(names)) == len(names), f"{stem}: case names are unique"
        assert set(operation.race_cases) <= set(names)


def run_cases(sanitizer: str, stem: str, cases: list) -> set[str]:
    """Returns the kernels that the cases launch."""
    operation = OPERATIONS[stem]
    jobs, checks = zip(*map(operation.job, cases), strict=True)
    executable = cpu_kernels.build(sanitizer, stem=stem)
    for case, check, buffers in zip(cases, checks, cpu_kernels.run(executable, jobs), strict=True):
        try:
            check(buffers)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
    return {name for job in jobs for name, _ in job.launches}


@needs_compiler
@pytest.mark.parametrize("stem", OPERATIONS)
@pytest.mark.parametrize("sanitizer", ["plain", "address"])
def test_kernels_on_the_cpu(sanitizer, stem):
    run_cases(sanitizer, stem, OPERATIONS[stem].cases)


@needs_compiler
@pytest.mark.parametrize("stem", OPERATIONS)
def test_kernels_on_the_cpu_under_thread_sanitizer(stem):
    operation = OPERATIONS[stem]
    wanted = operation.race_cases or [case.name for case in operation.cases]
    run_cases("thread", stem, [case for case in operation.cases if case.name in wanted])


def check_all(stem: str, device: str) -> None:
    for case in OPERATIONS[stem].cases:
        OPERATIONS[stem].run(case, device)


@pytest.mark.parametrize("stem", OPERATIONS)
def test_public_function_on_the_cpu(stem):
    check_all(stem, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("stem", OPERATIONS)
def test_public_function_on_the_gpu(stem):
    check_all(stem, "cuda")
