"""bench.py --suite on the CPU: statistics, turns, refusals, stored rows, table, pictures, targets."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
from bench_fakes import CPU, SMALL, FakeGpu, fused_rows, stored_row
from benchmarks import (
    BenchError,
    build,
    draft_extend,
    floor,
    fused_providers,
    measure,
    plot,
    providers,
    readme,
    report,
    suites,
    targets,
)
from benchmarks.draft_extend import DraftExtendCase, long_case, serving_case
from benchmarks.measure import Absent, Bound, Contest, Effort, Results
from benchmarks.session import Session
from benchmarks.suites import cold, growth_bs, growth_t, seed
from cupy_nsa_meta import _module, fill_draft_extend_metadata_python, reference
from cupy_nsa_meta._draft_extend_args import ONE_LAUNCH_MAX_BS

ROOT = Path(__file__).resolve().parent.parent


def python_bound(case: DraftExtendCase, fill=fill_draft_extend_metadata_python) -> Bound:
    def call(total: int = 0) -> int:
        return fill(*providers.arguments(case))

    return Bound(run=lambda: call(), enqueue=call, record=call)


def small_case(bs: int = 5) -> DraftExtendCase:
    return serving_case(bs, 64, CPU, seed=3)


def contest(case, bounds, results, effort=SMALL, **options) -> Contest:
    return Contest(case, bounds, FakeGpu(), results, "test", effort, **options)


# ---- Statistics and turns -----------------------------------------------------------------------


def test_summary():
    samples = list(range(1, 102))
    assert measure.summary(samples) == {"median": 51.0, "p20": 21.0, "p80": 81.0, "count": 101}
    assert measure.summary([2.0])["p80"] == 2.0


@pytest.mark.parametrize("count", [1, 2, 5, 14])
def test_everybody_has_a_turn_in_each_round_and_every_place(count):
    rounds = [measure.turns(count, idx) for idx in range(4 * count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    for place in range(count):
        assert {order[place] for order in rounds} == set(range(count))
    if count > 2:
        behind = {(a, b) for order in rounds for a, b in pairwise(order)}
        assert all({(a, b), (b, a)} <= behind for a, b in behind), "both ways round"


def test_turns_of_nobody():
    assert measure.turns(0, 3) == []


# ---- Cases --------------------------------------------------------------------------------------


def test_lengths_change_at_every_step_and_stay_in_bounds():
    case = small_case(33)
    seen = set()
    for _ in range(8):
        before = case.extend.clone(), case.seq.clone()
        case.advance()
        assert not (torch.equal(case.extend, before[0]) and torch.equal(case.seq, before[1]))
        assert case.total == int(case.extend.sum()) <= case.capacity == case.max_rows
        assert 1 <= int(case.extend.min()) <= int(case.extend.max()) <= draft_extend.MAX_EXTEND
        assert bool((case.seq >= case.extend).all())
        seen.add(case.total)
    assert len(seen) > 1, "the total changes, too"


@pytest.mark.parametrize(("bs", "rows"), [(1, 1024), (7, 1000), (1024, 1024), (1024, 5000)])
def test_a_long_case_has_exactly_its_rows(bs, rows):
    case = long_case(bs, rows, 64, CPU)
    seqs = set()
    for _ in range(4):
        assert case.total == case.capacity == rows == int(case.extend.sum())
        seqs.add(tuple(case.seq[:5].tolist()))
        case.advance()
    assert len(seqs) > 1


def test_the_longest_case_fits_int32():
    extends = np.array([[draft_extend.INT32_MAX]])
    # No 16 GiB here: the lengths alone.
    seqs = np.minimum(extends, draft_extend.INT32_MAX - draft_extend.MAX_KV) + draft_extend.MAX_KV
    assert seqs.max() <= draft_extend.INT32_MAX
    assert draft_extend.bytes_needed(draft_extend.INT32_MAX) > 1 << 34
    assert not draft_extend.fits(draft_extend.INT32_MAX, 1 << 34)
    assert draft_extend.fits(1 << 20, 1 << 34)


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_the_check_in_chunks_is_the_reference(chunk, monkeypatch):
    case = serving_case(40, 50, CPU)
    expected = reference.draft_extend(case.extend, case.seq, 50)
    monkeypatch.setattr(draft_extend, "REFERENCE_MAX_ROWS", 0)
    monkeypatch.setattr(draft_extend, "CHUNK_ROWS", chunk)
    runs = list(case._expected())
    for idx, rows in enumerate(expected):
        assert torch.equal(torch.cat([run[1][idx] for run in runs]), rows)


def wrong_row(*arguments):
    total = fill_draft_extend_metadata_python(*arguments)
    arguments[3][total - 1] += 1
    return total


def wrong_clamp(*arguments):
    total = fill_draft_extend_metadata_python(*arguments)
    arguments[4][0] += 1
    return total


def wrong_total(*arguments):
    return fill_draft_extend_metadata_python(*arguments) + 1


def tensor_total(*arguments):
    return torch.tensor(fill_draft_extend_metadata_python(*arguments))


def writes_behind(*arguments):
    total = fill_draft_extend_metadata_python(*arguments)
    arguments[4][total:] = 0
    return total


def writes_an_input(*arguments):
    total = fill_draft_extend_metadata_python(*arguments)
    arguments[1][0] += 1
    return total


PLANTED = {
    wrong_row: r"out_seqlens_expanded\[\d+\]: expected \d+, got \d+",
    wrong_clamp: r"out_nsa_cache_seqlens\[0\]: expected",
    wrong_total: r"returned total: expected \d+, got \d+",
    tensor_total: r"returned total: expected \d+, got tensor",
    writes_behind: "out_nsa_cache_seqlens: expected no write behind row",
    writes_an_input: "seq_lens, an input: expected no write",
}


@pytest.mark.parametrize("fill", PLANTED, ids=lambda fill: fill.__name__)
def test_a_wrong_result_is_never_timed(fill):
    case, results = small_case(), Results()
    bounds = {"right": python_bound(case), "wrong": python_bound(case, fill)}
    measured = contest(case, bounds, results)
    assert list(measured.end_to_end()) == ["right"]
    assert results.mismatches == 1
    with pytest.raises(AssertionError, match=r"test, bs 5 .*, end_to_end_us: " + PLANTED[fill]):
        raise AssertionError(results.first_mismatches["wrong"])
    if "total" not in fill.__name__:  # an enqueue returns nothing
        assert list(measured.host()) == ["right"]
        assert list(measured.gpu()) == ["right"]
        assert results.mismatches == 3
    assert {row["provider"] for row in results.rows} == {"right"}


def test_a_result_that_turns_wrong_while_timed_loses_its_times():
    case, results = small_case(), Results()
    calls = []

    def later_wrong(*arguments):
        calls.append(0)
        return (wrong_row if len(calls) > 12 else fill_draft_extend_metadata_python)(*arguments)

    bounds = {"later": python_bound(case, later_wrong), "right": python_bound(case)}
    assert list(contest(case, bounds, results).end_to_end()) == ["right"]
    assert results.mismatches == 1
    assert [row["provider"] for row in results.rows] == ["right"]


def test_a_failing_provider_is_absent_with_its_reason():
    case, results = small_case(), Results()

    def fails(*arguments):
        raise RuntimeError("planted\nfault")

    bounds = {"fails": python_bound(case, fails), "right": python_bound(case)}
    measured = contest(case, bounds, results)
    for metric in (measured.end_to_end, measured.host, measured.gpu):
        assert list(metric()) == ["right"]
    assert results.mismatches == 0
    assert results.really_absent() == {"fails": "raised RuntimeError: planted fault"}
    assert results.all_notes() == []


def test_a_lost_device_ends_the_run():
    case, results = small_case(), Results()
    measured = contest(case, {}, results)

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    def fails(*arguments):
        measured.device.synchronize = lost
        raise RuntimeError("planted")

    measured.bounds = {"fails": python_bound(case, fails)}
    with pytest.raises(measure.DeviceLost, match="the device failed under fails: an illegal"):
        measured.end_to_end()


def test_calls_by_turns_on_changed_lengths():
    case, results = small_case(), Results()
    log = []

    def logging(name):
        def run():
            log.append((name, tuple(case.seq.tolist())))
            return fill_draft_extend_metadata_python(*providers.arguments(case))

        return Bound(run=run)

    ticks = []
    measured = contest(
        case, {"a": logging("a"), "b": logging("b")}, results, tick=lambda: ticks.append(0)
    )
    samples = measured.end_to_end()
    assert len(ticks) == SMALL.rounds
    assert {len(times) for times in samples.values()} == {SMALL.rounds * SMALL.block}
    assert all(before[1] != after[1] for before, after in pairwise(log))
    block = SMALL.block + measure.BLOCK_WARMUP
    timed = "".join(name for name, _ in log[-2 * SMALL.rounds * block :])
    assert timed == "a" * block + "b" * block + "b" * block + "a" * block


def test_slow_providers_get_shorter_blocks(monkeypatch):
    case = small_case()
    measured = contest(case, {}, Results(), Effort(rounds=1, block=50))
    monkeypatch.setattr(measured, "_block", lambda *args, **kwargs: [1500.0, 1600.0])
    assert measured._block_length(measure.END_TO_END, Bound()) == 5
    monkeypatch.setattr(measured, "_block", lambda *args, **kwargs: [300.0])
    assert measured._block_length(measure.END_TO_END, Bound()) == 25
    monkeypatch.setattr(measured, "_block", lambda *args, **kwargs: [10.0])
    assert measured._block_length(measure.END_TO_END, Bound()) == 50


def test_the_total_told_to_an_enqueue_changes():
    case = small_case()
    told = []

    def enqueue(total):
        told.append((total, case.total))
        return fill_draft_extend_metadata_python(*providers.arguments(case), total_tokens=total)

    assert contest(case, {"told": Bound(enqueue=enqueue)}, Results()).host()["told"]
    assert all(total == real for total, real in told)
    assert len({total for total, _ in told}) > 1


def test_prepare_and_environment_and_own_outputs(monkeypatch):
    monkeypatch.setenv("BENCH_TEST_SET", "before")
    monkeypatch.delenv("BENCH_TEST_UNSET", raising=False)
    case, results = small_case(), Results()
    outs, prepared = [], []

    def prepare():
        prepared.append(0)
        outs[:] = [torch.empty(case.capacity, dtype=torch.int32) for _ in range(2)]

    def run():
        assert (os.environ["BENCH_TEST_SET"], os.environ["BENCH_TEST_UNSET"]) == ("1", "0")
        return fill_draft_extend_metadata_python(case.extend, case.seq, case.topk, *outs)

    environ = {"BENCH_TEST_SET": "1", "BENCH_TEST_UNSET": "0"}
    bound = Bound(run=run, prepare=prepare, outputs=lambda: tuple(outs), environ=environ)
    assert contest(case, {"own": bound}, results).end_to_end()["own"]
    assert results.mismatches == 0
    assert len(prepared) > SMALL.rounds * SMALL.block
    assert os.environ["BENCH_TEST_SET"] == "before"
    assert "BENCH_TEST_UNSET" not in os.environ


def test_the_hit_rate_of_the_launch_cache():
    case, results = small_case(), Results()
    info = {"hits": 0, "misses": 0, "captures": 0, "size": 1}

    def run():
        calls = info["hits"] + info["misses"]
        info["misses" if calls % 4 == 3 else "hits"] += 1
        return fill_draft_extend_metadata_python(*providers.arguments(case))

    measured = contest(case, {"a": Bound(run=run)}, results, cache_info=lambda: dict(info))
    measured.end_to_end()
    (part,) = results.launch_cache
    calls = SMALL.rounds * (SMALL.block + measure.BLOCK_WARMUP)
    assert part["hits"] + part["misses"] == calls
    assert part["hit_rate"] == round(part["hits"] / calls, 4)
    assert (part["provider"], part["metric"]) == ("a", "end_to_end_us")
    assert "size" not in part


def test_gpu_time_is_per_launch(monkeypatch):
    case, results = small_case(), Results()
    measured = contest(case, {"a": python_bound(case)}, results)
    monkeypatch.setattr(measured.device, "time_us", lambda replay: 20.0)
    # 20 us per 4 launches: 4 of them fill the 20 us that a graph should take.
    assert measured.gpu() == {"a": [5.0] * SMALL.replays}


def test_what_is_captured_and_what_is_timed(monkeypatch):
    """The calls of ``measure.Gpu`` in order, against a torch.cuda that writes them down."""
    log = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, name):
            return lambda *args, **kwargs: log.append(f"{self.name}.{name}") or 2.0

    class Side:
        def __enter__(self):
            log.append("on the side stream")

        def __exit__(self, *exc_info):
            log.append("back")

    class Driver:
        """Gives handles, and notes what is called."""

        def __getattr__(self, name):
            def call(*arguments):
                log.append(name)
                given.append((name, [getattr(a, "value", a) for a in arguments]))
                if name in ("cuStreamEndCapture", "cuGraphInstantiateWithFlags"):
                    handle = arguments[0] if name != "cuStreamEndCapture" else arguments[1]
                    handle._obj.value = 7
                return refused.get(name, 0)

            return call

    refused: dict[str, int] = {}
    given: list = []
    pools: list = []
    events = iter(("begin", "end"))
    for name, value in (
        ("Event", lambda enable_timing: Fake(next(events))),
        ("Stream", lambda device: SimpleNamespace(device=device, cuda_stream=5)),
        ("MemPool", object),
        ("use_mem_pool", lambda pool, device: pools.append(pool) or nullcontext()),
        ("_sleep", lambda cycles: log.append("hold")),
        ("current_stream", lambda device: SimpleNamespace(cuda_stream=6)),
        ("stream", lambda stream: Side()),
        ("synchronize", lambda device: log.append("synchronize")),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: Driver())
    gpu = measure.Gpu(torch.device("cuda", 0))
    replay = gpu.graph(lambda: log.append("record"), 2)
    capture = ["synchronize", "on the side stream", "cuStreamBeginCapture_v2"]
    after = ["cuStreamEndCapture", "back", "cuGraphInstantiateWithFlags", "cuGraphDestroy"]
    assert log == [*capture, "record", "record", *after]
    log.clear()
    assert gpu.time_us(replay) == 2000.0
    timed = ["hold", "begin.record", "cuGraphLaunch", "end.record", "end.synchronize"]
    assert log == [*timed, "begin.elapsed_time"]
    log.clear()
    relaxed, capture_stream, current_stream = 2, 5, 6
    assert ("cuStreamBeginCapture_v2", [capture_stream, relaxed]) in given
    assert ("cuGraphLaunch", [7, current_stream]) in given
    assert pools, "what is allocated in a graph is its own"
    del replay
    gc.collect()
    assert log == ["cuGraphExecDestroy"]
    log.clear()
    with pytest.raises(ZeroDivisionError):
        gpu.graph(lambda: 1 // 0, 2)
    failed = ["cuStreamEndCapture", "cuGraphDestroy", "back"]
    assert log == [*capture, *failed], "a failed recording ends the capture"
    refused["cuGraphLaunch"] = 719
    with pytest.raises(RuntimeError, match="cuGraphLaunch failed with CUDA error 719"):
        gpu.graph(lambda: None, 2)()


def test_time_limit():
    def loops():
        with measure.time_limit(0.05, "a loop"):
            while True:
                pass

    with pytest.raises(Absent, match="a loop took longer than 0.05 s"):
        loops()
    with measure.time_limit(60, "nothing"):
        pass


def test_on_the_cpu_only_whole_calls_are_timed():
    case, results = small_case(), Results()
    plain = Contest(case, {"a": python_bound(case)}, measure.device_of(CPU), results, "test", SMALL)
    assert plain.end_to_end()["a"]
    assert plain.host() == plain.gpu() == {}
    assert results.all_notes() == []


# ---- Providers ----------------------------------------------------------------------------------


def test_names_on_the_command_line_are_those_of_the_providers():
    assert set(bench.PROVIDERS) == {*providers.PROVIDERS, *fused_providers.PROVIDERS, "floor"}
    assert set(seed.PROVIDERS) | set(growth_bs.PROVIDERS) | set(growth_t.PROVIDERS) == set(
        providers.PROVIDERS
    )
    assert set(readme.LABELS) == set(seed.PROVIDERS)


@pytest.mark.parametrize("name", ["python", "torch"])
@pytest.mark.parametrize("factor", [1, 16])
def test_forms_that_run_anywhere_are_right(name, factor):
    case = serving_case(9, 64, CPU, factor)
    results = Results()
    bound = providers.PROVIDERS[name](CPU)(case)
    measured = contest(case, {name: bound}, results)
    assert measured.end_to_end()
    assert measured.host().keys() == measured.gpu().keys()
    assert (results.mismatches, results.left_out) == (0, [])


GPU_ONLY = sorted(set(providers.PROVIDERS) - {"python", "torch", "fill"})


@pytest.mark.parametrize("name", GPU_ONLY)
def test_without_a_gpu_a_provider_says_why(name):
    with pytest.raises(Absent) as raised:
        providers.PROVIDERS[name](CPU)
    assert str(raised.value)


def stub_cuda(monkeypatch):
    """The CUDA providers over the Python loop."""
    import cupy_nsa_meta

    def stub_async(*arguments, out_total):
        fill_draft_extend_metadata_python(*arguments)
        return out_total

    class Plan:
        def __init__(self, *arguments):
            self.arguments = arguments

        def run(self):
            return fill_draft_extend_metadata_python(*self.arguments)

        def launch(self):
            self.run()

    monkeypatch.setattr(providers, "needs_cuda_backend", lambda device: None)
    for name, stub in (
        ("fill_draft_extend_metadata_cuda", fill_draft_extend_metadata_python),
        ("fill_draft_extend_metadata_async", stub_async),
        ("plan_draft_extend_metadata", Plan),
    ):
        monkeypatch.setattr(cupy_nsa_meta, name, stub, raising=False)
    monkeypatch.setattr(providers, "cache_info", lambda: {"hits": 0, "misses": 0})


OURS = {
    "cuda": {"end_to_end_us", "gpu_us"},
    "cuda-fresh": {"end_to_end_us"},
    "cuda-uncached": {"end_to_end_us"},
    "cuda-total-tokens": {"host_us"},
    "cuda-plan": {"end_to_end_us", "host_us", "gpu_us"},
    "cuda-async": {"host_us", "gpu_us"},
}


def test_the_bindings_of_our_providers(monkeypatch):
    stub_cuda(monkeypatch)
    session = Session(CPU, 64, timing=FakeGpu(), effort=SMALL)
    measured = session.contest("seed", small_case(), tuple(OURS))
    measured.end_to_end()
    measured.host()
    measured.gpu()
    assert session.results.left_out == []
    assert session.results.mismatches == 0
    found = {name: set() for name in OURS}
    for row in session.results.rows:
        found[row["provider"]].add(row["metric"])
    assert found == OURS


def test_fresh_outputs_never_repeat(monkeypatch):
    stub_cuda(monkeypatch)
    bound = providers.load_cuda_fresh(CPU)(small_case())
    seen = set()
    for _ in range(5000):
        bound.prepare()
        pointers = tuple(out.data_ptr() for out in bound.outputs())
        assert pointers not in seen
        assert all(
            pointer % 16 == base.data_ptr() % 16
            for pointer, base in zip(pointers, [out._base for out in bound.outputs()], strict=True)
        )
        seen.add(pointers)


def test_the_bare_launches_are_the_operation(fake_device, monkeypatch):
    def launch_kernel(function, grid, *numbers):
        *_, stream, params, _ = numbers
        fake_device.launch(SimpleNamespace(params=params), stream, ((function, grid),))

    fake_device.cupy.cuda.driver = SimpleNamespace(launchKernel=launch_kernel)
    fake_device._functions = {name: (name, 256) for name in _module.KERNELS["draft_extend"]}
    monkeypatch.setattr(providers, "needs_cuda_backend", lambda device: None)
    session = Session(CPU, 64, timing=FakeGpu(), effort=SMALL)
    measured = session.contest("seed", small_case(), ("bare-graph", "bare-launch"))
    assert set(measured.end_to_end()) == set(measured.host()) == {"bare-graph", "bare-launch"}
    assert session.results.left_out == []
    assert session.results.mismatches == 0
    with pytest.raises(Absent, match="one launch"):
        providers.load_bare_launch(CPU)(small_case(ONE_LAUNCH_MAX_BS + 1))


def test_an_older_package_has_no_plans_and_no_cache(monkeypatch):
    import cupy_nsa_meta

    stub_cuda(monkeypatch)
    monkeypatch.delattr(cupy_nsa_meta, "plan_draft_extend_metadata")
    with pytest.raises(Absent, match="no plan_draft_extend_metadata"):
        providers.load_cuda_plan(CPU)
    monkeypatch.setattr(providers, "cache_info", lambda: None)
    with pytest.raises(Absent, match="no captured launches"):
        providers.load_cuda_uncached(CPU)


def test_the_seed_recipe_in_triton_is_right():
    pytest.importorskip("triton")
    code = """
