"""Several GPUs, several processes: what ``test_devices.py`` simulates, on the hardware."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cupy_nsa_meta
from backends import check_case, check_case_async
from cases import BY_NAME, Outputs
from cupy_nsa_meta import _launch
from fused_cases import BY_NAME as FUSED
from fused_cases import Built, expected
from fused_plans import batch_of, plan_of

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
NAMES = ("contract", "zero_middle", "bs_33", "bs_1025", "bs_16385", "quads_warp", "total_short")
FUSED_NAMES = [f"{op}_basic_ps64" for op in ("decode", "verify", "draft_extend", "extend")]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=[0, 1], ids=["current_0", "current_1"])
def other(request):
    """The device that is not current."""
    with torch.cuda.device(request.param):
        yield 1 - request.param


# ---- Two GPUs -----------------------------------------------------------------------------------


@two_gpus
@pytest.mark.parametrize("name", NAMES)
def test_calls_on_the_device_that_is_not_current(other, name):
    current = torch.cuda.current_device()
    item = BY_NAME[name]
    for fill in (
        cupy_nsa_meta.fill_draft_extend_metadata_cuda,
        cupy_nsa_meta.fill_draft_extend_metadata_inplace,
        cupy_nsa_meta.fill_draft_extend_metadata_python,
        cupy_nsa_meta.fill_draft_extend_metadata,
    ):
        check_case(fill, item, f"cuda:{other}")
    check_case_async(cupy_nsa_meta.fill_draft_extend_metadata_async, item, f"cuda:{other}")
    assert torch.cuda.current_device() == current


@two_gpus
@pytest.mark.parametrize("name", FUSED_NAMES)
def test_the_fused_family_on_the_device_that_is_not_current(other, name):
    built = Built(FUSED[name], f"cuda:{other}")
    for _ in range(3):
        built.poison()
        built.run()
        built.check(expected(FUSED[name]))
    plan = plan_of(built)
    built.poison()
    plan.run(**batch_of(built))
    plan.launch(**batch_of(built))
    assert plan.status() == 0
    built.check(expected(FUSED[name]))
    assert cupy_nsa_meta.last_status(other) == 0


@two_gpus
def test_plans_on_both_devices_in_turn(other):
    plans = []
    for device in (0, 1):
        item = BY_NAME["bs_33"]
        outputs = Outputs(item, f"cuda:{device}")
        extend, seq = item.lengths(f"cuda:{device}")
        plan = cupy_nsa_meta.plan_draft_extend_metadata(
            extend, seq, item.topk, outputs.expanded, outputs.clamped
        )
        plans.append((plan, item, outputs))
    for _ in range(3):
        for plan, item, outputs in plans:
            outputs.poison()
            assert plan.run() == item.total
            outputs.check(item.expected())
    assert _launch._states[0]._base != _launch._states[1]._base


@two_gpus
def test_a_wait_behind_work_on_the_device_that_is_not_current(other):
    """Stream 0 is the default stream of whatever device is current."""
    item = BY_NAME["bs_33"]
    outputs = Outputs(item, f"cuda:{other}")
    extend, seq = item.lengths(f"cuda:{other}")
    torch.cuda.synchronize(other)
    for _ in range(4):
        with torch.cuda.device(other):
            torch.cuda._sleep(20_000_000)
        assert item.total == cupy_nsa_meta.fill_draft_extend_metadata_cuda(
            extend, seq, item.topk, outputs.expanded, outputs.clamped
        )
    outputs.check(item.expected())


@two_gpus
def test_tensors_of_two_devices_are_refused():
    item = BY_NAME["contract"]
    outputs = Outputs(item, "cuda:0")
    extend, seq = item.lengths("cuda:0")
    arguments = (extend, seq.to("cuda:1"), item.topk, outputs.expanded, outputs.clamped)
    for function in (
        cupy_nsa_meta.fill_draft_extend_metadata_cuda,
        cupy_nsa_meta.plan_draft_extend_metadata,
    ):
        with pytest.raises(ValueError, match="seq_lens: expected device cuda:0 like .*cuda:1"):
            function(*arguments)


def python(*words):
    """The output of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ON_GPU_1_ALONE = """
import ctypes, threading
import torch
import cupy_nsa_meta as m

def use():
    extend, seq = torch.ones((2, 8), dtype=torch.int32, device="cuda:1")
    outs = torch.empty((2, 8), dtype=torch.int32, device="cuda:1")
    ke = torch.empty(8, dtype=torch.int32, device="cuda:1")
    plan = m.plan_draft_extend_metadata(extend, seq, 4, *outs)
    for _ in range(4):
        m.fill_draft_extend_metadata(extend, seq, 4, *outs)
        m.fused_dsa_extend_metadata(seq, extend, total_len=8, dsa_index_topk=4, ke=ke)
        plan.run()

use()
thread = threading.Thread(target=use)  # whose current device is 0
thread.start()
thread.join()
flags, is_active = ctypes.c_uint(), ctypes.c_int(-1)
ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(is_active))
print(is_active.value)
"""


@two_gpus
def test_a_gpu_that_is_not_used_gets_no_context():
    assert python("-c", ON_GPU_1_ALONE).split() == ["0"]


# ---- Processes ----------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, os, signal, sys
import torch
import cupy_nsa_meta as m

def batch(device):
    extend = torch.tensor([3, 2], dtype=torch.int32, device=device)
    seq = torch.tensor([10, 4], device=device)
    return (extend, seq, 9, *torch.full((2, 8), -1, dtype=torch.int32, device=device))

def told(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def own_batch(queue):
    signal.alarm(60)
    queue.put(m.fill_draft_extend_metadata(*batch("cuda")))

if __name__ == "__main__":
    given = batch("cuda")
    ke = torch.zeros(8, dtype=torch.int32, device="cuda")
    fused = lambda: m.fused_dsa_extend_metadata(given[1], given[0], total_len=5, dsa_index_topk=9, ke=ke)
    for _ in range(4):
        assert m.fill_draft_extend_metadata(*given) == 5
        fused()
    plan = m.plan_draft_extend_metadata(*given)
    fused_plan = m.plan_fused_dsa_extend_metadata(
        given[1], given[0], max_total_len=5, dsa_index_topk=9, ke=ke)
    assert plan.run() == 5
    read, write = os.pipe()
    if os.fork() == 0:
        signal.alarm(60)
        found = [told(action) for action in (
            lambda: m.fill_draft_extend_metadata(*given),
            lambda: m.fill_draft_extend_metadata_async(*given),
            plan.run, plan.launch, fused, fused_plan.launch, fused_plan.run,
            lambda: m.last_status(0),
            m.is_cuda_kernel_available,
            lambda: m.fill_draft_extend_metadata(*batch("cpu")),
        )]
        os.write(write, repr(found).encode())
        os._exit(0)
    os.close(write)
    print(os.fdopen(read).read())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=own_batch, args=(queue,))
    process.start()
    print(queue.get(timeout=100))
    process.join()
    print(plan.run(), m.fill_draft_extend_metadata(*given))
"""


def test_fork_after_use_is_refused_and_spawn_works(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    forked, spawned, parent = python(str(program)).splitlines()
    refused = f"RuntimeError: {_launch.FORKED}"
    assert forked == repr([refused] * 8 + [False, 5])
    assert spawned == "5"
    assert parent == "5 5"
