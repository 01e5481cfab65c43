"""Several devices and several processes, on devices that are not there (``fake_cuda``)."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cupy_nsa_meta
import fake_cuda
from cupy_nsa_meta import _check, _graphs, _launch, _module, dispatch
from fused_cases import BY_NAME, Built
from fused_plans import plan_of

EXPANDED = [8, 9, 10, 3, 4]
CLAMPED = [8, 9, 9, 3, 4]


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch)


def batch(cuda, device):
    """The batch of the contract on a device: arguments of the seed operation."""
    extend = cuda.tensor([3, 2], device)
    seq = cuda.tensor([10, 4], device, torch.int64)
    outs = [cuda.tensor([-1] * 8, device) for _ in range(2)]
    return extend, seq, 9, *outs


def check(arguments):
    *_, expanded, clamped = arguments
    assert expanded.tolist() == EXPANDED + [-1] * 3
    assert clamped.tolist() == CLAMPED + [-1] * 3


class OnDevice(Built):
    """A fused case on a fake device."""

    def __init__(self, case, cuda, device):
        super().__init__(case)
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                self.arguments[name] = cuda._place(value, device)


def logged(cuda, what):
    return [current for kind, current, _ in cuda.log if kind == what]


# ---- Devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("device", [0, 1])
def test_every_form_runs_on_the_device_of_its_tensors(cuda, device, current):
    check_every_form(cuda, device, current)


def test_every_form_runs_on_the_only_device(monkeypatch):
    """Which nobody asks for, then: it is the current one."""
    cuda = fake_cuda.install(monkeypatch, 1)

    def ask():
        raise AssertionError("asked for the current device")

    cuda.cupy.cuda.runtime.getDevice = ask
    check_every_form(cuda, 0, 0)


def check_every_form(cuda, device, current):
    if current != cuda.current:  # it is 0 at first, without a context
        cuda.current = current
    given = batch(cuda, device)
    for _ in range(4):  # plain, captured, replayed
        assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given) == 5
    assert cupy_nsa_meta.fill_draft_extend_metadata(*given, total_tokens=5) == 5
    for _ in range(3):
        outcome = cupy_nsa_meta.fill_draft_extend_metadata_async(*given)
        assert outcome.tolist() == [5, 0]
        assert outcome.get_device() == device
    plan = cupy_nsa_meta.plan_draft_extend_metadata(*given)
    assert plan.run() == 5
    plan.launch()
    assert plan.status() == 0
    for op in ("decode", "verify", "draft_extend", "extend"):
        built = OnDevice(BY_NAME[f"{op}_basic_ps64"], cuda, device)
        built.run()
        built.run()
        fused_plan = plan_of(built)
        fused_plan.launch()
        assert fused_plan.status() == 0
    check(given)
    assert cuda.current == current, "the current device is the caller's"
    assert set(logged(cuda, "launch")) == set(logged(cuda, "load")) == {device}
    assert logged(cuda, "pin") == [device]


def test_captured_launches_are_destroyed_while_another_thread_may_capture(cuda):
    given = batch(cuda, 1)
    plan = cupy_nsa_meta.plan_draft_extend_metadata(*given)
    for _ in range(3):
        assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given) == 5
    del plan
    _graphs.thread.cache.graphs.clear()
    assert len(logged(cuda, "destroy")) == 2


def test_a_gpu_that_is_not_used_gets_no_context(cuda):
    """Half a GB on GPU 0, which is the current one of every thread at first."""
    check_every_form(cuda, device=1, current=0)
    assert set(cuda.switches) == {1}


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_thread_that_has_not_used_cuda(monkeypatch, num_devices):
    """It has no context, which the driver's launch does not make."""
    cuda = fake_cuda.install(monkeypatch, num_devices)
    device = num_devices - 1
    given = batch(cuda, device)
    outcome = cuda.tensor([-7, -7], device)
    built = OnDevice(BY_NAME["decode_basic_ps64"], cuda, device)
    plan, fused_plan = cupy_nsa_meta.plan_draft_extend_metadata(*given), plan_of(built)
    forms = [
        lambda: cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given),
        lambda: cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given, total_tokens=5),
        lambda: cupy_nsa_meta.fill_draft_extend_metadata_async(*given, out_total=outcome),
        plan.run,
        plan.launch,
        built.run,
        fused_plan.launch,
    ]
    for times_before in range(4):  # plain, packed, captured, replayed by the main thread
        for form in forms:
            launches = len(logged(cuda, "launch"))
            with ThreadPoolExecutor(1) as pool:
                pool.submit(form).result()
            assert len(logged(cuda, "launch")) == launches + 1, times_before
            form()
    check(given)
    assert outcome.tolist() == [5, 0]
    assert set(logged(cuda, "launch")) == {device}