import torch
from benchmarks import seed_triton
from benchmarks.draft_extend import serving_case
for bs in (1, 4, 33):
    case = serving_case(bs, 64, torch.device("cpu"))
    case.poison()
    total = seed_triton.fill(case.extend, case.seq, 64, case.out_expanded, case.out_clamped)
    assert case.difference(total) is None, case.difference(total)
"""
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- Building -----------------------------------------------------------------------------------


def test_without_nvcc_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(Absent, match="nvcc is not on the PATH"):
        build.nvcc()
    assert build.nvcc_version() is None


def test_a_failing_compiler_is_a_reason():
    with pytest.raises(Absent, match=r"python.* failed \(3\): no such header"):
        build._command(
            [
                sys.executable,
                "-c",
                "import sys; print('no such\\nheader', file=sys.stderr); sys.exit(3)",
            ]
        )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_cuda_sources_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    program = build.floor_program("-arch=sm_90")
    assert program.exists()
    written = program.stat().st_mtime_ns
    assert build.floor_program("-arch=sm_90").stat().st_mtime_ns == written, "built once"
    commands = build.extension_commands(
        build.nvcc(), "c++", "-arch=sm_90", [tmp_path / "a.o", tmp_path / "b.o"], tmp_path / "c.so"
    )
    build._command(commands[0])
    assert (tmp_path / "a.o").exists()
    assert build.toolkit_includes()
    if not torch.cuda.is_available():
        with pytest.raises(Absent, match=r"the floor program failed \(1\)"):
            floor.run(program, 10, 1)


# ---- Floor --------------------------------------------------------------------------------------


def floor_line(provider: str, metric: str, samples: list[float], bs: int = 32) -> str:
    row = {"provider": provider, "metric": metric, "case": {"bs": bs, "rows": 3 * bs}}
    return json.dumps({**row, **measure.summary(samples), "samples": samples})


def test_runs_of_the_floor_program_are_merged():
    samples = floor.Samples()
    samples.read(floor_line("floor-graph", "host_us", [1.0, 1.0, 1.0]), "seed")
    samples.read(floor_line("floor-graph", "host_us", [3.0, 3.0, 3.0, 3.0]), "fused")
    results = Results()
    for _ in range(2):  # stored again after every suite
        samples.store(results)
    (row,) = results.rows
    assert (row["suite"], row["case"]) == ("floor", {"bs": 32, "rows": 96})
    assert (row["median"], row["p20"], row["count"]) == (3.0, 1.0, 7)
    assert row["medians_of_runs"] == [1.0, 3.0]
    assert [floor.median_for(row, suite) for suite in ("seed", "fused", "cold")] == [1.0, 3.0, 3.0]


def test_a_floor_that_cannot_run_is_absent():
    samples, results = floor.Samples(), Results()
    samples.take(CPU, quick=True, suite="seed")
    samples.store(results)
    assert results.really_absent() == dict.fromkeys(floor.PROVIDERS, "the floor is a CUDA program")


# ---- Suites -------------------------------------------------------------------------------------


def test_every_suite_has_a_module():
    for name in suites.SUITES:
        assert callable(suites.load(name).run)


def session_with(*names: str) -> Session:
    loaders = {name: lambda device: lambda case: python_bound(case) for name in {*names} - {"fill"}}
    if "fill" in names:
        loaders["fill"] = providers.load_fill
    return Session(CPU, 64, timing=FakeGpu(), effort=SMALL, wanted=names, loaders=loaders)


def test_the_seed_table_suite():
    session = session_with("cuda", "python")
    seed.run(session)
    assert {row["case"]["bs"] for row in session.results.rows} == set(seed.BATCH_SIZES)
    assert {row["metric"] for row in session.results.rows} == {"end_to_end_us", "host_us", "gpu_us"}
    assert len(session.results.rows) == len(seed.BATCH_SIZES) * 2 * 3


def test_growth_in_bs(monkeypatch):
    monkeypatch.setattr(growth_bs, "POINTS", (1, 4))
    session = session_with("cuda", "torch")
    growth_bs.run(session)
    rows = session.results.rows
    assert {(row["case"]["bs"], row["case"]["capacity_factor"]) for row in rows} == {
        (bs, factor) for bs in (1, 4) for factor in (1, 16)
    }
    for row in rows:
        if row["case"]["capacity_factor"] == 16:
            assert row["provider"] == "cuda"
            assert row["case"]["capacity"] > 10 * row["case"]["rows"]
    assert {row["provider"] for row in rows if row["metric"] == "end_to_end_us"} == {"cuda"}


def test_growth_in_rows_and_bandwidth(monkeypatch):
    monkeypatch.setattr(growth_t, "POINTS", (1024, 4096, 1 << 40))
    session = session_with("cuda", "fill")
    growth_t.run(session)
    rows = session.results.rows
    assert {(row["case"]["rows"], row["case"]["bs"]) for row in rows} == {
        (n, bs) for n in (1024, 4096) for bs in (1, 1024)
    }
    assert len(session.results.notes) == 2
    assert "1,099,511,627,776 rows do not fit the memory" in session.results.notes[0]
    by_key = {(r["provider"], r["case"]["rows"], r["case"]["bs"], r["metric"]): r for r in rows}
    for provider in ("cuda", "fill"):
        us = by_key[provider, 4096, 1, "gpu_us"]
        bandwidth = by_key[provider, 4096, 1, "gb_per_s"]
        assert bandwidth["p80"] == pytest.approx(8 * 4096 / (us["p20"] * 1e-6) / 1e9, rel=1e-3)


def test_a_provider_that_cannot_be_bound_is_left_out():
    def load(device):
        def bind(case):
            if case.bs > 4:
                raise Absent("too many requests")
            return python_bound(case)

        return bind

    session = Session(CPU, 64, timing=FakeGpu(), effort=SMALL, loaders={"some": load})
    for bs in (4, 5):
        session.contest("test", small_case(bs), ["some"]).end_to_end()
    assert session.results.really_absent() == {}
    assert session.results.all_notes()[0].startswith("test, bs 5 ")
    assert session.results.all_notes()[0].endswith(": some: too many requests")


# ---- Cold start ---------------------------------------------------------------------------------


def test_a_cold_start_in_a_fresh_process(tmp_path):
    seen = cold.child("python", "cpu", 64, tmp_path)
    assert seen["mismatch"] is None
    assert 0 < seen["first_call_s"] < 60
    assert [call["bs"] for call in seen["later"]] == [bs for bs, _ in cold.LATER]
    assert seen["compiled_later"] == 0


def stub_child(mismatch=None, compiled=0):
    seen_caches = []

    def child(name, device, topk, cache):
        warm = cache in seen_caches
        seen_caches.append(cache)
        later = [{"bs": 64, "rows": 190, "capacity": 200, "first_call_s": 0.001}]
        return {
            "first_call_s": 0.1 if warm else 0.5,
            "rows": 97,
            "later": later,
            "compiled_later": compiled,
            "mismatch": mismatch,
        }

    return child


def test_cold_rows(monkeypatch):
    monkeypatch.setattr(cold, "child", stub_child(compiled=1))
    session = Session(CPU, 64)
    cold.measure(session, "cuda", (3, 2), "cuda:0")
    first = {
        row["case"]["cache"]: (row["median"], row["count"])
        for row in session.results.rows
        if row["case"]["call"] == "first"
    }
    assert first == {"empty": (0.5, 3), "warm": (0.1, 2)}
    later = [row for row in session.results.rows if row["case"]["call"] == "later"]
    assert {row["case"]["cache"] for row in later} == {"empty", "warm"}
    assert all(row["metric"] == "first_call_s" for row in session.results.rows)
    assert session.results.extra["cold"] == [
        {"provider": "cuda", "processes": 5, "files_compiled_later": 5}
    ]


def test_a_wrong_cold_start_has_no_times(monkeypatch):
    monkeypatch.setattr(cold, "child", stub_child(mismatch="returned total: expected 3, got 4"))
    session = Session(CPU, 64)
    cold.measure(session, "cuda", (1, 1), "cuda:0")
    assert (session.results.rows, session.results.mismatches) == ([], 1)


def test_a_process_that_fails_is_a_reason(monkeypatch, tmp_path):
    with pytest.raises(Absent, match=r"the process failed \(1\): .*KeyError"):
        cold.child("unknown", "cpu", 64, tmp_path)
    with pytest.raises(Absent, match="printed no result"):
        cold.read("\n")
    with pytest.raises(Absent, match="no CuPy"):
        cold.read('warning\n{"absent": "no CuPy"}\n')


# ---- The command --------------------------------------------------------------------------------


def test_suites_on_the_cpu_as_json(tmp_path, capsys):
    results = tmp_path / "results.json"
    argv = ["--suite", "seed,trace", "--quick", "--device", "cpu", "--steps", "5"]
    assert bench.main([*argv, "--json", str(results)]) == 0
    out, err = capsys.readouterr()
    assert not err
    document = json.loads(results.read_text())
    assert str(tmp_path) not in results.read_text(), "names of files, not their folders"
    assert set(document["environment"]) >= {
        *("gpu", "driver", "torch", "cupy", "nvrtc", "triton", "python", "commit", "date"),
        "command",
    }
    assert document["mismatches"] == 0
    assert document["stopped"] is None
    assert document["workload"]["steps"] == 5
    assert [part["backend"] for part in document["backends"]] == ["python", "reference"]
    for row in document["rows"]:
        assert set(row) >= {*("op", "suite", "case", "provider", "metric"), "median", "p20", "p80"}
        assert row["op"] == "draft_extend"
        assert row["metric"] in measure.METRICS
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
    assert {(row["suite"], row["provider"]) for row in document["rows"]} == {
        *(("seed", "python"), ("seed", "torch"), ("trace", "python"), ("trace", "reference"))
    }
    assert set(document["absent"]) == {*GPU_ONLY, *floor.PROVIDERS} - {"empty-node"}
    for name, reason in document["absent"].items():
        assert f"{name}: absent: {reason}" in out


def test_suites_on_the_cpu_as_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pictures = tmp_path / "new folder"
    argv = ["--suite", "seed", "--quick", "--device", "cpu", f"--plot={pictures}"]
    assert bench.main(argv) == 0
    assert f"drawn: {plot.SPEEDUP}" in capsys.readouterr().out
    assert (pictures / plot.SPEEDUP).stat().st_size > 1000
    assert not (pictures / plot.GROWTH).exists(), "nothing to draw"


@pytest.mark.parametrize("folder", ["/missing/folder/x", "README.md"])
def test_a_folder_that_cannot_be_drawn_into(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    assert bench.main(["--suite", "seed", "--plot", folder]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.py: error: --plot: expected a folder, or one to be made in a")
    assert err.count("\n") == 1


def test_a_mismatch_of_a_suite_is_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(
        providers.PROVIDERS, "torch", lambda device: lambda case: python_bound(case, wrong_row)
    )
    results = tmp_path / "results.json"
    argv = ["--suite", "seed", "--quick", "--device", "cpu", "--provider", "torch,python"]
    assert bench.main([*argv, "--json", str(results)]) == 1
    out = capsys.readouterr().out
    assert "torch: MISMATCH, first in seed, bs 32 " in out
    document = json.loads(results.read_text())
    assert document["mismatches"] == 1
    assert {row["provider"] for row in document["rows"]} == {"python"}


def test_a_suite_that_fails_leaves_the_others_results(monkeypatch, tmp_path, capsys):
    def fails(session):
        raise MemoryError("planted")

    monkeypatch.setattr(growth_bs, "run", fails)
    results = tmp_path / "results.json"
    argv = ["--suite", "growth-bs,seed", "--quick", "--device", "cpu", "--provider", "python"]
    assert bench.main([*argv, "--json", str(results)]) == 1
    assert "stopped: growth-bs: raised MemoryError: planted" in capsys.readouterr().out
    assert json.loads(results.read_text())["rows"], "the seed table was stored"


BAD_OPTIONS = {
    "--suite sed": "--suite: expected one of cold, seed, .*, fused, .*, all, got 'sed'",
    "--suite seed,": "--suite: expected one of .* got ''",
    "--suite seed --provider cudda": "--provider: expected one of .* got 'cudda'",
    "--quick": "--quick: expected with --suite, got none",
    "--provider cuda": "--provider: expected with --suite, got none",
    "--plot .": "--plot: expected with --suite, got none",
    "--suite seed --json /missing/x.json": "--json: expected a file in an existing folder",
    "--suite seed --steps 3": "--steps: expected with the suite trace, got seed",
    "--suite seed,cold --trace x.csv": "--trace: expected with the suite trace, got cold, seed",
    "--suite trace --device cpu --backend cuda": "--backend cuda cannot run: ",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_status_2(options, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert bench.main(options.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    with pytest.raises(
        AssertionError, match="^bench.py: error: (argument )?" + BAD_OPTIONS[options]
    ):
        raise AssertionError(err)


def test_pictures_need_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--suite", "seed", "--plot", "."]) == 2
    assert "--plot: expected matplotlib, got none" in capsys.readouterr().err


# ---- A stored run: table, targets, pictures -----------------------------------------------------


def stored(**changes: float) -> dict:
    """A run that meets every target; ``changes`` replace end-to-end times at bs 32."""
    whole = {
        "cuda-plan": 5.5,
        "cuda": 8.0,
        "cuda-fresh": 11.0,
        "seed-triton": 95.0,
        "seed-cuda": 70.0,
        "python": 490.0,
        "torch": 120.0,
        "bare-graph": 5.4,
    }
    whole.update({name.replace("_", "-"): value for name, value in changes.items()})
    rows = [
        stored_row(
            "seed", provider, "end_to_end_us", us * factor, bs=bs, rows=3 * bs, capacity=4 * bs
        )
        for provider, us in whole.items()
        for bs, factor in ((4, 0.9), (32, 1.0), (64, 1.2))
    ]
    for provider, us in (("cuda-plan", 1.8), ("cuda-total-tokens", 6.0), ("cuda-async", 2.5)):
        rows.append(stored_row("seed", provider, "host_us", us, bs=32, rows=97, capacity=110))
    rows.append(stored_row("seed", "cuda", "gpu_us", 1.4, bs=32, rows=97, capacity=110))
    for metric, us in (("end_to_end_us", 5.3), ("host_us", 1.5)):
        rows.append(stored_row("floor", "floor-graph", metric, us, bs=32, rows=96))
    for metric, us in (("end_to_end_us", 7.6), ("host_us", 3.5)):
        rows.append(stored_row("floor", "floor-launch", metric, us, bs=32, rows=96))
    rows.append(stored_row("floor", "floor-empty", "gpu_us", 0.53, bs=0, rows=0))
    for factor in (1, 16):
        for bs in (1, 32, 256, 1024, 4096, 16384, 65536, 262144):
            us = 1.3 * max(1.0, bs / 4096)
            case = {"bs": bs, "rows": 3 * bs, "capacity_factor": factor}
            rows.append(stored_row("growth-bs", "cuda", "gpu_us", us, **case))
            rows.append(stored_row("growth-bs", "empty-node", "gpu_us", 0.6, **case))
    for bs in (1, 1024):
        for rows_ in (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 26, 1 << 30):
            us = 1.5 + rows_ * 8 / 4.5e6
            for provider, factor in (("cuda", 1.0), ("fill", 0.99)):
                rows.append(
                    stored_row("growth-t", provider, "gpu_us", us * factor, bs=bs, rows=rows_)
                )
                bandwidth = rows_ * 8 / 1000 / (us * factor)
                rows.append(
                    stored_row("growth-t", provider, "gb_per_s", bandwidth, bs=bs, rows=rows_)
                )
    for cache, seconds in (("empty", 0.6), ("warm", 0.2)):
        rows.append(
            stored_row("cold", "cuda", "first_call_s", seconds, bs=32, cache=cache, call="first")
        )
        rows.append(
            stored_row("cold", "cuda", "first_call_s", 0.002, bs=64, cache=cache, call="later")
        )
    environment = {
        "gpu": "A GPU",
        "torch": "2.11",
        "commit": "abc",
        "command": "bench.py --suite all",
    }
    return {
        "environment": environment,
        "rows": rows,
        "absent": {"sglang": "sglang is not installed"},
        "cold": [{"provider": "cuda", "processes": 2, "files_compiled_later": 0}],
        "mismatches": 0,
    }


def outcome(document: dict, what: str) -> targets.Outcome:
    (found,) = [target for target in targets.targets(document) if what in target.what]
    return found


def stored_with_fused(**changes: float) -> dict:
    document = stored(**changes)
    document["rows"] += fused_rows()
    return document


def test_targets_met():
    outcomes = targets.targets(stored_with_fused())
    assert [target.what for target in outcomes if target.met is not True] == []
    plan = outcome(stored(), "plan.run()")
    assert plan.measured == pytest.approx(5.5 / 5.3)
    assert plan.detail == "5.50 / 5.30 us; bare-graph 5.40 us, 1.02"


MISSED = {
    "plan.run() / floor-graph": {"cuda_plan": 6.2},
    "buffers met before / floor-graph": {"cuda": 9.1},
    "fresh buffers / floor-launch": {"cuda_fresh": 12.2},
    "seed-triton / drop-in": {"seed_triton": 79.0},
    "seed-cuda / drop-in": {"seed_cuda": 55.0},
    "python / drop-in": {"python": 399.0},
}


@pytest.mark.parametrize("what", MISSED)
def test_a_missed_target(what):
    assert outcome(stored(**MISSED[what]), what).met is False


def changed(document: dict, factor: float, **wanted) -> dict:
    """Multiply the medians of the rows that have these fields."""
    count = 0
    for found in document["rows"]:
        fields = {**found["case"], **found}
        if all(fields.get(name) == value for name, value in wanted.items()):
            found["median"] *= factor
            count += 1
    assert count
    return document


@pytest.mark.parametrize(
    ("what", "factor", "wanted"),
    [
        ("empty node, bs 1 - 256, capacity 16 T", 1.3, {"provider": "cuda", "suite": "growth-bs", "bs": 256, "capacity_factor": 16}),
        ("empty node, bs 1024, capacity T", 2, {"provider": "cuda", "suite": "growth-bs", "bs": 1024, "capacity_factor": 1}),
        ("empty node beside it, bs 1024, capacity T", 0.5, {"provider": "empty-node", "suite": "growth-bs", "bs": 1024, "capacity_factor": 1}),
        ("bandwidth / torch fill, >= 64M rows, bs 1024", 0.9, {"provider": "cuda", "metric": "gb_per_s", "rows": 1 << 30, "bs": 1024}),
        ("first call, empty", 2, {"cache": "empty", "call": "first"}),
        ("first call, warm", 2, {"cache": "warm", "call": "first"}),
        ("later size", 100, {"cache": "warm", "call": "later"}),
        ("growth in T, bs 1:", 3, {"provider": "cuda", "metric": "gpu_us", "rows": 1 << 14, "bs": 1}),
        ("async / floor-launch", 3, {"provider": "cuda-async"}),
    ],
)  # fmt: skip
def test_a_target_missed_by_one_row(what, factor, wanted):
    assert outcome(stored(), what).met is True
    assert outcome(changed(stored(), factor, **wanted), what).met is False


def test_the_floor_is_that_of_the_suite():
    document = stored_with_fused()
    plan, fused_plan = (
        "plan.launch() /",
        "fused: plan enqueue, told T / floor-graph enqueue, every case",
    )
    before = {what: outcome(document, what).measured for what in (plan, fused_plan)}
    for row in document["rows"]:
        if (row["provider"], row["metric"]) == ("floor-graph", "host_us"):
            row["medians_by_suite"] = {"seed": row["median"] / 2, "fused": row["median"] * 2}
    assert outcome(document, plan).measured == pytest.approx(2 * before[plan])
    assert outcome(document, fused_plan).measured == pytest.approx(before[fused_plan] / 2)


def test_kernels_compiled_later_miss_a_target():
    document = stored()
    document["cold"][0]["files_compiled_later"] = 1
    assert outcome(document, "compiled after").met is False


def test_what_was_not_measured_is_not_met():
    document = stored()
    document["rows"], document["cold"] = [], []
    outcomes = targets.targets(document)
    assert len(outcomes) == len(targets.targets(stored()))
    assert {target.met for target in outcomes} == {None}
    assert "not measured" in targets.text(outcomes)


def test_steps_of_a_curve():
    flat_then_linear = [(4**k, max(1.0, 4.0**k / 256)) for k in range(10)]
    assert targets.largest_step(flat_then_linear)[0] == pytest.approx(1.0)
    cliff = [(x, y * (3 if x >= 64 else 1)) for x, y in flat_then_linear]
    worst, where = targets.largest_step(cliff)
    assert worst == pytest.approx(3.0)
    assert where == (16, 64)
    # A steep step over a tiny distance excuses nothing beside it.
    worst, where = targets.largest_step([(256, 1.0), (257, 1.2), (512, 4.0), (1024, 4.0)])
    assert where == (257, 512)
    assert worst > 1.6
    assert targets.largest_step([(1, 1.0), (2, 9.0)]) == (None, None)


def test_targets_as_a_command(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(stored_with_fused()))
    assert targets.main([str(path)]) == 0
    path.write_text(json.dumps(stored_with_fused(cuda=80.0)))
    assert targets.main([str(path)]) == 1
    assert "NO" in capsys.readouterr().out
    assert targets.main([]) == 2


def test_the_readme_table(tmp_path, capsys):
    path, target = tmp_path / "run.json", tmp_path / "README.md"
    path.write_text(json.dumps(stored()))
    target.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    for _ in range(2):  # inserting again changes nothing
        assert readme.main([str(path), "--insert", str(target)]) == 0
        text = target.read_text()
        assert text.startswith(f"before\n{readme.BEGIN}\n| us | bs 4 | bs 32 | bs 64 | floor |")
        assert text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text
    plan = next(line for line in text.splitlines() if line.startswith("| `plan.run()`"))
    assert plan == "| `plan.run()` | 4.95 | 5.50 | 6.60 | 5.30 | 1.04 | 1.80 |  |"
    assert "| floor: empty graph node |  |  |  |  |  |  | 0.530 |" in text
    assert "A GPU, torch 2.11, commit abc. Made by `python bench.py --suite all`." in text
    assert "Not run there: sglang." in text
    assert "SGLang" not in text, "no row without a number"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    out = capsys.readouterr().out
    assert "met?" in out
    assert "plan.run() / floor-graph" in out
    assert readme.main([str(path)]) == 0
    assert "| `plan.run()` |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "{begin}", "{end}{begin}", "{begin}{end}{begin}{end}"], ids=repr
)
def test_a_readme_without_its_markers_is_left_alone(text, tmp_path, capsys):
    path, target = tmp_path / "run.json", tmp_path / "README.md"
    path.write_text(json.dumps(stored()))
    text = text.format(begin=readme.BEGIN, end=readme.END)
    target.write_text(text)
    assert readme.main([str(path), "--insert", str(target)]) == 2
    assert "expected one <!-- bench:begin -->" in capsys.readouterr().err
    assert target.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "expected JSON"), ("{}", "expected a file of bench.py"), ('{"rows": [{}]}', "expected rows with")],
)  # fmt: skip
def test_another_file_is_refused(text, message, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(text)
    for main in (readme.main, targets.main):
        assert main([str(path)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert readme.main([str(tmp_path / "missing.json")]) == 2
    assert readme.main(["--unknown"]) == 2


def test_pictures_of_a_stored_run(tmp_path):
    pytest.importorskip("matplotlib")
    document = stored()
    drawn = plot.draw(document, tmp_path / "pictures")
    assert [path.name for path in drawn] == [plot.SPEEDUP, plot.GROWTH]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    document["rows"] = []
    assert plot.draw(document, tmp_path) == []


def test_tables_have_a_floor_column_and_a_ratio():
    rows = stored()["rows"]
    lines = report.suite_tables(rows, "seed").splitlines()
    header = next(line for line in lines if line.startswith("case"))
    assert header.split()[-3:] == ["floor", "x", "floor"]
    plan = next(line for line in lines if "cuda-plan" in line and "bs 32 " in line)
    assert plan.split()[-2:] == ["5.30", "1.04"]
    bandwidth = [
        line for line in report.suite_tables(rows, "growth-t").splitlines() if "fill" in line
    ]
    assert bandwidth[-1].split()[-1] == "-", "the floor is not compared with itself"
    assert report.suite_tables(rows, "trace") == ""


def test_a_remark_for_everything_left_out():
    results = Results()
    results.leave_out("seed, bs 4", "sglang", "not\ninstalled")
    results.mismatch("seed, bs 4, end_to_end_us", "cuda", "row 3")
    results.launch_cache.append(
        {"suite": "seed", "case": {"bs": 4}, "provider": "cuda", "metric": "end_to_end_us", "hits": 3, "misses": 1, "hit_rate": 0.75}
    )  # fmt: skip
    text = report.remarks(report.suites_document({}, results))
    assert "sglang: absent: not installed" in text
    assert "cuda: MISMATCH, first in seed, bs 4, end_to_end_us: row 3" in text
    assert "hit rate 75.0% (3 hits, 1 misses)" in text


def test_bench_error_is_the_base_of_option_errors():
    with pytest.raises(BenchError):
        bench.parser().parse_args(["--suite", "none"])
