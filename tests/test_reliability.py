"""``python -m benchmarks.reliability``: what of it a machine without a GPU can show."""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.reliability.__main__ as program
import cpu_kernels
import planted
from benchmarks import readme
from benchmarks.reliability import (
    KEYS,
    TOOLS,
    Settings,
    document,
    forms,
    hostility,
    processes,
    random_batches,
    sanitized,
    sanitizer,
    sections,
    soak,
    threads,
)
from cases import BY_NAME
from cases import CASES as SEED_CASES
from cupy_nsa_meta import _draft_extend_args, _fused_args, _module
from cupy_nsa_meta._status import FATAL
from fused_cases import FUNCTIONS
from fused_cases import random_cases as random_fused_cases

CPU = Settings("cpu", 600, quick=True)


def nothing(result):
    """A place for results that nobody wants."""


@pytest.fixture(autouse=True)
def as_many_threads_as_before(monkeypatch):
    """The parts leave torch one thread; that is meant for processes of their own."""
    monkeypatch.setattr(torch, "set_num_threads", nothing)


# ---- Reading the tools --------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n========= {} SUMMARY: {}\n"
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void nsa::store_row(const nsa::DraftExtendArgs &, unsigned int, int)+0x4a0 in draft_extend.cu:153
=========     by thread (16,0,0) in block (0,0,0)
=========     Access to 0x7f0a8ba00044 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f0a8ba00000 of size 68 bytes
=========         Device Frame: draft_extend_warp+0x4b0 in draft_extend.cu:544
=========
========= Program hit unspecified launch failure (error 719) on CUDA API call to cudaStreamSynchronize.
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at draft_extend_block+0x3d0 in common.cuh:196
=========     and Read access at draft_extend_block+0x410 in common.cuh:201 [64 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at draft_extend_tiled+0x1e0 in draft_extend.cu:449
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f1c5da00000
=========
========= ERROR SUMMARY: 132 errors
"""
SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at draft_extend_large+0x9d0 in common.cuh:193
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 224 errors
"""
REFUSED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("log", "errors", "warnings", "first"),
    [
        (CLEAN.format("ERROR", "0 errors"), 0, 0, None),
        (CLEAN.format("RACECHECK", "0 hazards displayed (0 errors, 0 warnings)"), 0, 0, None),
        (CLEAN.format("RACECHECK", "2 hazards displayed (0 errors, 2 warnings)"), 0, 2, None),
        (MEMCHECK, 1, 0, "Invalid __global__ write of size 4 bytes at void nsa::store_row"),
        (RACECHECK, 1, 0, "Error: Race reported between Write access at draft_extend_block"),
        (INITCHECK, 132, 0, "Uninitialized __global__ memory read of size 4 bytes at draft_ext"),
        (SYNCCHECK, 224, 0, "Barrier error detected. Divergent thread(s) in block. at draft_ex"),
    ],
)
def test_reports_are_read(log, errors, warnings, first):
    report = sanitizer.parse(log)
    assert (report.errors, report.warnings) == (errors, warnings)
    assert report.refused is None
    if first is None:
        assert report.first is None
    else:
        assert report.first.startswith(first)
        assert "in draft_extend.cu:" in report.first or "in common.cuh:" in report.first


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (REFUSED, "Error: Device not supported."),
        ("========= Internal Sanitizer Error: the tool cannot run\n", "Internal Sanitizer Error"),
    ],
)
def test_a_refusal_keeps_the_tools_words(log, words):
    assert words in sanitizer.parse(log).refused


def test_a_log_without_a_summary_is_no_clean_run():
    log = "========= COMPUTE-SANITIZER\n========= Error: couldn't find exit code.\n"
    assert sanitizer.parse(log).errors is None


# ---- Running the tools: a stand-in for the executable -------------------------------------------