def test_each_device_has_modules_slots_and_a_status_of_its_own(cuda):
    for device in (1, 0, 1):
        assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*batch(cuda, device)) == 5
    assert logged(cuda, "pin") == [1, 0]
    programs = len(_module.PROGRAMS["draft_extend"])
    assert logged(cuda, "load") == [1] * programs + [0] * programs
    states = _launch._states
    assert {state.device for state in states.values()} == {0, 1}
    assert not set(states[0]._functions.values()) & set(states[1]._functions.values())
    assert states[0]._base != states[1]._base
    assert states[0].sticky_status != states[1].sticky_status
    _launch.status_word(1).fill_(3)
    assert cupy_nsa_meta.last_status(0) == 0
    assert cupy_nsa_meta.last_status("cuda:1") == 3
    cuda.current = 1
    assert cupy_nsa_meta.last_status() == 0, "it was reset"


def test_kernels_that_cannot_be_loaded_pin_memory_once(cuda, monkeypatch):
    load = _module.load

    def fail(stem, device):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_module, "load", fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no compiler"):
            cupy_nsa_meta.fill_draft_extend_metadata_cuda(*batch(cuda, 1))
    monkeypatch.setattr(_module, "load", load)
    assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*batch(cuda, 1)) == 5
    assert logged(cuda, "pin") == [1]


def test_a_long_wait_is_for_the_stream_of_the_right_device(cuda):
    """Stream 0 is the default stream of whatever device is current."""
    cuda.delayed = True
    cuda.current = 0
    given = batch(cuda, 1)
    for _ in range(4):
        assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given) == 5
    assert cupy_nsa_meta.plan_draft_extend_metadata(*given).run() == 5
    assert set(logged(cuda, "wait")) == {1}
    check(given)


def test_equal_numbers_on_two_devices_are_two_launches(cuda):
    """Both devices use stream 0; what is kept for one is not taken for the other."""
    given = [batch(cuda, device) for device in (0, 1)]
    plans = [cupy_nsa_meta.plan_draft_extend_metadata(*arguments) for arguments in given]
    for _ in range(4):
        for arguments, plan in zip(given, plans, strict=True):
            assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*arguments) == 5
            assert plan.run() == 5
    for arguments in given:
        check(arguments)


def test_more_requests_than_one_launch_serves(cuda):
    """Those calls have no form: scratch of their own."""
    bs = 16385
    extend, seq = cuda.tensor([1] * bs, 1), cuda.tensor([7] * bs, 1)
    outs = [cuda.tensor([-1] * (bs + 3), 1) for _ in range(2)]
    out_total = cuda.tensor([-7, -7], 1)
    for _ in range(3):
        for function, options, wanted in (
            (cupy_nsa_meta.fill_draft_extend_metadata_cuda, {}, bs),
            (cupy_nsa_meta.fill_draft_extend_metadata_cuda, {"total_tokens": 12}, 12),
            (cupy_nsa_meta.fill_draft_extend_metadata_async, {"out_total": out_total}, bs),
            (cupy_nsa_meta.fill_draft_extend_metadata_async, {"total_tokens": 9}, 9),
        ):
            for out in outs:
                out.fill_(-1)
            result = function(extend, seq, 5, *outs, **options)
            if isinstance(result, torch.Tensor):
                assert result.tolist() == [bs, 4 * (wanted != bs)]
            else:
                assert result == wanted
            assert outs[0].tolist() == [7] * wanted + [-1] * (bs + 3 - wanted)
            assert outs[1].tolist() == [5] * wanted + [-1] * (bs + 3 - wanted)


