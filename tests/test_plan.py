"""Plans, and the cache of captured launches behind the drop-in call."""

from __future__ import annotations

import gc
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

import cupy_nsa_meta
from backends import check_case
from cases import BY_NAME, CASES, Outputs, case, random_batches
from cupy_nsa_meta import (
    _check,
    _draft_extend_args,
    _graphs,
    _launch,
    _module,
    draft_extend,
    fill_draft_extend_metadata_cuda,
    plan_draft_extend_metadata,
)
from cupy_nsa_meta._status import FATAL
from fake_device import forget_calls

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
PLANNED = [item for item in CASES if item.total_tokens is None]


def make_plan(item, device):
    outputs = Outputs(item, device)
    extend, seq = item.lengths(device)
    plan = plan_draft_extend_metadata(extend, seq, item.topk, outputs.expanded, outputs.clamped)
    return plan, outputs, extend, seq


def check_plan(item, device):
    plan, outputs, *_ = make_plan(item, device)
    expected = item.expected()
    for _ in range(3):
        outputs.poison()
        if expected.status in FATAL:
            with pytest.raises(ValueError, match="extend_seq_lens|seq_lens"):
                plan.run()
        else:
            assert plan.run() == expected.total
        outputs.check(expected)
        outputs.poison()
        plan.launch()
        assert plan.status() == expected.status
        outputs.check(expected)
    assert len(plan._tokens) == 1, "the plan is free again"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("item", PLANNED, ids=lambda item: item.name)
def test_plans_of_all_cases(item, device):
    check_plan(item, device)