class Tool:
    """compute-sanitizer as a script: what it writes for the clean package and for a planted fault."""

    SCRIPT = """#!{python}
import json, os, pathlib, subprocess, sys
words = sys.argv[1:]
if words == ["--version"]:
    print("NVIDIA (R) Compute Sanitizer\\nVersion 2025.3.1.0 (build 1) (public-release)")
    raise SystemExit
pathlib.Path({calls!r}).open("a").write(json.dumps([words, os.getcwd()]) + "\\n")
result = pathlib.Path(words[words.index("--result") + 1])
log = pathlib.Path(words[words.index("--log-file") + 1])
is_planted = "--cases" in words
log.write_text(pathlib.Path({folder!r}, "planted" if is_planted else "clean").read_text())
result.write_text(pathlib.Path({folder!r}, "result").read_text())
"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_path = folder / "calls"
        path = folder / "compute-sanitizer"
        path.write_text(
            self.SCRIPT.format(
                python=sys.executable, calls=str(self.calls_path), folder=str(folder)
            )
        )
        path.chmod(0o755)
        self.path = path

    def says(self, clean: str, fault: str, **result: object) -> None:
        (self.folder / "clean").write_text(clean)
        (self.folder / "planted").write_text(fault)
        (self.folder / "result").write_text(json.dumps(result))

    @property
    def calls(self) -> list[list]:
        return [json.loads(line) for line in self.calls_path.read_text().splitlines()]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    made = Tool(tmp_path)
    monkeypatch.setenv(sanitizer.SANITIZER_VARIABLE, str(made.path))
    return made


GOOD = {"cases": 9, "of_cases": 9, "mismatches": 0, "kernels": sanitizer.all_kernels()}
ZERO = CLEAN.format("ERROR", "0 errors")


def test_a_clean_run_whose_planted_fault_is_caught(tool):
    tool.says(ZERO, MEMCHECK, **GOOD)
    section = sanitizer.run("memcheck", 9, False, nothing)
    assert section["ok"] is True
    assert (section["errors"], section["cases"], section["tool"]) == (0, 9, "2025.3.1.0")
    fault = section["planted_fault"]
    assert fault["caught"]
    assert fault["report"].startswith("Invalid __global__ write of size 4 bytes at void nsa::store")
    (clean, at), (faulty, elsewhere) = tool.calls
    assert clean[:2] == ["--tool", "memcheck"]
    assert clean.count("--kernel-name") == len(_module.KERNELS)
    assert "kns=draft_extend" in clean
    assert "kns=fused" in clean
    assert Path(at) == sanitizer.ROOT
    assert faulty[-2:] == ["--cases", "no_slack"]
    assert Path(elsewhere) != sanitizer.ROOT  # a copy, with the fault


def test_initcheck_leaves_outputs_unwritten(tool):
    tool.says(ZERO, INITCHECK, **GOOD)
    assert sanitizer.run("initcheck", 9, False, nothing)["ok"] is True
    assert all("--fresh" in words for words, _ in tool.calls)


@pytest.mark.parametrize(
    ("clean", "fault", "changes"),
    [
        pytest.param(MEMCHECK, MEMCHECK, {}, id="errors"),
        pytest.param(ZERO, ZERO, {}, id="blind"),
        pytest.param(ZERO, INITCHECK, {}, id="another_error"),
        pytest.param(ZERO, MEMCHECK, {"mismatches": 1}, id="mismatch"),
        pytest.param(ZERO, MEMCHECK, {"kernels": ["fused"]}, id="kernels_missed"),
        pytest.param(ZERO, MEMCHECK, {"cases": 0}, id="no_case"),
        pytest.param("", MEMCHECK, {}, id="no_summary"),
    ],
)
def test_what_fails_a_tool(tool, clean, fault, changes):
    tool.says(clean, fault, **GOOD | changes)
    assert sanitizer.run("memcheck", 9, False, nothing)["ok"] is False


def test_a_tool_that_refuses_the_machine(tool):
    tool.says(REFUSED, REFUSED, cases=0)
    section = sanitizer.run("synccheck", 9, False, nothing)
    assert section["ok"] is None
    assert "Device not supported" in section["refused"]
    assert section["runtime"]
    assert document.failures({"synccheck": section}) == []
    assert "refused" in document.table({"synccheck": section})


def test_a_missing_tool_names_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv(sanitizer.SANITIZER_VARIABLE, raising=False)
    with pytest.raises(program.BenchError, match="compute-sanitizer: expected on the PATH"):
        sanitizer.find()


# ---- Planted faults -----------------------------------------------------------------------------


def compiled(sources: Path, *more: str) -> tuple[bytes, dict[str, str]]:
    """The cubin of draft_extend.cu, and the PTX of each of its kernels."""
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.nvrtc
    program = nvrtc.createProgram((sources / "draft_extend.cu").read_text(), "a.cu", (), ())
    options = ("-std=c++17", f"-I{sources}", "-DCUPY_NSA_META_SOURCES=1ull", "-arch=sm_90")
    nvrtc.compileProgram(program, (*options, *more))
    cubin, ptx = nvrtc.getCUBIN(program), nvrtc.getPTX(program).decode()
    nvrtc.destroyProgram(program)
    return cubin, {part.partition("(")[0]: part for part in ptx.split(".visible .entry ")[1:]}


@pytest.fixture(scope="module")
def own_kernels():
    return compiled(_module.source_dir())[1]


@pytest.mark.parametrize("tool_name", TOOLS)
def test_planted_faults_change_what_their_case_launches(tool_name, own_kernels, tmp_path):
    fault = sanitizer.PLANTED[tool_name]
    sanitizer.copy_package(tmp_path, fault.patch)
    changed = tmp_path / "cuda_src"
    own = _module.source_dir()
    assert sum((changed / p.name).read_bytes() != p.read_bytes() for p in own.glob("*.cu*")) == 1
    assert (tmp_path / "cupy_nsa_meta" / "_module.py").is_file()
    cubin, _ = compiled(changed, "-lineinfo")  # as under a tool
    assert cubin[:4] == b"\x7fELF"
    _, kernels = compiled(changed)  # without line numbers, which a patch may shift
    item = BY_NAME[fault.case]
    shape = _draft_extend_args.geometry(item.bs, item.total, False, True, 132)
    assert any(kernels[name] != own_kernels[name] for name, _ in shape.launches)


@pytest.mark.skipif(not cpu_kernels.has_compiler, reason="g++ is not installed")
def test_the_store_past_the_end_is_one():
    """The fault for racecheck is in test_cpu_kernels; the other two have no sanitizer on the CPU."""
    fault = sanitizer.PLANTED["memcheck"]
    executable = cpu_kernels.build("address", fault.patch)
    with pytest.raises(cpu_kernels.HarnessError, match="heap-buffer-overflow"):
        cpu_kernels.run(executable, [cpu_kernels.draft_extend_job(BY_NAME[fault.case])])


def test_a_patch_that_does_not_apply_says_so(tmp_path):
    with pytest.raises(AssertionError, match="is not once in common.cuh"):
        sanitizer.copy_package(tmp_path, planted.Patch("common.cuh", "no such text", ""))


# ---- The cases under a tool ---------------------------------------------------------------------


def without_preparations(monkeypatch):
    """Those of a process of its own stay."""
    monkeypatch.setattr(sanitized, "prepare", nothing)
    monkeypatch.setattr(sanitized, "record_kernels", set)


@pytest.mark.parametrize("fresh", [False, True])
def test_every_named_case_is_checked(fresh, monkeypatch, capsys):
    without_preparations(monkeypatch)
    names = sanitized.case_names(quick=False)
    assert {case.name for case in SEED_CASES} < set(names)
    assert sanitized.PLAN + "bs_4097" in names
    names = [name for name in names if name not in LARGE][:: 4 if fresh else 2]
    result = sanitized.run(names, CPU, fresh, nothing)
    assert (result["cases"], result["mismatches"]) == (len(names), 0), result


@pytest.mark.parametrize("num_sms", [132, 148])
def test_the_named_cases_reach_every_kernel(num_sms, monkeypatch):
    """Of the GPU's size: what a tool has not seen it cannot have found clean."""
    monkeypatch.setattr(cpu_kernels, "NUM_SMS", num_sms)
    kernels = set()
    for name in sanitized.case_names(quick=False):
        name = name.removeprefix(sanitized.PLAN)
        if name in sanitized.SEED:
            launches = cpu_kernels.draft_extend_job(sanitized.SEED[name]).launches
        else:
            call = cpu_kernels.fused_call(sanitized.FUSED[name])
            tile_sums = int(call.bs > _fused_args.ONE_LAUNCH_MAX_BS)
            launches = cpu_kernels.fused_packed(call, num_sms, tile_sums).launches
        kernels |= {kernel for kernel, _ in launches}
    assert kernels == set(sanitizer.all_kernels())