def test_calls_of_two_devices_in_turn_stay_known(cuda, monkeypatch):
    given = [batch(cuda, device) for device in (0, 1)] * 2
    given[2:] = [(*given[k][:1], given[k][1].to(torch.int32), *given[k][2:]) for k in (0, 1)]
    given[2:] = [
        (extend, cuda._place(seq.as_subclass(torch.Tensor), extend.get_device()), *others)
        for extend, seq, *others in given[2:]
    ]
    for _ in range(3):
        for arguments in given:
            assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*arguments) == 5
    monkeypatch.setattr(_check, "draft_extend", None)
    captures = _graphs.cache_info()["captures"]
    assert captures == 4
    for _ in range(2):
        for arguments in given:
            assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*arguments) == 5
            check(arguments)
    assert _graphs.cache_info()["captures"] == captures


MIXED = {
    "seed": ("fill_draft_extend_metadata_cuda", "seq_lens: expected device cuda:0 like"),
    "plan": ("plan_draft_extend_metadata", "seq_lens: expected device cuda:0 like"),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_refused(cuda, name):
    function, message = MIXED[name]
    given = list(batch(cuda, 0))
    given[1] = batch(cuda, 1)[1]
    with pytest.raises(ValueError, match=message):
        getattr(cupy_nsa_meta, function)(*given)
    assert not logged(cuda, "launch")


@pytest.mark.parametrize("op", ["decode", "verify", "draft_extend", "extend"])
@pytest.mark.parametrize("name", ["req_to_token", "cache_seqlens", "real_page_table"])
def test_a_fused_plan_is_refused_for_tensors_of_two_devices(cuda, name, op):
    built = OnDevice(BY_NAME[f"{op}_basic_ps64"], cuda, 1)
    built.arguments[name] = cuda._place(built.arguments[name].as_subclass(torch.Tensor), 0)
    for make in (lambda: plan_of(built), built.run):
        with pytest.raises(
            ValueError, match=f"{name}: expected device cuda:1 like seq_lens, got cuda:0"
        ):
            make()


def test_out_total_of_another_device_is_refused(cuda):
    with pytest.raises(ValueError, match="out_total: expected device cuda:0 like .*, got cuda:1"):
        cupy_nsa_meta.fill_draft_extend_metadata_async(
            *batch(cuda, 0), out_total=cuda.tensor([0, 0], 1)
        )


def test_a_capture_on_the_other_device_is_seen(cuda):
    cuda.streams[1] = cuda.capturing_stream = 77
    with pytest.raises(RuntimeError, match=r"not compiled yet.*warmup\(1\)"):
        cupy_nsa_meta.fill_draft_extend_metadata_cuda(*batch(cuda, 1))
    cuda.capturing_stream = -1
    assert cupy_nsa_meta.fill_draft_extend_metadata_cuda(*batch(cuda, 1)) == 5
    plan = plan_of(OnDevice(BY_NAME["decode_basic_ps64"], cuda, 1))
    cuda.capturing_stream = 77
    with pytest.raises(RuntimeError, match="total_tokens="):
        cupy_nsa_meta.fill_draft_extend_metadata_cuda(*batch(cuda, 1))
    with pytest.raises(RuntimeError, match="run.. waits, which is not allowed"):
        plan.run()
    with pytest.raises(RuntimeError, match="status.. is not allowed"):
        plan.status()


def test_a_machine_where_one_device_cannot_run(cuda, monkeypatch):
    """The choice is made per device."""
    pin = cuda.cupy.cuda.runtime.hostAlloc

    def no_memory_on_1(size, flags):
        if cuda.current == 1:
            raise fake_cuda.FakeRuntimeError("cudaErrorMemoryAllocation: out of memory")
        return pin(size, flags)

    cuda.cupy.cuda.runtime.hostAlloc = no_memory_on_1
    monkeypatch.setattr(dispatch, "triton_unavailable_reason", lambda: None)
    assert dispatch.choose(0) is dispatch.CUDA
    assert dispatch.choose(1).name == "triton"
    reason = dispatch.cuda_unavailable_reason(1)
    assert reason.startswith("cannot allocate 512 KiB of pinned memory for the results of cuda:1: ")
    assert "no pinned host memory is left" in reason
    assert "ulimit -l" in reason
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="BACKEND=cuda cannot run: cannot allocate 512 KiB"):
        dispatch.choose(1)


