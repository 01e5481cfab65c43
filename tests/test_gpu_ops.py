"""The operators torch.ops.nsa_meta.* on a GPU: opcheck, torch.compile, CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import cases
import cupy_nsa_meta
import fused_cases
from cases import Outputs
from cupy_nsa_meta import reference
from fused_cases import FUNCTIONS, Built
from test_ops import (
    FUSED_NAMES,
    NUM_CALLS,
    SEED_CASES,
    Graphs,
    Recorder,
    check_fused,
    check_fused_plan,
    check_seed,
    check_with_inductor,
    compiled,
    decode_into,
    operator_calls,
    public_calls,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ops = torch.ops.nsa_meta

BS, TOTAL = 24, 60  # of the batches that are replayed
NUM_REPLAYS = 8  # Inductor warms up, records, then replays


@pytest.fixture(scope="module", autouse=True)
def warm():
    assert torch.cuda.is_available(), "CUPY_NSA_META_REQUIRE_GPU=1, but torch sees no CUDA device"
    assert cupy_nsa_meta.is_cuda_kernel_available(), cupy_nsa_meta.get_kernel_info()["reason"]
    cupy_nsa_meta.warmup()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    cupy_nsa_meta.last_status(DEVICE)
    cupy_nsa_meta.last_status("cpu")
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def lengths_of_one_total(seed: int, total: int = TOTAL) -> tuple[torch.Tensor, torch.Tensor]:
    """Extend lengths that add up to ``total``, and KV lengths, on the CPU."""
    rng = np.random.default_rng(seed)
    extend = rng.multinomial(total, [1 / BS] * BS)
    seq = extend + rng.integers(0, 5000, BS)
    return torch.from_numpy(extend).to(torch.int32), torch.from_numpy(seq)


@pytest.mark.parametrize("number", range(NUM_CALLS))
def test_opcheck(number):
    name, arguments, keywords = operator_calls(DEVICE)[number]
    results = torch.library.opcheck(getattr(ops, name), arguments, keywords)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.parametrize("name", public_calls("cpu") | {"cuda": None})
def test_eager_calls_do_not_dispatch(name):
    call = public_calls(DEVICE)[name]
    with Recorder() as recorder:
        call()
    assert recorder.ours() == []


@pytest.mark.parametrize("name", public_calls("cpu") | {"cuda": None})
def test_compiled_calls_are_one_operator_in_one_graph(name):
    graphs = Graphs()
    torch.compile(public_calls(DEVICE)[name], backend=graphs, fullgraph=True, dynamic=True)()
    assert len(graphs.graphs) == 1
    assert len(graphs.operators()) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "function",
    [cupy_nsa_meta.fill_draft_extend_metadata, cupy_nsa_meta.fill_draft_extend_metadata_cuda],
)
def test_the_seed_operation_compiled(backend, function):
    fill = compiled(function, backend)
    for item in SEED_CASES:
        check_seed(fill, item, DEVICE)


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_fused_family_compiled(backend, op):
    function = compiled(FUNCTIONS[op], backend)
    for name in FUSED_NAMES:
        item = fused_cases.BY_NAME[name]
        if item.op == op:
            check_fused(function, item, DEVICE)


def test_inductor():
    check_with_inductor(DEVICE)


def test_async_compiled():
    item = cases.BY_NAME["bs_17"]
    extend, seq = item.lengths(DEVICE)
    outputs = Outputs(item, DEVICE)
    function = compiled(cupy_nsa_meta.fill_draft_extend_metadata_async, "inductor")
    outcome = function(extend, seq, item.topk, outputs.expanded, outputs.clamped)
    assert outcome.tolist() == [item.total, 0]
    outputs.check(item.expected())


def test_without_total_tokens():
    extend, seq = cases.BY_NAME["contract"].lengths(DEVICE)
    outs = [torch.full((7,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    for fullgraph in (False, True):
        function = torch.compile(cupy_nsa_meta.fill_draft_extend_metadata, fullgraph=fullgraph)
        with pytest.raises(RuntimeError, match="pass total_tokens="):
            function(extend, seq, 9, *outs)
    assert all((out == -1).all() for out in outs)


def recorded_graphs() -> int:
    """CUDA graphs that Inductor has recorded and keeps."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else sum(len(nodes) for nodes in manager.roots.values())


def test_reduce_overhead_functional():
    """Replays read the lengths of the moment; another total is another graph."""

    def step(extend, seq, total):
        expanded, clamped = ops.draft_extend_metadata(extend, seq, 2048, total_tokens=total)
        same = cupy_nsa_meta.seqlens_expand(extend, seq, total, total)
        return expanded + 1, clamped * 2, same - 1

    function = compiled(step, "inductor", mode="reduce-overhead")
    for total in (TOTAL, TOTAL + 5):
        for number in range(NUM_REPLAYS):
            extend, seq = lengths_of_one_total(number, total)
            torch.compiler.cudagraph_mark_step_begin()
            results = function(extend.to(DEVICE), seq.to(DEVICE), total)
            expanded, clamped = reference.draft_extend(extend, seq, 2048)
            for got, wanted in zip(results, (expanded + 1, clamped * 2, expanded - 1), strict=True):
                assert torch.equal(got.cpu(), wanted)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert recorded_graphs() >= 2
    assert cupy_nsa_meta.last_status() == 0