def test_a_planted_package_is_the_one_that_runs(tmp_path):
    (tmp_path / "copy").mkdir()
    sanitizer.copy_package(tmp_path / "copy", sanitizer.PLANTED["memcheck"].patch)
    (tmp_path / "copy" / "cupy_nsa_meta" / "__init__.py").write_text("raise SystemExit('copy')")
    command = [sys.executable, "-m", "benchmarks.reliability.sanitized", "--result", "x"]
    status, words = processes.run(command, 60, nothing, tmp_path / "copy")
    assert (status, words) == (1, "copy")


LARGE = {item.name for item in sanitized.fused_cases.LARGE_CASES}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_call_that_does_nothing_is_noticed(fresh, monkeypatch, capsys):
    without_preparations(monkeypatch)
    monkeypatch.setattr(sanitized, "call_seed", lambda form, batch, tensors: batch.total)
    monkeypatch.setattr(sanitized, "FUNCTIONS", dict.fromkeys(FUNCTIONS, lambda **arguments: None))
    names = ["contract", "decode_basic_ps64", "extend_contract"]
    assert sanitized.run(names, CPU, fresh, nothing)["mismatches"] == 4  # two forms of the first


def test_a_budget_ends_early_and_says_so(monkeypatch, capsys):
    without_preparations(monkeypatch)
    result = sanitized.run(["contract"] * 10, Settings("cpu", -1), False, nothing)
    assert (result["cases"], result["of_cases"]) == (0, 10)


