"""The fused family on a GPU: every case against the reference, graphs, streams, status."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import cupy_nsa_meta
from cases import POISON
from fused_cases import (
    BY_NAME,
    CASES,
    FUNCTIONS,
    LARGE_CASES,
    Built,
    case,
    expected,
    lengths,
    random_cases,
    shuffled,
)
from test_fused import ERRORS, MESSAGES

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def warm():
    assert torch.cuda.is_available(), "CUPY_NSA_META_REQUIRE_GPU=1, but torch sees no CUDA device"
    assert cupy_nsa_meta.is_cuda_kernel_available(), cupy_nsa_meta.get_kernel_info()["reason"]
    cupy_nsa_meta.warmup()


@pytest.fixture(autouse=True)
def no_status_from_before():
    cupy_nsa_meta.last_status()
    cupy_nsa_meta.last_status("cpu")


def run_and_check(item):
    built = Built(item, DEVICE)
    built.run()
    status = cupy_nsa_meta.last_status()
    built.check(expected(item))
    assert status == cupy_nsa_meta.last_status("cpu"), item.name
    return status


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
@pytest.mark.parametrize("backend", ["auto", "cuda", "python"])
def test_cases(backend, item, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
    assert run_and_check(item) == item.status


@pytest.mark.parametrize("item", LARGE_CASES, ids=lambda item: item.name)
def test_large_cases(item):
    assert run_and_check(item) == 0


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_thousand_random_batches(op):
    for item in random_cases(op, 1000, seed=60):
        run_and_check(item)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_random_batches_with_long_rows(op):
    for item in random_cases(op, 40, seed=61, max_bs=100, max_width=20_000):
        run_and_check(item)


@pytest.mark.parametrize(
    "name", ["draft_extend_bs_16385", "draft_extend_long_rows", "extend_prefill", "verify_bs_1024"]
)
def test_twenty_runs_are_identical(name):
    item = next(item for item in LARGE_CASES if item.name == name)
    wanted = expected(item)
    built = Built(item, DEVICE)
    for _ in range(20):
        built.poison()
        built.run()
        built.check(wanted)


@pytest.mark.usefixtures("large_memory")
def test_table_offsets_beyond_2_to_31():
    """The last request's row begins 2^31 elements and more into req_to_token and page_table_1."""
    width, rows = 1 << 20, 2050
    tokens = torch.full((rows, width), POISON, dtype=torch.int32, device=DEVICE)
    tokens[rows - 1] = torch.arange(width, device=DEVICE, dtype=torch.int32)
    table = torch.full((rows, width), POISON, dtype=torch.int32, device=DEVICE)
    pages = torch.full((rows, width // 64), POISON, dtype=torch.int32, device=DEVICE)
    seq = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    seq[-1] = width - 3
    pool = torch.full((rows,), rows - 1, dtype=torch.int64, device=DEVICE)
    ints = [torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE) for _ in range(4)]
    cupy_nsa_meta.fused_dsa_decode_metadata(
        seq, pool, tokens, ints[0], ints[1], table, ints[2], ints[3], pages, rows, width, 2048, 64
    )
    assert torch.equal(table[-1, :-3], tokens[-1, :-3])
    assert torch.equal(pages[-1], tokens[-1, ::64] // 64)
    assert (table[-1, -3:] == POISON).all()
    assert (table[:-1] == POISON).all()
    assert cupy_nsa_meta.last_status() == 0


def test_bs_100000_without_tables():
    item = case("extend", "bs_100000", "391 tiles", lengths(100_000, 0, 900, 1), lengths(100_000, 0, 4, 2),
                tables=(), pool_rows=1)  # fmt: skip
    assert run_and_check(item) == 0


# ---- Graphs and streams -------------------------------------------------------------------------


GRAPH_CASES = [
    case("decode", "graph", "", lengths(40, 0, 500, 1), width=512),
    case("verify", "graph", "", lengths(40, 0, 500, 1), next_n=4, width=512),
    case("draft_extend", "graph", "", lengths(40, 0, 500, 1), lengths(40, 0, 6, 2), width=512),
    case("draft_extend", "graph_static", "", lengths(40, 0, 500, 1), [3] * 40, width=512, static=True),
    case("extend", "graph", "", lengths(40, 0, 500, 1), lengths(40, 0, 60, 2), width=512, flattened=30_000),
    case("decode", "graph_two_launches", "", lengths(17_000, 0, 500, 1), tables=(), pool_rows=1),
]  # fmt: skip


@pytest.mark.parametrize("item", GRAPH_CASES, ids=lambda item: item.name)
@pytest.mark.parametrize("backend", ["cuda", "python"])
def test_replays_of_one_graph_with_changed_lengths(backend, item, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
    built = Built(item, DEVICE)
    built.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        built.run()
    for seed in (1, 2):
        other = shuffled(item, seed)
        new = Built(other, DEVICE)
        for name in ("seq_lens", "extend_seq_lens", "req_pool_indices"):
            if name in built.arguments:
                built.arguments[name].copy_(new.arguments[name])
        built.poison()
        graph.replay()
        built.check(expected(other))
    assert cupy_nsa_meta.last_status() == 0


def test_a_replay_reports_its_status():
    built = Built(BY_NAME["decode_basic_ps64"], DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        built.run()
        with pytest.raises(RuntimeError, match="last_status: not allowed while"):
            cupy_nsa_meta.last_status()
    graph.replay()
    assert cupy_nsa_meta.last_status() == 0
    built.arguments["req_pool_indices"][1] = 10**6
    graph.replay()
    graph.replay()
    assert cupy_nsa_meta.last_status(torch.device("cuda")) == 5
    assert cupy_nsa_meta.last_status() == 0


@pytest.mark.parametrize("backend", ["cuda", "python"])
def test_no_call_synchronises(backend, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
    built = [Built(item, DEVICE) for item in GRAPH_CASES]
    for item in built:
        item.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for item in built:
            item.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream_orders_with_the_work_before_it():
    item = BY_NAME["verify_bs_257"]
    built = Built(item, DEVICE)
    late = torch.zeros_like(built.arguments["seq_lens"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(built.arguments["seq_lens"])
        FUNCTIONS["verify"](**built.arguments | {"seq_lens": late})
    torch.cuda.current_stream().wait_stream(stream)
    built.check(expected(item))


def test_the_first_call_of_a_process_inside_a_capture_names_warmup():
    code = """
        import torch, cupy_nsa_meta
        lengths = torch.ones(2, dtype=torch.int32, device="cuda")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                cupy_nsa_meta.seqlens_expand(lengths, lengths, 2, 1)
        except RuntimeError as error:
            print(error)
        torch.cuda.synchronize()
        cupy_nsa_meta.warmup()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = cupy_nsa_meta.seqlens_expand(lengths, lengths, 2, 1)
        graph.replay()
        print(result.tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "warmup(" in done.stdout
    assert "[1, 1]" in done.stdout


# ---- The same call again ------------------------------------------------------------------------


def test_the_same_tensors_with_other_lengths_and_other_sizes():
    item = GRAPH_CASES[2]
    built = Built(item, DEVICE)
    for seed in range(5):
        other = shuffled(item, seed)
        new = Built(other, DEVICE)
        for name in ("seq_lens", "extend_seq_lens", "req_pool_indices"):
            built.arguments[name].copy_(new.arguments[name])
        built.poison()
        built.run()
        built.check(expected(other))
    # Fewer requests, columns, rows: whatever was remembered of the call before does not hold.
    for change in ({"max_seqlen_k": 100}, {"dsa_index_topk": 7}, {"physical_page_size": 128}):
        built.arguments |= change
        built.poison()
        built.run()
        host = Built(other)
        host.arguments |= {
            n: v for n, v in built.arguments.items() if not isinstance(v, torch.Tensor)
        }
        host.run()
        built.check(host.allocations)


def test_errors_come_back_although_the_call_was_good_before():
    item = BY_NAME["decode_basic_ps64"]
    built = Built(item, DEVICE)
    built.run()
    with pytest.raises(ValueError, match="cache_seqlens: expected"):
        FUNCTIONS["decode"](
            **built.arguments | {"cache_seqlens": built.arguments["cache_seqlens"][:3]}
        )
    built.arguments["cache_seqlens"].resize_(3)  # the same object, now too short
    with pytest.raises(ValueError, match="cache_seqlens: expected"):
        built.run()


# ---- Errors and status --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ERRORS if not name.startswith("device")])
def test_errors(name):
    op, change, error, message = ERRORS[name]
    built = Built(BY_NAME[f"{op}_basic_ps64"], DEVICE)
    changes = change(built.arguments)
    for key, value in changes.items():
        if isinstance(value, torch.Tensor) and not value.is_cuda:
            changes[key] = value.to(DEVICE) if value.is_contiguous() else _strided_on_gpu(value)
    with pytest.raises(error) as caught:
        FUNCTIONS[op](**built.arguments | changes)
    assert message in str(caught.value)
    assert all((allocation == POISON).all() for allocation in built.allocations.values())


_bases: dict[int, torch.Tensor] = {}


def _strided_on_gpu(tensor):
    """The same view of a copy of its storage; views of one storage stay views of one copy."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in _bases:
        elements = storage.nbytes() // tensor.element_size()
        flat = tensor.as_strided((elements,), (1,), 0)
        _bases.clear()
        _bases[storage.data_ptr()] = flat.to(DEVICE)
    base = _bases[storage.data_ptr()]
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def test_tensors_of_two_devices():
    built = Built(BY_NAME["decode_basic_ps64"], DEVICE)
    with pytest.raises(
        ValueError, match="cu_seqlens_k: expected device cuda:0 like seq_lens, got cpu"
    ):
        FUNCTIONS["decode"](
            **built.arguments | {"cu_seqlens_k": built.arguments["cu_seqlens_k"].cpu()}
        )


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("backend", ["cuda", "python"])
def test_debug_sync_raises(backend, name, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
    built = Built(BY_NAME[name], DEVICE)
    built.run()
    assert cupy_nsa_meta.last_status() == BY_NAME[name].status
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    with pytest.raises(ValueError, match=MESSAGES[name]):
        built.run()
    assert cupy_nsa_meta.last_status() == 0


def test_debug_sync_does_not_read_during_capture(monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    item = BY_NAME["draft_extend_basic_ps64"]
    built = Built(item, DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        built.run()
    built.poison()
    graph.replay()
    built.check(expected(item))


def test_seqlens_expand():
    extend = torch.tensor([3, 0, 2], dtype=torch.int32, device=DEVICE)
    seq = torch.tensor([10, 5, 1], device=DEVICE)
    assert cupy_nsa_meta.seqlens_expand(extend, seq, 5, 3).tolist() == [8, 9, 10, 0, 1]
    assert cupy_nsa_meta.seqlens_expand(extend, seq, 7, 3).tolist() == [8, 9, 10, 0, 1, 0, 0]
    assert cupy_nsa_meta.last_status() == 4