def test_reduce_overhead_keeps_the_status():
    """A replay whose lengths do not add up is seen by last_status()."""
    function = compiled(cupy_nsa_meta.seqlens_expand, "inductor", mode="reduce-overhead")
    for number in range(NUM_REPLAYS):
        extend, seq = (lengths.to(DEVICE) for lengths in lengths_of_one_total(number))
        torch.compiler.cudagraph_mark_step_begin()
        function(extend, seq, TOTAL, TOTAL)
    assert cupy_nsa_meta.last_status() == 0
    extend[3] += 1
    torch.compiler.cudagraph_mark_step_begin()
    function(extend, seq, TOTAL, TOTAL)
    assert cupy_nsa_meta.last_status() == 4


def test_reduce_overhead_into_buffers():
    """Buffers that the caller keeps: torch decides whether it records what is written into them."""
    buffers = [torch.full((TOTAL + 9,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2)]

    def step(extend, seq, expanded, clamped):
        total = cupy_nsa_meta.fill_draft_extend_metadata(
            extend, seq, 2048, expanded, clamped, total_tokens=TOTAL
        )
        return total, expanded[:TOTAL] - clamped[:TOTAL]

    function = compiled(step, "inductor", mode="reduce-overhead")
    for number in range(NUM_REPLAYS):
        extend, seq = lengths_of_one_total(number)
        torch.compiler.cudagraph_mark_step_begin()
        total, cut = function(extend.to(DEVICE), seq.to(DEVICE), *buffers)
        wanted = reference.draft_extend(extend, seq, 2048)
        assert total == TOTAL
        assert torch.equal(cut.cpu(), wanted[0] - wanted[1])
        for buffer, rows in zip(buffers, wanted, strict=True):
            assert torch.equal(buffer[:TOTAL].cpu(), rows)
            assert (buffer[TOTAL:] == -1).all()


@pytest.mark.parametrize("op", FUNCTIONS)
def test_reduce_overhead_fused(op):
    """Outputs made inside the graph; the lengths change between replays."""
    item = fused_cases.BY_NAME[f"{op}_basic_ps64"]
    source = Built(item, DEVICE)
    outputs = {
        name: value
        for name, value in source.arguments.items()
        if isinstance(value, torch.Tensor)
        and name not in ("seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token")
    }
    inputs = {name: value for name, value in source.arguments.items() if name not in outputs}

    def step(seq_lens):
        made = {
            name: torch.full(value.shape, -7, dtype=value.dtype, device=DEVICE)
            for name, value in outputs.items()
        }
        FUNCTIONS[op](**(inputs | {"seq_lens": seq_lens}), **made)
        return list(made.values())

    function = compiled(step, "inductor", mode="reduce-overhead")
    for number in range(NUM_REPLAYS):
        seq_lens = inputs["seq_lens"] + 9 * number
        torch.compiler.cudagraph_mark_step_begin()
        got = [value.clone() for value in function(seq_lens)]
        for value, wanted in zip(got, step(seq_lens), strict=True):
            assert torch.equal(value, wanted)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert recorded_graphs() >= 1


@pytest.mark.parametrize("form", ["operator", "eager", "inductor"])
def test_inside_a_cuda_graph(form):
    """torch.cuda.graph around an operator, and around compiled functions that call them."""
    extend, seq = (lengths.to(DEVICE) for lengths in lengths_of_one_total(0))
    outs = [torch.full((TOTAL + 3,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2)]

    def step(extend, seq, expanded, clamped):
        ops.fill_draft_extend_metadata(extend, seq, 2048, expanded, clamped, total_tokens=TOTAL)
        return cupy_nsa_meta.seqlens_expand(extend, seq, TOTAL, TOTAL) + 1

    function = step if form == "operator" else compiled(step, form)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(extend, seq, *outs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        more = function(extend, seq, *outs)
    for number in range(1, 5):
        new_extend, new_seq = lengths_of_one_total(number)
        extend.copy_(new_extend)
        seq.copy_(new_seq)
        graph.replay()
        wanted = reference.draft_extend(new_extend, new_seq, 2048)
        assert torch.equal(more.cpu(), wanted[0] + 1)
        for out, rows in zip(outs, wanted, strict=True):
            assert torch.equal(out[:TOTAL].cpu(), rows)
            assert (out[TOTAL:] == -1).all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_table_at_page_size_1(backend):
    """The only two arguments that may be the same memory."""

    def table() -> torch.Tensor:
        return torch.full((3, 16), -1, dtype=torch.int32, device=DEVICE)

    expected, same, viewed = table(), table(), table()
    decode_into(expected, expected, 1)
    function = compiled(decode_into, backend)
    for first, second in ((same, same), (viewed[:], viewed[:])):
        assert function(first, second, 1).tolist() == [10, 4, 1]
        assert torch.equal(first, expected)


def test_a_plan_in_a_compiled_region():
    """It is not traced: a graph break, and an error where none is allowed."""
    item = cases.BY_NAME["bs_17"]
    extend, seq = item.lengths(DEVICE)
    outputs = Outputs(item, DEVICE)
    plan = cupy_nsa_meta.plan_draft_extend_metadata(
        extend, seq, item.topk, outputs.expanded, outputs.clamped
    )

    def step(values):
        doubled = values * 2
        plan.launch()
        return doubled + 1

    values = torch.arange(3, device=DEVICE)
    with pytest.raises(RuntimeError):
        torch.compile(step, backend="eager", fullgraph=True)(values)
    for _ in range(3):
        outputs.poison()
        assert torch.equal(torch.compile(step, backend="eager")(values), values * 2 + 1)
        outputs.check(item.expected())
    assert plan.run() == item.total


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_fused_plan_in_a_compiled_region(op):
    check_fused_plan(op, DEVICE)