def test_launched_kernels_are_recorded(monkeypatch):
    from cupy_nsa_meta import _launch

    seen = []
    monkeypatch.setattr(_launch.DeviceState, "launch", lambda self, *rest: seen.append(rest))
    names = forms.record_kernels()
    _launch.DeviceState.launch(None, "slot", 5, (("fused_tiles", 2), ("fused", 9)))
    assert names == {"fused", "fused_tiles"}
    assert seen == [("slot", 5, (("fused_tiles", 2), ("fused", 9)))]


# ---- Random batches -----------------------------------------------------------------------------


def test_random_batches_on_this_device(monkeypatch, capsys):
    monkeypatch.setitem(random_batches.QUICK, "gpu", 30)
    shares = [
        random_batches.on_gpu(Settings("cpu", 60, True, (number, 2)), nothing) for number in (0, 1)
    ]
    joined = random_batches.joined(shares)
    assert set(joined) == set(random_batches.FUNCTIONS)
    for counts in joined.values():
        assert (counts["batches"], counts["of_batches"], counts["mismatches"]) == (30, 30, 0)


@pytest.mark.parametrize("function", random_batches.FUNCTIONS)
def test_random_batches_see_one_byte(function, monkeypatch):
    """A byte outside the written range, or the status, or the total: none goes unnoticed."""
    if function == "seqlens_expand":
        case = next(c for c in random_fused_cases("extend", 50, 3) if c.rows > 3)
        case = random_batches.expansion(case)
        right = random_batches.cupy_nsa_meta.seqlens_expand
        monkeypatch.setattr(
            random_batches.cupy_nsa_meta, "seqlens_expand", lambda *a: right(*a).add_(1)
        )
    elif function == "seed":
        case = BY_NAME["contract"]
        right = random_batches.call_seed

        def wrong(form, batch, tensors):
            total = right(form, batch, tensors)
            tensors["out_seqlens_expanded"][-1] += 1  # behind the last row
            return total

        monkeypatch.setattr(random_batches, "call_seed", wrong)
    else:
        case = random_fused_cases(function, 1, 3)[0]
        right = random_batches.call_fused

        def wrong(form, batch, block):
            status = right(form, batch, block)
            block[3] ^= 1  # in front of the first tensor
            return status

        monkeypatch.setattr(random_batches, "call_fused", wrong)
    check = random_batches.CHECKS[function]
    assert check(case, 0, "cpu") is not None
    monkeypatch.undo()
    assert check(case, 0, "cpu") is None


