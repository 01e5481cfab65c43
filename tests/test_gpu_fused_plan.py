"""Plans of the fused family on a GPU: every case, changing batches, graphs, status."""

from __future__ import annotations

import pytest
import torch
from test_fused_plan import LAUNCH_ERRORS, sub_batches
from test_gpu_fused import GRAPH_CASES

import cupy_nsa_meta
from fused_cases import (
    BY_NAME,
    CASES,
    FUNCTIONS,
    LARGE_CASES,
    Built,
    expected,
    random_cases,
    shuffled,
)
from fused_plans import PLANS, batch_of, plan_of
from test_fused import MESSAGES

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def warm():
    assert torch.cuda.is_available(), "CUPY_NSA_META_REQUIRE_GPU=1, but torch sees no CUDA device"
    assert cupy_nsa_meta.is_cuda_kernel_available(), cupy_nsa_meta.get_kernel_info()["reason"]
    cupy_nsa_meta.warmup()


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
@pytest.mark.parametrize("backend", ["cuda", "python"])
def test_cases(backend, item, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
    wanted = expected(item)
    cupy_nsa_meta.last_status()
    built = Built(item, DEVICE)
    plan = plan_of(built)
    plan.launch(**batch_of(built))
    built.check(wanted)
    assert plan.status() == item.status
    assert plan.status() == 0
    built.poison()
    if item.status:
        with pytest.raises(ValueError, match="expected"):
            plan.run(**batch_of(built))
    else:
        plan.run(**batch_of(built))
    built.check(wanted)
    assert plan.status() == 0
    assert cupy_nsa_meta.last_status() == 0


@pytest.mark.parametrize("item", LARGE_CASES, ids=lambda item: item.name)
def test_large_cases(item):
    built = Built(item, DEVICE)
    plan_of(built).run(**batch_of(built))
    built.check(expected(item))


@pytest.mark.parametrize("op", PLANS)
def test_random_batches(op):
    for item in random_cases(op, 100, seed=81):
        built = Built(item, DEVICE)
        plan_of(built).launch(**batch_of(built))
        built.check(expected(item))


@pytest.mark.parametrize("op", PLANS)
@pytest.mark.parametrize("is_total_given", [True, False])
def test_one_plan_serves_changing_batches(is_total_given, op):
    """Against the function, launched with the same numbers."""
    whole, sizes = sub_batches(op)
    built = Built(whole, DEVICE)
    plan = plan_of(built)
    for bs in sizes:
        built.poison()
        direct = Built(whole, DEVICE)
        numbers, arguments = {"bs": bs}, dict(direct.arguments) | {"bs": bs}
        if "extend" in op:
            arguments["total_len"] = sum(whole.extend[:bs])
            if is_total_given:
                numbers["total_len"] = arguments["total_len"]
        if op == "extend":
            del arguments["bs"]
            numbers["pad_to"] = arguments["pad_to"] = arguments["total_len"] + 3
            for name in ("seq_lens", "extend_seq_lens"):
                arguments[name] = arguments[name][:bs]
        plan.launch(**numbers)
        FUNCTIONS[op](**arguments)
        built.check({name: tensor.cpu() for name, tensor in direct.allocations.items()})
        assert plan.status() == 0


@pytest.mark.parametrize(
    ("name", "status"),
    [("draft_extend_total_short", 4), ("draft_extend_total_long", 0), ("draft_extend_extend_negative", 2)],
)  # fmt: skip
def test_rows_from_the_device(name, status):
    item = BY_NAME[name]
    built = Built(item, DEVICE)
    plan = plan_of(built)
    plan.launch()
    built.check(expected(item))
    assert plan.status() == status


@pytest.mark.parametrize("item", GRAPH_CASES, ids=lambda item: item.name)
def test_replays_with_changed_lengths(item):
    built = Built(item, DEVICE)
    plan = plan_of(built)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.launch(**batch_of(built))
        with pytest.raises(RuntimeError, match=r"run\(\) waits"):
            plan.run(**batch_of(built))
        with pytest.raises(RuntimeError, match=r"status\(\) is not allowed"):
            plan.status()
    for seed in (1, 2):
        other = shuffled(item, seed)
        new = Built(other, DEVICE)
        for name in ("seq_lens", "extend_seq_lens", "req_pool_indices"):
            if name in built.arguments:
                built.arguments[name].copy_(new.arguments[name])
        built.poison()
        graph.replay()
        built.check(expected(other))
        built.poison()
        plan.launch(**batch_of(built))  # between two replays
        built.check(expected(other))
    assert plan.status() == 0
    built.arguments["req_pool_indices"][1] = 10**6
    graph.replay()
    assert plan.status() == (5 if item.tables else 0)


def test_a_plan_is_not_made_during_capture():
    built = Built(BY_NAME["decode_basic_ps64"], DEVICE)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.graph(graph),
        pytest.raises(RuntimeError, match="a plan is made before a CUDA graph is captured"),
    ):
        plan_of(built)


def test_launches_do_not_synchronise():
    plans = []
    for item in GRAPH_CASES:
        built = Built(item, DEVICE)
        plans.append((plan_of(built), batch_of(built)))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan, batch in plans:
            plan.launch(**batch)
            plan.launch(**batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream():
    item = BY_NAME["verify_bs_257"]
    built = Built(item, DEVICE)
    lengths = built.arguments["seq_lens"].clone()
    plan = plan_of(built)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        built.arguments["seq_lens"].zero_()
        torch.cuda._sleep(20_000_000)
        built.arguments["seq_lens"].copy_(lengths)
        plan.run()
    built.check(expected(item))


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("backend", ["cuda", "python"])
def test_run_raises_by_status(backend, name, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", backend)
    built = Built(BY_NAME[name], DEVICE)
    plan = plan_of(built)
    for _ in range(2):
        with pytest.raises(ValueError, match=MESSAGES[name]):
            plan.run(**batch_of(built))
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    with pytest.raises(ValueError, match=MESSAGES[name]):
        plan.launch(**batch_of(built))
    assert plan.status() == 0


@pytest.mark.parametrize("name", LAUNCH_ERRORS)
def test_launch_errors(name):
    op, numbers, error, message = LAUNCH_ERRORS[name]
    item = BY_NAME[f"{op}_basic_ps64"]
    built = Built(item, DEVICE)
    plan = plan_of(built)
    plan.run()
    for method in (plan.launch, plan.run):
        with pytest.raises(error) as caught:
            method(**numbers)
        assert message in str(caught.value)
    plan.run()
    built.check(expected(item))