@pytest.mark.gpu
def test_plans_of_random_batches():
    for item in random_batches(200, seed=60):
        if item.total_tokens is None:
            check_plan(item, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bs_17", "bs_33", "bs_4097", "bs_16385"])
def test_a_plan_reads_the_lengths_that_the_buffers_hold(name, device):
    first = BY_NAME[name]
    second = case("second", "other lengths", first.extend[::-1].copy(), first.seq + 3)
    plan, outputs, extend, seq = make_plan(first, device)
    for item in (first, second, first):
        extend.copy_(torch.from_numpy(item.extend))
        seq.copy_(torch.from_numpy(item.seq))
        outputs.poison()
        assert plan.run() == item.total
        outputs.check(item.expected())


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_does_not_stay(device):
    item = BY_NAME["contract"]
    plan, outputs, extend, _ = make_plan(item, device)
    assert plan.run() == 5
    extend[0] = -3
    outputs.poison()
    with pytest.raises(ValueError, match=r"extend_seq_lens\[0\]: expected >= 0, got -3"):
        plan.run()
    assert len(plan._tokens) == 1, "the plan is free again"
    extend[0] = 3
    assert plan.run() == 5
    outputs.check(item.expected())


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_thread_in_a_running_plan_is_refused(device):
    plan, *_ = make_plan(BY_NAME["contract"], device)
    plan._tokens.pop()  # as a thread that is inside
    for method in (plan.run, plan.launch):
        with pytest.raises(RuntimeError, match="one plan per thread and stream"):
            method()
    plan._tokens.append(None)
    assert plan.run() == 5


def test_an_interrupt_leaves_a_plan_free(fake_device):
    """Python handles signals behind calls: at none of them may a plan keep its token."""

    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    plan, *_ = make_plan(BY_NAME["contract"], "cpu")
    fake_device.launch_graph = max  # does nothing, quickly
    interrupts = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for idx in range(3000):
            plan.launch()  # captured anew
            try:
                signal.setitimer(signal.ITIMER_REAL, 3e-5 + 1e-7 * (idx % 100))
                for _ in range(5000):
                    plan.launch()
            except Interrupt:
                interrupts += 1
                assert plan._tokens == [None]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 1000


@pytest.mark.parametrize("device", DEVICES)
def test_debug_sync_reads_the_status_of_a_launch(device, monkeypatch):
    plan, _, extend, _ = make_plan(BY_NAME["contract"], device)
    extend[1] = -2
    plan.launch()
    assert plan.status() == 2
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    with pytest.raises(ValueError, match=r"extend_seq_lens\[1\]: expected >= 0, got -2"):
        plan.launch()
    extend[1] = 2
    plan.launch()


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments_of_a_plan(device):
    item = BY_NAME["contract"]
    outputs = Outputs(item, device)
    extend, seq = item.lengths(device)
    with pytest.raises(TypeError, match="nsa_index_topk: expected an int >= 1, got str"):
        plan_draft_extend_metadata(extend, seq, "9", outputs.expanded, outputs.clamped)
    with pytest.raises(ValueError, match="got an overlap with out_seqlens_expanded"):
        plan_draft_extend_metadata(extend, seq, 9, outputs.expanded, outputs.expanded)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bs_17", "bs_33", "bs_16385"])
def test_a_plan_inside_a_capture(name):
    first = BY_NAME[name]
    second = case("second", "other lengths", first.extend[::-1].copy(), first.seq + 3)
    plan, outputs, extend, seq = make_plan(first, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.launch()
        with pytest.raises(RuntimeError, match="total_tokens="):
            plan.run()
        with pytest.raises(RuntimeError, match="status: not while"):
            plan.status()
        with pytest.raises(RuntimeError, match="a plan is made before"):
            make_plan_in_capture(extend, seq, outputs)
    for item in (first, second):
        extend.copy_(torch.from_numpy(item.extend))
        seq.copy_(torch.from_numpy(item.seq))
        outputs.poison()
        graph.replay()
        assert plan.status() == 0
        outputs.check(item.expected())
        outputs.poison()
        assert plan.run() == item.total
        outputs.check(item.expected())


def make_plan_in_capture(extend, seq, outputs):
    return plan_draft_extend_metadata(extend, seq, 9, outputs.expanded, outputs.clamped)


@pytest.mark.gpu
def test_a_plan_on_a_side_stream_behind_queued_work():
    item = BY_NAME["bs_129"]
    plan, outputs, extend, _ = make_plan(item, "cuda")
    wanted = extend.clone()
    stream = torch.cuda.Stream()
    extend.zero_()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        extend.copy_(wanted)
        assert plan.run() == item.total
    torch.cuda.synchronize()
    outputs.check(item.expected())


@pytest.mark.gpu
def test_an_interrupted_run_captures_anew():
    item = BY_NAME["contract"]
    plan, outputs, *_ = make_plan(item, "cuda")
    assert plan.run() == 5
    slot = plan._captured.slot
    state = plan._state

    class Interrupting:
        def __getattr__(self, name):
            return getattr(real, name)

        def streamSynchronize(self, stream):
            raise KeyboardInterrupt

    real = state.runtime
    torch.cuda._sleep(40_000_000)
    state.runtime = Interrupting()
    try:
        with pytest.raises(KeyboardInterrupt):
            plan.run()
    finally:
        state.runtime = real
    gc.collect()
    assert slot in state._retired
    outputs.poison()
    assert plan.run() == 5
    assert plan._captured.slot is not slot
    outputs.check(item.expected())


@pytest.mark.gpu
def test_a_deleted_plan_with_a_launch_under_way_keeps_its_slot_away():
    item = BY_NAME["contract"]
    plan, outputs, *_ = make_plan(item, "cuda")
    state, slot = plan._state, plan._captured.slot
    torch.cuda._sleep(20_000_000)
    plan.launch()
    del plan
    gc.collect()
    assert slot in state._retired
    assert slot not in state.free_slots
    torch.cuda.synchronize()
    outputs.check(item.expected())
    assert state.has_answered(slot)


@pytest.mark.gpu
def test_epochs_wrap():
    item = BY_NAME["contract"]
    plan, *_ = make_plan(item, "cuda")
    plan.run()
    slot = plan._captured.slot
    state = plan._state
    slot.epoch = _launch.EPOCH_MASK - 1
    state._counts[slot.index * 8 // _launch.SLOT_BYTES] = _launch.EPOCH_MASK - 1
    torch.cuda.synchronize()
    for epoch in (_launch.EPOCH_MASK, 1, 2):
        assert plan.run() == 5
        assert state.words[slot.index] >> _launch.EPOCH_SHIFT == slot.epoch == epoch


# ---- The cache behind the drop-in call ----------------------------------------------------------


@pytest.fixture
def fresh_cache(monkeypatch):
    forget_calls(monkeypatch)
    return _graphs


@pytest.mark.gpu
def test_a_call_is_captured_when_met_the_second_time(fresh_cache):
    item = BY_NAME["bs_33"]
    other = case("other", "other lengths", item.extend[::-1].copy(), item.seq + 5)
    outputs = Outputs(item, "cuda")
    extend, seq = item.lengths("cuda")
    captures = []
    for batch in (item, other, item, other):
        extend.copy_(torch.from_numpy(batch.extend))
        seq.copy_(torch.from_numpy(batch.seq))
        outputs.poison()
        total = fill_draft_extend_metadata_cuda(
            extend, seq, batch.topk, outputs.expanded, outputs.clamped
        )
        assert total == batch.total
        outputs.check(batch.expected())
        captures.append(fresh_cache.cache_info()["captures"])
    assert captures == [0, 1, 1, 1]
    assert fresh_cache.cache_info()["hits"] == 2


@pytest.mark.gpu
def test_every_case_through_the_cache(fresh_cache):
    for item in CASES:
        extend, seq = item.lengths("cuda")
        outputs = Outputs(item, "cuda")

        def again(*arguments, item=item, extend=extend, seq=seq, outputs=outputs, **options):
            del arguments
            return fill_draft_extend_metadata_cuda(
                extend, seq, item.topk, outputs.expanded, outputs.clamped, **options
            )

        expected = item.expected()
        for _ in range(4):
            outputs.poison()
            if item.total_tokens is not None:
                again(total_tokens=item.total_tokens)
            elif expected.status in FATAL:
                with pytest.raises(ValueError, match="extend_seq_lens|seq_lens"):
                    again()
            else:
                assert again() == expected.total
            outputs.check(expected)
    assert fresh_cache.cache_info()["hits"] > 10


@pytest.mark.gpu
def test_memory_that_is_freed_and_reused(fresh_cache):
    """torch hands the same addresses to other tensors: same key, same launch, other contents."""
    for number in range(40):
        item = random_batches(1, seed=number % 2 + 70)[0]
        check_case(fill_draft_extend_metadata_cuda, item, "cuda")
        gc.collect()
    items = [
        case("a", "same sizes", [3, 2, 4], [10, 4, 9]),
        case("b", "same sizes", [2, 6, 1], [7, 8, 5]),
    ]
    for number in range(12):
        check_case(fill_draft_extend_metadata_cuda, items[number % 2], "cuda")
    assert fresh_cache.cache_info()["hits"] > 0


@pytest.mark.gpu
def test_integers_that_vary_cost_no_capture(fresh_cache):
    item = BY_NAME["bs_33"]
    outputs = Outputs(item, "cuda")
    extend, seq = item.lengths("cuda")
    for step in range(200):
        fill_draft_extend_metadata_cuda(extend, seq, 2048 + step, outputs.expanded, outputs.clamped)
        fill_draft_extend_metadata_cuda(
            extend, seq, 2048, outputs.expanded, outputs.clamped, total_tokens=step % item.total
        )
    assert fresh_cache.cache_info()["captures"] == 0


@pytest.mark.gpu
def test_the_cache_is_bounded_and_pays_for_itself(fresh_cache):
    item = BY_NAME["bs_17"]
    outputs = Outputs(item, "cuda")
    extend, seq = item.lengths("cuda")
    for _ in range(6):
        for topk in range(1, 60):
            fill_draft_extend_metadata_cuda(extend, seq, topk, outputs.expanded, outputs.clamped)
    info = fresh_cache.cache_info()
    earned = info["hits"] // fresh_cache.HITS_PER_CAPTURE
    assert fresh_cache.FREE_CAPTURES <= info["captures"] <= fresh_cache.FREE_CAPTURES + earned
    assert info["size"] <= info["max_size"]


@pytest.mark.gpu
def test_the_cache_can_be_switched_off(fresh_cache, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_GRAPH_CACHE", "0")
    for _ in range(5):
        check_case(fill_draft_extend_metadata_cuda, BY_NAME["contract"], "cuda")
    assert fresh_cache.cache_info() == {
        "hits": 0, "misses": 0, "captures": 0, "size": 0, "max_size": fresh_cache.MAX_GRAPHS,
    }  # fmt: skip


@pytest.mark.gpu
def test_streams_have_launches_of_their_own(fresh_cache):
    item = BY_NAME["bs_33"]
    outputs = Outputs(item, "cuda")
    extend, seq = item.lengths("cuda")
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for _ in range(3):
                assert item.total == fill_draft_extend_metadata_cuda(
                    extend, seq, item.topk, outputs.expanded, outputs.clamped
                )
    assert fresh_cache.cache_info()["captures"] == 2
    torch.cuda.synchronize()
    outputs.check(item.expected())


@pytest.mark.gpu
def test_slots_come_back_when_a_thread_ends():
    state = _launch.device_state(0)
    item = BY_NAME["contract"]
    outputs = Outputs(item, "cuda")
    extend, seq = item.lengths("cuda")

    def work():
        for topk in (1, 2, 3, 1, 2, 3, 1, 2, 3):
            fill_draft_extend_metadata_cuda(extend, seq, topk, outputs.expanded, outputs.clamped)

    def slots_in_use():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        del thread
        gc.collect()
        return state.slots_made - len(state.free_slots) - len(state._retired)

    first = slots_in_use()
    assert [slots_in_use() for _ in range(3)] == [first] * 3


def test_warmup_reaches_every_kernel():
    """The driver loads a kernel's code at its first launch, which may not be inside a capture."""
    lengths = torch.zeros(_draft_extend_args.ONE_LAUNCH_MAX_BS + 1, dtype=torch.int32)
    outs = torch.empty((2, _draft_extend_args.QUADS_MIN_ROWS), dtype=torch.int32)
    reached = set()
    for bs, rows in draft_extend.WARM_SIZES:
        _, key = _check.draft_extend(
            lengths[:bs], lengths[:bs], 1, outs[0, :rows], outs[1, :rows], True, None
        )
        key = key._replace(expanded_ptr=1 << 20, clamped_ptr=1 << 24)  # aligned, as on a GPU
        reached |= {name for name, _ in _draft_extend_args.shape_of(key, 132).launches}
    assert reached == set(_module.KERNELS["draft_extend"])


def captured():
    return SimpleNamespace(last_used=0)


def test_the_policy_of_the_cache():
    cache = _graphs.Cache()
    assert cache.lookup("a", captured) is None
    first = cache.lookup("a", captured)
    assert cache.lookup("a", None) is first
    assert (cache.hits, cache.misses, cache.captures) == (1, 2, 1)
    for number in range(_graphs.MAX_GRAPHS + 1):
        assert cache.lookup(number, captured) is None
    assert cache.lookup(0, captured) is None, "forgotten: more keys came than are remembered"
    cache.captures = _graphs.FREE_CAPTURES
    assert cache.lookup(5, captured) is None, "earlier captures have not been paid back"
    cache.hits = _graphs.HITS_PER_CAPTURE
    assert cache.lookup(5, captured) is not None
    cache.hits = 10**6
    for number in range(100, 100 + _graphs.MAX_GRAPHS + 1):
        cache.lookup(number, captured)
        assert cache.lookup(number, captured) is not None
        assert cache.lookup(5, captured) is not None  # used most recently, kept
    assert len(cache.graphs) == _graphs.MAX_GRAPHS
    kept = set(cache.graphs)
    assert 5 in kept
    assert not {"a", 100} & kept


def test_keys_with_the_same_hash_are_told_apart():
    class Key(str):
        def __hash__(self):
            return 1

    cache = _graphs.Cache()
    a, b = Key("a"), Key("b")
    assert cache.lookup(a, captured) is None
    of_a = cache.lookup(a, captured)
    assert cache.lookup(b, captured) is not of_a
    assert cache.lookup(a, captured) in (of_a, None)


def test_a_capture_that_fails_leaves_plain_launches():
    cache = _graphs.Cache()
    tried = []

    def fail():
        tried.append(1)
        raise RuntimeError("out of memory")

    for _ in range(4):
        assert cache.lookup("key", fail) is None
    assert len(tried) == 2, "at every second meeting"
    assert cache.captures == 0
    assert not cache.graphs


def test_the_plan_is_public():
    assert {"plan_draft_extend_metadata", "DraftExtendPlan"} <= set(cupy_nsa_meta.__all__)