# ---- Processes ----------------------------------------------------------------------------------


def in_a_forked_child(actions):
    """Run functions in a forked child; their results, or their errors as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)  # not a hang, at any rate
            torch.set_num_threads(1)  # the threads of the parent's OpenMP are not here
            outcomes = {}
            for name, action in actions.items():
                try:
                    outcomes[name] = ["result", action()]
                except BaseException as error:
                    outcomes[name] = [type(error).__name__, str(error)]
            gc.collect()
            os.write(write, json.dumps(outcomes).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert text, "the child did not answer"
    return json.loads(text)


def on_the_cpu():
    outs = torch.full((2, 8), -1, dtype=torch.int32)
    total = cupy_nsa_meta.fill_draft_extend_metadata(
        torch.tensor([3, 2]), torch.tensor([10, 4]), 9, outs[0], outs[1]
    )
    built = Built(BY_NAME["decode_basic_ps64"])
    built.run()
    plan_of(built).run()
    return [total, outs[:, :5].tolist(), cupy_nsa_meta.last_status("cpu")]


def test_a_forked_child_is_told_so_and_can_use_the_cpu(cuda, monkeypatch):
    given = batch(cuda, 0)
    for _ in range(3):
        cupy_nsa_meta.fill_draft_extend_metadata(*given)
        cupy_nsa_meta.fill_draft_extend_metadata_async(*given)
    plan = cupy_nsa_meta.plan_draft_extend_metadata(*given)
    plans = [cupy_nsa_meta.plan_draft_extend_metadata(*given)]  # one that dies in the child
    built = OnDevice(BY_NAME["decode_basic_ps64"], cuda, 0)
    built.run()
    fused_plan = plan_of(built)
    fused_plan.launch()
    other = OnDevice(BY_NAME["verify_basic_ps64"], cuda, 0)
    elsewhere = batch(cuda, 1)

    def a_plan_that_dies():
        complaints = []
        monkeypatch.setattr(sys, "unraisablehook", lambda arguments: complaints.append(arguments))
        plans.clear()
        gc.collect()
        return len(complaints)

    def uncached():
        monkeypatch.setenv("CUPY_NSA_META_GRAPH_CACHE", "0")
        try:
            return cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given)
        finally:
            monkeypatch.delenv("CUPY_NSA_META_GRAPH_CACHE")

    outcomes = in_a_forked_child(
        {
            "met_before": lambda: cupy_nsa_meta.fill_draft_extend_metadata(*given),
            "cuda": lambda: cupy_nsa_meta.fill_draft_extend_metadata_cuda(*given),
            "uncached": uncached,
            "other_device": lambda: cupy_nsa_meta.fill_draft_extend_metadata(*elsewhere),
            "total": lambda: cupy_nsa_meta.fill_draft_extend_metadata(*given, total_tokens=5),
            "async": lambda: cupy_nsa_meta.fill_draft_extend_metadata_async(*given).tolist(),
            "plan_run": plan.run,
            "plan_launch": plan.launch,
            "plan_status": plan.status,
            "new_plan": lambda: str(cupy_nsa_meta.plan_draft_extend_metadata(*given)),
            "fused_known": built.run,
            "fused_new": other.run,
            "fused_plan_launch": fused_plan.launch,
            "fused_plan_run": fused_plan.run,
            "fused_plan_status": fused_plan.status,
            "new_fused_plan": lambda: str(plan_of(other)),
            "last_status": lambda: cupy_nsa_meta.last_status(0),
            "warmup": cupy_nsa_meta.warmup,
            "status_word": lambda: _launch.status_word(0).tolist(),
            "a_plan_that_dies": a_plan_that_dies,
            "on_the_cpu": on_the_cpu,
            "is_available": cupy_nsa_meta.is_cuda_kernel_available,
            "reason": lambda: cupy_nsa_meta.get_kernel_info()["reason"],
        }
    )
    assert outcomes.pop("a_plan_that_dies") == ["result", 0], "nothing that dies there complains"
    assert outcomes.pop("on_the_cpu") == ["result", [5, [EXPANDED, CLAMPED], 0]]
    assert outcomes.pop("is_available") == ["result", False]
    assert outcomes.pop("reason") == ["result", _launch.FORKED]
    for name, outcome in outcomes.items():
        assert outcome == ["RuntimeError", _launch.FORKED], name
    assert "\n" not in _launch.FORKED
    assert "spawn" in _launch.FORKED
    # The parent goes on.
    assert plan.run() == cupy_nsa_meta.fill_draft_extend_metadata(*given) == 5
    assert fused_plan.status() == 0
    assert cupy_nsa_meta.is_cuda_kernel_available()


def test_a_child_that_was_forked_before_cuda_was_used(cuda):
    """Not poisoned: it may be the first to use CUDA."""
    given = batch(cuda, 1)
    assert not _launch._states
    outcomes = in_a_forked_child(
        {
            "first": lambda: cupy_nsa_meta.fill_draft_extend_metadata(*given),
            "its_child": lambda: in_a_forked_child(
                {"cuda": lambda: cupy_nsa_meta.fill_draft_extend_metadata(*given)}
            ),
        }
    )
    assert outcomes["first"] == ["result", 5]
    assert outcomes["its_child"] == ["result", {"cuda": ["RuntimeError", _launch.FORKED]}]


def test_no_other_backend_is_tried_in_a_forked_child(cuda, monkeypatch):
    """Triton, chosen in the parent, cannot serve CUDA tensors there either."""

    def no_memory(size, flags):
        raise fake_cuda.FakeRuntimeError("cudaErrorMemoryAllocation: out of memory")

    cuda.cupy.cuda.runtime.hostAlloc = no_memory
    monkeypatch.setattr(dispatch, "triton_unavailable_reason", lambda: None)
    assert dispatch.choose(0).name == "triton"

    def choose():
        monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)  # as torch would say
        return dispatch.choose(0).name

    assert in_a_forked_child({"choose": choose})["choose"] == ["RuntimeError", _launch.FORKED]
    assert dispatch.choose(0).name == "triton"


def test_a_fork_while_another_thread_holds_a_lock(cuda):
    given = batch(cuda, 0)
    with _launch._states_lock, _launch._status_lock:
        outcomes = in_a_forked_child(
            {"first": lambda: cupy_nsa_meta.fill_draft_extend_metadata(*given)}
        )
    assert outcomes["first"] == ["result", 5]


def test_plans_do_not_travel():
    item = BY_NAME["decode_basic_ps64"]
    seed = cupy_nsa_meta.plan_draft_extend_metadata(
        torch.tensor([3]), torch.tensor([9]), 9, *torch.zeros((2, 4), dtype=torch.int32)
    )
    for plan in (seed, plan_of(Built(item))):
        for move in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled or copied; send the tensors"):
                move(plan)
