"""Everything that only a GPU can show. Without one these tests are skipped and counted."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest
import torch

import cupy_nsa_meta
from backends import check_case, check_case_async
from cases import BY_NAME, CASES, MILLION, POISON, Outputs, case, random_batches
from cupy_nsa_meta import (
    _graphs,
    _launch,
    fill_draft_extend_metadata,
    fill_draft_extend_metadata_async,
    fill_draft_extend_metadata_cuda,
    fill_draft_extend_metadata_python,
    plan_draft_extend_metadata,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BACKENDS = {
    "cuda": fill_draft_extend_metadata_cuda,
    "cuda_binary": lambda *a, **k: fill_draft_extend_metadata_cuda(*a, use_adaptive=False, **k),
    "python": fill_draft_extend_metadata_python,
    "auto": fill_draft_extend_metadata,
    "triton": lambda *a, **k: cupy_nsa_meta.fill_draft_extend_metadata_inplace(*a, **k),
}


@pytest.fixture(scope="module", autouse=True)
def warm():
    assert torch.cuda.is_available(), "CUPY_NSA_META_REQUIRE_GPU=1, but torch sees no CUDA device"
    assert cupy_nsa_meta.is_cuda_kernel_available(), cupy_nsa_meta.get_kernel_info()["reason"]
    cupy_nsa_meta.warmup()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend, case):
    check_case(BACKENDS[backend], case, DEVICE)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_million_requests(backend):
    check_case(BACKENDS[backend], MILLION, DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_async(case):
    check_case_async(fill_draft_extend_metadata_async, case, DEVICE)


@pytest.mark.parametrize("name", ["contract", "total_short", "negative_extend", "empty", "bs_1025"])
@pytest.mark.parametrize("backend", ["triton", "python"])
def test_async_of_other_backends(backend, name, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
    check_case_async(fill_draft_extend_metadata_async, BY_NAME[name], DEVICE)


@pytest.mark.parametrize("name", ["contract", "zero_middle", "bs_1025", "bs_16385"])
def test_fused_simple(name):
    item = BY_NAME[name]
    expected = item.expected()
    expanded, clamped = cupy_nsa_meta.fill_draft_extend_metadata_fused_simple(
        *item.lengths(DEVICE), item.topk
    )
    assert torch.equal(expanded.cpu(), expected.expanded)
    assert torch.equal(clamped.cpu(), expected.clamped)


def test_a_thousand_random_batches():
    for item in random_batches(1000, seed=40):
        check_case(fill_draft_extend_metadata_cuda, item, DEVICE)


@pytest.mark.parametrize("backend", ["triton", "python"])
def test_random_batches_of_other_backends(backend):
    for item in random_batches(100, seed=41):
        check_case(BACKENDS[backend], item, DEVICE)


@pytest.mark.parametrize("name", ["bs_33", "bs_4097", "bs_16385"])
def test_twenty_runs_are_identical(name):
    for _ in range(20):
        check_case(fill_draft_extend_metadata_cuda, BY_NAME[name], DEVICE)


def test_the_total_of_a_huge_capacity_is_found_without_reading_it():
    check_case(
        fill_draft_extend_metadata_cuda,
        case("huge_capacity", "capacity 2^26 for 5 rows", [3, 2], [10, 4], slack=2**26),
        DEVICE,
    )


@pytest.mark.usefixtures("large_memory")
def test_rows_up_to_int32_max():
    """T = 2^31 - 1, checked chunk by chunk on the device."""
    q_lens = [2**30, 0, 5, 2**30 - 6]
    kv_lens = [2**30 + 9, 3, 70, 2**30 - 7]
    total = sum(q_lens)
    assert total == 2**31 - 1
    outs = [torch.full((total + 4,), POISON, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    extend = torch.tensor(q_lens, dtype=torch.int32, device=DEVICE)
    seq = torch.tensor(kv_lens, dtype=torch.int64, device=DEVICE)
    assert fill_draft_extend_metadata_cuda(extend, seq, 2048, *outs) == total
    at = 0
    for q, kv in zip(q_lens, kv_lens, strict=True):
        for begin in range(0, q, 1 << 27):
            rows = min(1 << 27, q - begin)
            wanted = (
                torch.arange(
                    kv - q + 1 + begin, kv - q + 1 + begin + rows, device=DEVICE, dtype=torch.int64
                )
                .clamp_(min=0)
                .to(torch.int32)
            )
            chunk = slice(at + begin, at + begin + rows)
            assert torch.equal(outs[0][chunk], wanted)
            assert torch.equal(outs[1][chunk], wanted.clamp_(max=2048))
        at += q
    for out in outs:
        assert out[total:].tolist() == [POISON] * 4


# ---- Streams, threads, graphs -------------------------------------------------------------------


def test_side_stream_orders_with_the_work_before_it():
    item = BY_NAME["bs_129"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    late = torch.zeros_like(extend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: longer than the spin
        late.copy_(extend)
        total = fill_draft_extend_metadata_cuda(
            late, seq, item.topk, outputs.expanded, outputs.clamped
        )
    assert total == item.total
    torch.cuda.current_stream().wait_stream(stream)
    outputs.check(item.expected())


def test_the_wait_behind_queued_work_frees_the_gil():
    item = BY_NAME["contract"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    ticks = 0
    stop = False

    def tick():
        nonlocal ticks
        while not stop:
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # about 200 ms
    begin, before = time.perf_counter(), ticks
    fill_draft_extend_metadata_cuda(extend, seq, item.topk, outputs.expanded, outputs.clamped)
    waited, ticked = time.perf_counter() - begin, ticks - before
    stop = True
    thread.join()
    assert waited > 0.05
    assert ticked > waited * 200


def test_threads_share_nothing():
    items = [item for item in random_batches(64, seed=50) if item.total_tokens is None]
    failures = []

    def work(number):
        try:
            torch.cuda.set_device(0)
            with torch.cuda.stream(torch.cuda.Stream()):
                for repeat in range(4):
                    for item in items[(number + repeat) % 3 :: 3]:
                        check_case(fill_draft_extend_metadata_cuda, item, DEVICE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_thread_that_never_used_cuda():
    item = BY_NAME["bs_33"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    torch.cuda.synchronize()
    totals = []
    thread = threading.Thread(
        target=lambda: totals.append(
            fill_draft_extend_metadata_cuda(
                extend, seq, item.topk, outputs.expanded, outputs.clamped
            )
        )
    )
    thread.start()
    thread.join()
    assert totals == [item.total]
    torch.cuda.synchronize()
    outputs.check(item.expected())


@pytest.mark.parametrize("name", ["bs_33", "bs_16385"])
@pytest.mark.parametrize("form", ["async", "total_tokens"])
def test_capture_and_replay_with_changed_lengths(form, name):
    first = BY_NAME[name]
    second = case(
        "second", "the same requests with other lengths", first.extend[::-1].copy(), first.seq + 3
    )
    extend, seq = first.lengths(DEVICE)
    outputs = Outputs(first, DEVICE)
    out_total = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    arguments = (extend, seq, first.topk, outputs.expanded, outputs.clamped)
    with torch.cuda.graph(graph):
        if form == "async":
            fill_draft_extend_metadata_async(*arguments, out_total=out_total)
        else:
            assert (
                fill_draft_extend_metadata_cuda(*arguments, total_tokens=first.total) == first.total
            )
    for item in (first, second, first):
        extend.copy_(torch.from_numpy(item.extend))
        seq.copy_(torch.from_numpy(item.seq))
        outputs.poison()
        graph.replay()
        outputs.check(item.expected())
        if form == "async":
            assert out_total.tolist() == [item.total, 0]


def test_a_total_cannot_be_returned_while_capturing():
    item = BY_NAME["contract"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    for fill in (
        fill_draft_extend_metadata_cuda,
        cupy_nsa_meta.fill_draft_extend_metadata_inplace,
        fill_draft_extend_metadata_python,
        fill_draft_extend_metadata,
    ):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(1, device=DEVICE)
            with pytest.raises(RuntimeError, match=r"total_tokens=.*_async"):
                fill(extend, seq, 2048, outputs.expanded, outputs.clamped)
    torch.cuda.synchronize()
    outputs.poison()
    assert (
        fill_draft_extend_metadata_cuda(extend, seq, 2048, outputs.expanded, outputs.clamped)
        == item.total
    )


@contextmanager
def capture_elsewhere():
    """Another thread captures meanwhile, in the default mode; its graph has to be right."""
    capturing, left = threading.Event(), threading.Event()
    replayed = torch.zeros(4, device=DEVICE)
    torch.cuda.synchronize()
    failures = []

    def capture():
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="global"):
                replayed.add_(1)
                capturing.set()
                assert left.wait(30)
                replayed.add_(1)
            graph.replay()
            torch.cuda.synchronize()
        except BaseException as error:
            failures.append(error)
            capturing.set()

    thread = threading.Thread(target=capture)
    thread.start()
    assert capturing.wait(30)
    try:
        yield
    finally:
        left.set()
        thread.join()
    assert not failures
    assert replayed.tolist() == [2.0] * 4


@pytest.mark.parametrize("queued", [0, 60_000_000], ids=["idle", "behind_30_ms"])
def test_a_call_while_another_thread_captures(queued):
    """A default-mode capture elsewhere forbids loading, allocating and waiting carelessly."""
    item = BY_NAME["bs_33"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    bad = torch.tensor([-1] * item.bs, dtype=torch.int32, device=DEVICE)
    with capture_elsewhere(), torch.cuda.stream(torch.cuda.Stream()):
        if queued:
            torch.cuda._sleep(queued)
        total = fill_draft_extend_metadata_cuda(
            extend, seq, item.topk, outputs.expanded, outputs.clamped
        )
        with pytest.raises(ValueError, match=r"extend_seq_lens\[0\]"):
            fill_draft_extend_metadata_cuda(bad, seq, item.topk, outputs.expanded, outputs.clamped)
    assert total == item.total
    outputs.check(item.expected())


def test_captured_launches_come_and_go_while_another_thread_captures(monkeypatch):
    """One is made, replayed and destroyed, of a call and of a plan."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    item = BY_NAME["bs_33"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    arguments = extend, seq, item.topk, outputs.expanded, outputs.clamped
    plan = plan_draft_extend_metadata(*arguments)
    cache = _graphs.Cache()  # one that has made no captures
    monkeypatch.setattr(_graphs.thread, "cache", cache)
    with capture_elsewhere(), torch.cuda.stream(torch.cuda.Stream()):
        assert [fill_draft_extend_metadata_cuda(*arguments) for _ in range(4)] == [item.total] * 4
        assert cache.hits
        assert plan.run() == item.total
        del plan
        cache.graphs.clear()
        gc.collect()
    assert not unraisable
    outputs.check(item.expected())
    assert fill_draft_extend_metadata_cuda(*arguments) == item.total