@pytest.mark.skipif(not cpu_kernels.has_compiler, reason="g++ is not installed")
def test_random_batches_under_cpu_sanitizers(monkeypatch, capsys):
    monkeypatch.setitem(random_batches.QUICK, "cpu", 2)
    result = random_batches.on_cpu(CPU, nothing)
    assert set(result) == set(random_batches.FUNCTIONS)
    for counts in result.values():
        assert (counts["batches"], counts["of_batches"], counts["mismatches"]) == (2, 2, 0)

    def reported(executable, jobs):
        raise cpu_kernels.HarnessError("ERROR: AddressSanitizer: heap-buffer-overflow")

    monkeypatch.setattr(cpu_kernels, "run", reported)
    for counts in random_batches.on_cpu(CPU, nothing).values():
        assert counts["mismatches"] == 1
        assert "AddressSanitizer" in counts["first_mismatch"]


def test_small_batches_reach_several_kernels():
    if not cpu_kernels.has_compiler:
        pytest.skip("g++ is not installed")
    source = random_batches._harness_jobs("seed")
    kernels = {name for _ in range(60) for name, _ in next(source).job.launches}
    assert {
        "draft_extend_warp",
        "draft_extend_block",
        "draft_extend_block4",
        "draft_extend_large",
    } <= kernels


# ---- Threads, soak, faults ----------------------------------------------------------------------


def test_threads_check_every_result(monkeypatch, capsys):
    monkeypatch.setattr(threads, "QUICK_SECONDS", 1.0)
    result = threads.run(CPU, nothing, num_threads=2)
    assert result["ok"], result
    assert result["operations"]["eager"] > 0
    assert result["operations"]["plan"] > 0
    assert result["checked"] == sum(result["operations"].values())
    monkeypatch.setattr(threads.SeedLane, "total", lambda self, variant: -5)
    assert not threads.run(CPU, nothing, num_threads=1)["ok"]


def test_what_a_capture_records_is_what_a_replay_is_compared_with():
    for work in threads.lanes_of(3, "cpu"):
        for turn in range(3):
            for variant in (0, 1):
                work.block.copy_(work.befores[variant])
                afters = work.enqueue(turn)
                after = afters[variant].clone()
                assert torch.equal(work.block, after), (type(work).__name__, turn, variant)


def test_soak_counts_and_looks_at_memory(monkeypatch, capsys):
    monkeypatch.setattr(soak, "QUICK_DIVISOR", 1000)
    result = soak.run(CPU, nothing)
    assert result["ok"], result
    assert [result[name]["runs"] for name in soak.PARTS] == [1000, 200, 100]
    assert set(result["plan_runs"]["memory"]["growth"]) == {"host"}


def test_a_leak_is_not_flat():
    watch = soak.Watch("cpu")
    watch.look()
    with mmap.mmap(-1, 32 << 20) as held:  # not of memory that was freed before
        held.write(b"x" * len(held))
        watch.look()
    assert watch.result()["flat"] is False
    assert watch.result()["growth"]["host"] > soak.HOST_TOLERANCE


RAISED = {"seconds": 0.02, "error": "CUDARuntimeError", "message": "illegal", "result": None}
FREE = {"seconds": 0.1, "ticks": 88, "longest_gap_seconds": 0.002, "result": 5, "error": None}


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"result": 5, "error": None}, False),
        ({"error": "hang"}, False),
        ({"error": "ended", "seconds": None}, False),
        ({"seconds": 1.5}, False),
    ],
)
def test_verdicts_on_faults(changes, good):
    assert hostility.is_raised(RAISED | changes) is good


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"error": "hang"}, False),
        ({"ticks": 3}, False),
        ({"longest_gap_seconds": 0.09}, False),
    ],
)
def test_verdicts_on_waiting(changes, good):
    assert hostility.ran_meanwhile(FREE | changes) is good


