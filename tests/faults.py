"""What happens around a GPU that is ill or busy: measured, not asserted; each in a process of its own.

``fault_in_between()`` and ``gil_is_free()`` return what they have seen as a dict; the tests and the
reliability report read it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
#: Seconds after which a process counts as hung.
HANG_SECONDS = 60.0

PROLOGUE = """
import json, os, threading, time
import cupy, torch
import cupy_nsa_meta as m

extend = torch.tensor([3, 2], dtype=torch.int32, device="cuda")
seq = torch.tensor([10, 4], device="cuda")
outs = torch.full((2, 8), -1, dtype=torch.int32, device="cuda")
arguments = (extend, seq, 9, outs[0], outs[1])

def tell(**found):
    print(json.dumps(found), flush=True)
    os._exit(0)  # a context that has failed is not taken down
"""

#: How a total is waited for. The plan and the captured call have their graphs before the fault.
CALLS = {
    "call": "m.fill_draft_extend_metadata_cuda(*arguments)",
    "captured": "m.fill_draft_extend_metadata_cuda(*arguments)",
    "plan": "plan.run()",
    "fused_plan": "fused_plan.run()",
    "debug_sync": "m.fused_dsa_extend_metadata("
    "seq, extend, total_len=5, dsa_index_topk=9, ke=outs[0])",
}

FAULT = """
m.warmup()
os.environ["CUPY_NSA_META_GRAPH_CACHE"] = "1" if form == "captured" else "0"
os.environ["CUPY_NSA_META_DEBUG_SYNC"] = "1" if form == "debug_sync" else "0"
plan = m.plan_draft_extend_metadata(*arguments)
fused_plan = m.plan_fused_dsa_extend_metadata(
    seq, extend, max_total_len=5, dsa_index_topk=9, ke=outs[0])
for _ in range(4):
    call()
bad = cupy.RawKernel('extern "C" __global__ void bad(int* p) { *p = 1; }', "bad")
bad.compile()
nowhere = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(16, 4, None), 0)
stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
torch.cuda.synchronize()
if delay_ms:
    torch.cuda._sleep(int(delay_ms * 2e6))  # so that the fault comes while the call waits
bad((1,), (1,), (nowhere,), stream=stream)
begin = time.perf_counter()
found = {"error": None, "message": None, "result": None}
try:
    found["result"] = call()
except BaseException as error:
    found["error"], found["message"] = type(error).__name__, str(error)
seconds = time.perf_counter() - begin
again = None
try:
    call()
except BaseException as error:
    again = type(error).__name__
tell(seconds=seconds, again=again, **found)
"""

GIL = """
m.warmup()
plan = m.plan_draft_extend_metadata(*arguments)
call = plan.run if form == "plan" else lambda: m.fill_draft_extend_metadata_cuda(*arguments)
for _ in range(4):
    call()
torch.cuda.synchronize()
# The clock of this GPU: cycles of _sleep in a millisecond.
start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
start.record(); torch.cuda._sleep(20_000_000); end.record(); torch.cuda.synchronize()
cycles_per_ms = 20_000_000 / start.elapsed_time(end)
ticks, stop = [], threading.Event()

def tick():
    while not stop.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)

thread = threading.Thread(target=tick)
thread.start()
while len(ticks) < 20:
    time.sleep(0.001)
torch.cuda._sleep(int(100 * cycles_per_ms))
begin = time.perf_counter()
total = call()
end = time.perf_counter()
stop.set()
thread.join()
inside = [begin, *(tick for tick in ticks if begin <= tick <= end), end]
longest = max(later - earlier for earlier, later in zip(inside, inside[1:]))
tell(seconds=end - begin, ticks=len(inside) - 2, longest_gap_seconds=longest, result=total,
     error=None)
"""


def run_alone(text: str, **variables: object) -> dict[str, Any]:
    """Run a program; the JSON line that it prints, or what became of it."""
    assignments = "\n".join(f"{name} = {value!r}" for name, value in variables.items())
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            [sys.executable, "-c", assignments + "\n" + textwrap.dedent(PROLOGUE + text)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"seconds": HANG_SECONDS, "error": "hang", "result": None}
    lines = done.stdout.splitlines()
    if not lines:
        return {"seconds": None, "error": "ended", "result": None, "message": done.stderr[-2000:]}
    return dict(json.loads(lines[-1]))


def fault_in_between(form: str = "call", delay_ms: float = 5.0) -> dict[str, Any]:
    """A kernel that stores to an invalid address, and a call that waits behind it.

    Returns seconds of the waiting call, ``error`` (the type's name; "hang", "ended", or None for a
    call that returned), ``message``, ``result`` (what was returned, None with an error), ``again``
    (the type of the error of a second call).

    Args:
        form: how the call waits, one of ``CALLS``.
        delay_ms: GPU work in front of the fault; 0: the fault may be there before the call.
    """
    return run_alone(f"call = lambda: {CALLS[form]}\n" + FAULT, form=form, delay_ms=delay_ms)


def gil_is_free(form: str = "call") -> dict[str, Any]:
    """A call that waits behind 100 ms of GPU work while a second Python thread wakes every ms.

    Returns seconds of the call, ``ticks`` of the second thread in it, ``longest_gap_seconds``
    between them, ``result`` (the total) and ``error``.

    Args:
        form: "call" or "plan".
    """
    return run_alone(GIL, form=form)