def test_an_interrupted_wait_retires_its_slot(monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_GRAPH_CACHE", "0")
    state = _launch.device_state(0)
    item = BY_NAME["contract"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    fill_draft_extend_metadata_cuda(extend, seq, 2048, outputs.expanded, outputs.clamped)
    slot = state.free_slots[-1]

    class Interrupting:
        def __getattr__(self, name):
            return getattr(real, name)

        def streamSynchronize(self, stream):
            raise KeyboardInterrupt

    real = state.runtime
    torch.cuda._sleep(40_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(state, "runtime", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            fill_draft_extend_metadata_cuda(extend, seq, 2048, outputs.expanded, outputs.clamped)
    assert slot in state._retired
    assert slot not in state.free_slots
    # A call behind it answers for itself; the late word then frees the slot.
    other = torch.tensor([4, 4], dtype=torch.int32, device=DEVICE)
    outs = torch.empty((2, 8), dtype=torch.int32, device=DEVICE)
    assert fill_draft_extend_metadata_cuda(other, seq, 2048, outs[0], outs[1]) == 8
    assert state.words[slot.index] >> _launch.EPOCH_SHIFT == slot.epoch
    monkeypatch.setattr(state, "_next_slot", iter([_launch.NUM_SLOTS] * 3))
    monkeypatch.setattr(state, "free_slots", type(state.free_slots)())
    monkeypatch.setattr(state, "_retired", type(state.free_slots)([slot]))
    assert state.take_slot() is slot
    with pytest.raises(RuntimeError, match="result slots"):
        state.take_slot()


def test_debug_sync_reads_the_status(monkeypatch):
    item = BY_NAME["total_short"]
    outputs = Outputs(item, DEVICE)
    extend, seq = item.lengths(DEVICE)
    arguments = (extend, seq, item.topk, outputs.expanded, outputs.clamped)
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    for backend in ("cuda", "triton", "python"):
        monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
        for fill in (fill_draft_extend_metadata, fill_draft_extend_metadata_async):
            with pytest.raises(ValueError, match="total_tokens: expected .* = 7, got 5"):
                fill(*arguments, total_tokens=5)
            fill(*arguments, total_tokens=7)


# ---- Foreign arrays -----------------------------------------------------------------------------


def test_cupy_arrays_share_their_memory():
    import cupy

    extend = cupy.asarray([3, 2], dtype=cupy.int32)
    seq = cupy.asarray([10, 4], dtype=cupy.int64)
    outs = cupy.full((2, 7), -1, dtype=cupy.int32)
    cupy.cuda.get_current_stream().synchronize()
    for fill in BACKENDS.values():
        outs.fill(-1)
        cupy.cuda.get_current_stream().synchronize()
        assert fill(extend, seq, 9, outs[0], outs[1]) == 5
        torch.cuda.synchronize()
        assert outs.tolist() == [[8, 9, 10, 3, 4, -1, -1], [8, 9, 9, 3, 4, -1, -1]]


def test_jax_arrays_are_inputs_only():
    jax = pytest.importorskip("jax")
    try:
        extend = jax.device_put(jax.numpy.asarray([3, 2], dtype="int32"), jax.devices("gpu")[0])
    except RuntimeError:
        pytest.skip("JAX has no GPU here")
    seq = torch.tensor([10, 4], device=DEVICE)
    outs = torch.full((2, 7), -1, dtype=torch.int32, device=DEVICE)
    extend.block_until_ready()
    assert fill_draft_extend_metadata_cuda(extend, seq, 9, outs[0], outs[1]) == 5
    out = jax.device_put(jax.numpy.zeros(8, dtype="int32"), jax.devices("gpu")[0])
    with pytest.raises(ValueError, match="out_seqlens_expanded: expected a writable array"):
        fill_draft_extend_metadata_cuda(extend, seq, 9, out, outs[1])


# ---- In processes of their own ------------------------------------------------------------------


def run_python(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


PROLOGUE = """
import torch, cupy_nsa_meta as m
e = torch.tensor([3, 2], dtype=torch.int32, device="cuda")
s = torch.tensor([10, 4], device="cuda")
a, b = torch.empty((2, 8), dtype=torch.int32, device="cuda")
"""


def test_a_capture_before_warmup_names_it():
    done = run_python(
        PROLOGUE
        + """
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            m.fill_draft_extend_metadata_async(e, s, 9, a, b)
        except RuntimeError as error:
            assert "warmup" in str(error), error
            print("named")
except RuntimeError:
    pass  # an empty graph
m.warmup()
g = torch.cuda.CUDAGraph()
with torch.cuda.graph(g):
    out = m.fill_draft_extend_metadata_async(e, s, 9, a, b)
g.replay()
print(out.tolist(), a[:5].tolist())
"""
    )
    assert done.stdout == "named\n[5, 0] [8, 9, 10, 3, 4]\n", done.stderr


def test_an_error_of_the_context_ends_the_wait():
    done = run_python(
        PROLOGUE
        + """
import cupy, time
m.warmup()
bad = cupy.RawKernel('extern "C" __global__ void bad(int* p) { *p = 1; }', "bad")
zero = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(16, 4, None), 0)
torch.cuda.synchronize()
bad((1,), (1,), (zero,), stream=cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream))
begin = time.perf_counter()
try:
    print("total", m.fill_draft_extend_metadata_cuda(e, s, 9, a, b))
except Exception as error:
    print(type(error).__name__, "illegal" in str(error).lower(), time.perf_counter() - begin < 1)
import os; os._exit(0)
""",
        PYTHONUNBUFFERED="1",
    )
    name, illegal, quick = done.stdout.split()
    assert name.startswith("CUDA"), (done.stdout, done.stderr)
    assert (illegal, quick) == ("True", "True"), done.stdout


def test_no_recompile_at_any_size():
    """One module serves every batch: after the first call nothing is compiled or loaded."""
    from cupy_nsa_meta import _module

    def refuse(*arguments):
        raise AssertionError("loaded again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_module, "load", refuse)
        for name in ("one_row", "bs_33", "bs_4097", "bs_16385", "int64_int64", "strided"):
            check_case(fill_draft_extend_metadata_cuda, BY_NAME[name], DEVICE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    with torch.cuda.device(0):
        for name in ("bs_33", "bs_16385"):
            check_case(fill_draft_extend_metadata_cuda, BY_NAME[name], "cuda:1")