def test_hang_and_bad_input_take_the_tests_functions(monkeypatch, capsys):
    class Faults:
        CALLS = ("call", "plan")
        fault_in_between = staticmethod(lambda form: RAISED)
        gil_is_free = staticmethod(lambda form: FREE if form == "call" else FREE | {"ticks": 0})

    class Hostile:
        run = staticmethod(lambda device: {"kinds": 41, "cases": 300, "failures": []})

    monkeypatch.setitem(sys.modules, "faults", Faults)
    monkeypatch.setitem(sys.modules, "hostile", Hostile)
    found = hostility.hang(CPU, nothing)
    assert found["ok"] is False
    assert found["gil_is_free"]["plan"]["ticks"] == 0
    assert found["fault_in_between"] == {"call": RAISED, "plan": RAISED}
    assert "**failed**" in document.table({"hang": found})
    Faults.gil_is_free = staticmethod(lambda form: FREE)
    assert hostility.hang(CPU, nothing)["ok"] is True
    assert hostility.bad_input(CPU, nothing)["ok"] is True
    Hostile.run = staticmethod(lambda device: {"kinds": 39, "cases": 300, "failures": []})
    assert hostility.bad_input(CPU, nothing)["ok"] is False
    Hostile.run = staticmethod(lambda device: {"kinds": 41, "cases": 300, "failures": ["decode"]})
    found = hostility.bad_input(CPU, nothing)
    assert found["ok"] is False
    assert "first: decode" in document.table({"bad_input": found})


# ---- Processes ----------------------------------------------------------------------------------


def test_a_worker_stores_its_result():
    said = []
    result = sections.run_worker("random-gpu", "cpu", 60, True, (0, 100), said.append)
    assert set(result) == set(random_batches.FUNCTIONS)
    assert result["seed"]["batches"] == 3
    assert "seed: " in "\n".join(said)


def test_a_worker_that_fails_leaves_its_last_words():
    result = sections.run_worker("no-such-part", "cpu", 60, True, say=nothing)
    assert result["ok"] is False
    assert "exit status 1" in result["failed"]
    assert "no-such-part" in result["failed"]


def test_a_process_over_its_time_is_ended():
    code = "import time; print('begun'); time.sleep(60)"
    status, words = processes.run([sys.executable, "-c", code], 1.5, nothing)
    assert status is None
    assert words == "begun"


# ---- The file -----------------------------------------------------------------------------------

ABOUT = {
    "gpu": "NVIDIA H200",
    "commit": "abc",
    "date": "2026-11-25",
    "command": "x",
    "torch": "2.11",
}
COUNTS = {"batches": 10, "of_batches": 10, "mismatches": 0, "seconds": 1.0}


def halves(which, **changes):
    return sections._as_random(dict.fromkeys(random_batches.FUNCTIONS, COUNTS | changes), which, [])


def test_parts_update_their_sections_and_keep_the_others():
    first = document.merged({}, ABOUT, "soak", {"ok": True})
    second = document.merged(first, ABOUT | {"commit": "def"}, "memcheck", {"ok": True})
    assert list(second) == ["environment", "memcheck", "soak"]  # the file's order
    assert second["soak"] == first["soak"]
    assert second["soak"]["measured"]["commit"] == "abc"
    assert second["memcheck"]["measured"] == {
        "commit": "def", "date": "2026-11-25", "command": "x", "device": "NVIDIA H200",
    }  # fmt: skip
    third = document.merged(second, ABOUT, "soak", {"ok": False})
    assert document.failures(third) == ["soak"]


def test_the_halves_of_random_are_measured_apart():
    on_gpu = document.merged({}, ABOUT, "random-gpu", halves("gpu"))
    there = {"gpu": None, "commit": "def", "date": "later", "command": "y"}
    both = document.merged(on_gpu, there, "random-cpu", halves("cpu_sanitized"))
    assert set(both["random"]["decode"]) == {"gpu", "cpu_sanitized"}
    assert both["random"]["measured"]["gpu"]["commit"] == "abc"
    assert both["random"]["measured"]["cpu_sanitized"]["commit"] == "def"
    assert both["environment"] == ABOUT  # of the machine with the GPU
    assert both["random"]["ok"] is True
    wrong = document.merged(both, ABOUT, "random-gpu", halves("gpu", mismatches=1))
    assert document.failures(wrong) == ["random"]
    right = document.merged(wrong, ABOUT, "random-gpu", halves("gpu"))
    assert document.failures(right) == []


def test_a_process_of_random_that_fails_is_a_failure(monkeypatch):
    def worker(part, device, budget, quick, share, say):
        if share[0]:
            return {"ok": False, "failed": "exit status 1: CUDA error"}
        return dict.fromkeys(random_batches.FUNCTIONS, COUNTS)

    monkeypatch.setattr(sections, "run_worker", worker)
    monkeypatch.setattr(sections.os, "cpu_count", lambda: 16)
    section = document.merged(
        {}, ABOUT, "random-gpu", sections.measure("random-gpu", "cuda", 9, True)
    )
    assert document.failures(section) == ["random"]
    assert "CUDA error" in document.table(section)


def whole():
    found = {}
    tool = {
        "ok": True, "tool": "2025.3.1.0", "scope": "shared memory only", "errors": 0, "warnings": 0,
        "cases": 213, "of_cases": 213, "kernels": ["a", "b"], "seconds": 41.3,
        "planted_fault": {"caught": True, "report": "Invalid | write"},
    }  # fmt: skip
    for name in TOOLS:
        found = document.merged(found, ABOUT, name, tool)
    found = document.merged(found, ABOUT, "random-gpu", halves("gpu"))
    found = document.merged(found, ABOUT, "random-cpu", halves("cpu_sanitized", batches=7))
    work = dict.fromkeys(threads.KINDS, 12_345)
    found = document.merged(
        found, ABOUT, "threads",
        {"ok": True, "threads": 8, "streams": 64, "seconds": 60.0, "operations": work, "mismatches": 0},
    )  # fmt: skip
    found = document.merged(
        found,
        ABOUT,
        "hang",
        {"ok": True, "fault_in_between": {"call": RAISED}, "gil_is_free": {"plan": FREE}},
    )
    found = document.merged(
        found, ABOUT, "bad_input", {"ok": True, "kinds": 44, "cases": 500, "failures": []}
    )
    memory = {"growth": {"host": 4096, "device": 0}, "flat": True}
    runs = {"runs": 10**6, "of_runs": 10**6, "mismatches": 0, "seconds": 7.1, "memory": memory}
    return document.merged(found, ABOUT, "soak", {"ok": True, "plan_runs": runs})


def test_the_table():
    found = whole()
    assert list(found) == ["environment", *KEYS]
    text = document.table(found)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 4 for line in rows)
    for words in (
        "memcheck", "213 cases, 2 kernels, 41 s", "planted fault caught: Invalid / write",
        "decode 10,", "7 of 10", "8 threads, 64 streams", "capture 12,345", "within 0.020 s", "2.0 ms at most",
        "500 calls of 44 kinds", "1,000,000 in 7 s", "host +4 KiB", "NVIDIA H200", "commit abc",
    ):  # fmt: skip
        assert words in text, words
    assert "failed" not in text
    for name in KEYS:
        part = "random-gpu" if name == "random" else name
        broken = document.merged(found, ABOUT, part, {"ok": False, "failed": "it broke"})
        assert document.failures(broken) == [name]
        assert "it broke" in document.table(broken), name


def test_the_file_is_written_after_each_part(tmp_path, monkeypatch, capsys):
    path = tmp_path / "reliability.json"
    seen = []

    def measure(part, device, budget, quick, say):
        seen.append((part, path.exists(), budget, quick))
        if part == "hang":
            raise RuntimeError("no such file")
        return {"ok": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "environment", lambda device, command: ABOUT)
    monkeypatch.setattr(sections, "measure", measure)
    arguments = ["--json", str(path), "--only", "threads,hang,racecheck", "--budget", "9"]
    assert program.main(arguments) == 1
    assert seen == [
        ("racecheck", False, 9.0, False),
        ("threads", True, 9.0, False),
        ("hang", True, 9.0, False),
    ]
    stored = json.loads(path.read_text())
    assert list(stored) == ["environment", "racecheck", "threads", "hang"]
    assert stored["hang"]["failed"] == "RuntimeError: no such file"
    monkeypatch.setattr(sections, "measure", lambda *rest: {"ok": True})
    assert program.main(["--json", str(path), "--only", "hang", "--quick"]) == 0
    stored = json.loads(path.read_text())
    assert list(stored) == ["environment", "racecheck", "threads", "hang"]
    assert stored["hang"]["ok"] is True


def test_all_parts_make_all_keys(tmp_path, monkeypatch, capsys):
    path = tmp_path / "reliability.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "environment", lambda device, command: ABOUT)
    monkeypatch.setattr(
        sections,
        "measure",
        lambda part, *rest: (
            halves("gpu" if part == "random-gpu" else "cpu_sanitized")
            if part.startswith("random")
            else {"ok": True}
        ),
    )
    assert program.main(["--json", str(path)]) == 0
    assert list(json.loads(path.read_text())) == ["environment", *KEYS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --json FILE or --table FILE"),
        (["--json", "a", "--table", "b"], "expected either"),
        (["--json", "a", "--insert", "b"], "--insert: expected with --table"),
        (["--json", "a", "--only", "nothing"], "--only: expected names of memcheck"),
        (["--json", "a", "--budget", "0"], "--budget: expected more than 0"),
        (["--json", "a", "--jobs", "0"], "--jobs: expected 1 or more"),
        (["--json", "a", "--unknown"], "unrecognized arguments"),
        (["--table", "/nowhere/file"], "expected a readable file"),
    ],
)
def test_bad_options(arguments, message, capsys):
    assert program.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_no_gpu_is_a_bad_option(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--json", str(tmp_path / "a"), "--only", "soak"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_another_json_file_is_refused(tmp_path, capsys):
    for text, message in (("{", "expected JSON"), ('{"rows": []}', "got other JSON")):
        (tmp_path / "a.json").write_text(text)
        assert program.main(["--table", str(tmp_path / "a.json")]) == 2
        assert message in capsys.readouterr().err


def test_the_table_goes_between_its_markers(tmp_path, capsys):
    stored, page = tmp_path / "a.json", tmp_path / "page.md"
    stored.write_text(json.dumps(whole()))
    own = f"{readme.BEGIN}\nx\n{readme.END}\n"
    page.write_text(f"{own}{program.BEGIN}\nold\n{program.END}\nend\n")
    assert program.main(["--table", str(stored), "--insert", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(own)
    assert text.endswith(f"{program.END}\nend\n")
    assert "1,000,000 in 7 s" in text
    assert "old" not in text
    page.write_text("no markers")
    assert program.main(["--table", str(stored), "--insert", str(page)]) == 2


# ---- With a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["random-gpu", "threads", "soak"])
def test_parts_on_a_gpu(part, monkeypatch):
    result = sections.run_worker(part, "cuda", 30, True, (0, 10), nothing)
    assert "failed" not in result, result
    if part == "random-gpu":
        assert all(c["batches"] == 30 and not c["mismatches"] for c in result.values()), result
    elif part == "soak" and "PYTEST_XDIST_WORKER" in os.environ:
        # The memory of the device is that of all processes on it: only who is alone can compare it.
        for name in soak.PARTS:
            growth = result[name]["memory"]["growth"]
            assert not result[name]["mismatches"], result
            assert growth["torch"] <= 0, result
            assert growth["host"] <= soak.HOST_TOLERANCE, result
    else:
        assert result["ok"], result
    if part == "threads":
        assert all(result["operations"][kind] > 0 for kind in threads.KINDS)


def test_fatal_batches_return_no_total():
    batch = forms.seed_batch(BY_NAME["negative_extend"])
    assert batch.status in FATAL
    assert not forms.returns_total(batch, "sync")


def test_the_stored_command_names_files_not_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "measure", lambda *_: {"ok": True})
    path = tmp_path / "out.json"
    assert program.main(["--json", str(path), "--only", "random-cpu"]) in (0, 1)
    measured = json.loads(path.read_text())["random"]["measured"]["cpu_sanitized"]
    assert measured["command"] == "benchmarks.reliability --json out.json --only random-cpu"
