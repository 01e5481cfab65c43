"""Random batches of every function against the reference, all bytes compared.

On the GPU a batch is one block of memory: one copy there, the call, one copy back. Several
processes share the work, because the reference on the CPU takes most of it. On the CPU the kernels
run as compiled by g++ with AddressSanitizer and UndefinedBehaviorSanitizer, one std::thread for
each CUDA thread, which is why those batches are small.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import cupy_nsa_meta
from cases import POISON, random_batches, random_case
from cupy_nsa_meta._status import INT32_MAX
from fused_cases import FusedCase, random_cases

from . import Result, Save, Settings
from .forms import (
    call_fused,
    call_seed,
    fused_batch,
    returns_total,
    seed_batch,
)

GPU_BATCHES = 10_000  # of each function
CPU_BATCHES = 2_000
QUICK = {"gpu": 300, "cpu": 60}
SEED = 1_000  # of the first share; each share has its own
CHUNK = 50  # batches made at a time
HARNESS_JOBS = 10  # batches in one process of the CPU harness
FUSED_OPS = ("decode", "verify", "draft_extend", "extend")
FUNCTIONS = ("seed", *FUSED_OPS, "seqlens_expand")
SEED_FORMS = ("sync", "async", "plan")
FUSED_FORMS = ("call", "plan")
#: Of a batch on the CPU: a block takes tens of milliseconds there, and a table row is a block.
CPU_SIZES = {"max_bs": 4, "max_width": 100}
KERNEL_SIZES = ((1, 33), (33, 257), (257, 1025), (1025, 3000))  # each with a kernel of its own


# ---- Batches ------------------------------------------------------------------------------------


def expansion(case: FusedCase) -> FusedCase:
    """An EXTEND batch as the launch that ``seqlens_expand`` makes of it."""
    return dataclasses.replace(
        case,
        outputs=("dsa_cache_seqlens",),
        tables=(),
        flattened=None,
        pad_to=case.rows,
        topk=INT32_MAX,
        slack=0,
    )


def batches(function: str, seed: int, **sizes: int) -> Iterator[Any]:
    """Endless random cases of a function."""
    while True:
        if function == "seed":
            yield from random_batches(CHUNK, seed)
        elif function == "seqlens_expand":
            yield from map(expansion, random_cases("extend", CHUNK, seed, **sizes))
        else:
            yield from random_cases(function, CHUNK, seed, **sizes)
        seed += 1


# ---- On the GPU ---------------------------------------------------------------------------------


def check_seed(case: Any, number: int, device: str) -> str | None:
    """None, or what differs."""
    batch = seed_batch(case)
    form = SEED_FORMS[number % len(SEED_FORMS)]
    block = batch.before.to(device, copy=True)
    total = call_seed(form, batch, batch.block.arguments(block, batch.tensors))
    if returns_total(batch, form) and total != batch.total:
        return f"{form}: total {total}, expected {batch.total}"
    after = batch.after_async if form == "async" else batch.after
    return None if torch.equal(block.cpu(), after) else f"{form}: bytes differ"


def check_fused(case: FusedCase, number: int, device: str) -> str | None:
    batch = fused_batch(case)
    form = FUSED_FORMS[number % len(FUSED_FORMS)]
    block = batch.before.to(device, copy=True)
    status = call_fused(form, batch, block)
    if status != batch.status:
        return f"{form}: status {status}, expected {batch.status}"
    return None if torch.equal(block.cpu(), batch.after) else f"{form}: bytes differ"


def check_expansion(case: FusedCase, number: int, device: str) -> str | None:
    batch = fused_batch(case)
    names = ("extend_seq_lens", "seq_lens")
    longest = max(case.extend, default=0)
    block = batch.before.to(device, copy=True)
    lengths = batch.block.arguments(block, {n: batch.built.arguments[n] for n in names})
    poisoned = torch.full((case.rows,), POISON, dtype=torch.int32, device=device)
    del poisoned  # the result is allocated next, most likely there
    got = cupy_nsa_meta.seqlens_expand(*lengths.values(), case.rows, longest)
    status = cupy_nsa_meta.last_status(device)
    if status != batch.status:
        return f"status {status}, expected {batch.status}"
    if not torch.equal(got.cpu(), batch.built.arguments["dsa_cache_seqlens"]):
        return "values differ"
    return None if torch.equal(block.cpu(), batch.before) else "an input was written"


Check = Callable[[Any, int, str], "str | None"]
CHECKS: dict[str, Check] = {
    "seed": check_seed,
    **dict.fromkeys(FUSED_OPS, check_fused),
    "seqlens_expand": check_expansion,
}


def counted(settings: Settings, which: str) -> int:
    """Batches of each function that this process is asked for."""
    count = QUICK[which] if settings.quick else {"gpu": GPU_BATCHES, "cpu": CPU_BATCHES}[which]
    number, shares = settings.share
    return count * (number + 1) // shares - count * number // shares


def on_gpu(settings: Settings, save: Save) -> Result:
    """This process's share of every function, each within its part of the budget."""
    torch.set_num_threads(1)  # the other cores have processes of their own
    if settings.device != "cpu":
        cupy_nsa_meta.warmup()
    wanted = counted(settings, "gpu")
    result: Result = {}
    for function in FUNCTIONS:
        begin = time.monotonic()
        seed = SEED * (1 + settings.share[0])
        counts: Result = {"batches": 0, "of_batches": wanted, "mismatches": 0}
        result[function] = counts
        for number, case in zip(range(wanted), batches(function, seed), strict=False):
            if time.monotonic() - begin > settings.budget / len(FUNCTIONS):
                break
            counts["batches"] += 1
            try:
                what = CHECKS[function](case, number, settings.device)
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
            if what is not None:
                counts["mismatches"] += 1
                counts.setdefault("first_mismatch", f"{case.name}, {what}")
                save(result)
                if settings.device != "cpu":
                    torch.cuda.synchronize()  # ends the process where the device has failed
        counts["seconds"] = round(time.monotonic() - begin, 2)
        save(result)
        print(f"{function}: {counts}", flush=True)
    return result


def joined(shares: list[Result]) -> Result:
    """The results of processes that share the work, in one."""
    result: Result = {}
    for share in shares:
        for function, counts in share.items():
            whole = result.setdefault(function, {"batches": 0, "of_batches": 0, "mismatches": 0})
            for name in ("batches", "of_batches", "mismatches"):
                whole[name] += counts[name]
            whole["seconds"] = max(whole.get("seconds", 0), counts.get("seconds", 0))
            if "first_mismatch" in counts:
                whole.setdefault("first_mismatch", counts["first_mismatch"])
    return result


# ---- On the CPU, under sanitizers ---------------------------------------------------------------


def small_seed_batches(seed: int) -> Iterator[Any]:
    """As ``random_batches``, with few rows: each block of the harness is 256 threads."""
    rng = np.random.default_rng(seed)
    for case in batches("seed", seed):
        low, high = KERNEL_SIZES[int(rng.integers(len(KERNEL_SIZES)))]
        bs = int(rng.integers(low, high))
        max_extend = int(rng.choice([1, 3, 9, 60])) if bs < 20 else int(rng.choice([1, 2]))
        small = random_case(case.name, case.reason, bs, max_extend, int(rng.integers(2**31)))
        cut = None if case.total_tokens is None else int(rng.integers(0, small.total + 1))
        yield dataclasses.replace(case, extend=small.extend, seq=small.seq, total_tokens=cut)


def on_cpu(settings: Settings, save: Save) -> Result:
    """Every function's kernels under ASan and UBSan, as many at a time as there are cores."""
    import cpu_kernels

    if not cpu_kernels.has_compiler:
        raise RuntimeError("g++ is not installed")
    executable = cpu_kernels.build("address")
    cores = os.cpu_count() or 1
    wanted = counted(settings, "cpu")
    result: Result = {}
    torch.set_num_threads(1)
    with ThreadPoolExecutor(cores) as pool:
        for function in FUNCTIONS:
            begin = time.monotonic()
            counts: Result = {"batches": 0, "of_batches": wanted, "mismatches": 0}
            result[function] = counts
            running: deque[tuple[Any, Future[Any]]] = deque()
            numbers = iter(range(0, wanted, HARNESS_JOBS))
            source = _harness_jobs(function)
            while True:
                late = time.monotonic() - begin > settings.budget / len(FUNCTIONS)
                at = None if late else next(numbers, None)
                if at is not None:
                    jobs = [next(source) for _ in range(min(HARNESS_JOBS, wanted - at))]
                    run = pool.submit(cpu_kernels.run, executable, [job.job for job in jobs])
                    running.append((jobs, run))
                if not running:
                    break
                if at is None or len(running) > cores + 1:
                    made, run = running.popleft()
                    if not (late and run.cancel()):  # one that has not begun is left out
                        _count(counts, made, run)
            counts["seconds"] = round(time.monotonic() - begin, 2)
            save(result)
            print(f"{function}, CPU: {counts}", flush=True)
    return result


@dataclasses.dataclass
class HarnessJob:
    name: str
    job: Any
    check: Callable[[list[bytes]], None]


def _harness_jobs(function: str) -> Iterator[HarnessJob]:
    import cpu_kernels

    if function == "seed":
        for number, case in enumerate(small_seed_batches(SEED)):
            job = cpu_kernels.draft_extend_job(case, use_adaptive=number % 4 != 0)
            check = _draft_extend_check(case)
            yield HarnessJob(case.name, job, check)
        return
    for number, case in enumerate(batches(function, SEED, **CPU_SIZES)):
        item = cpu_kernels.fused_job(case, tiled=number % 4 == 0)
        yield HarnessJob(case.name, item.job, _fused_check(item))


def _draft_extend_check(case: Any) -> Callable[[list[bytes]], None]:
    import cpu_kernels

    return lambda buffers: cpu_kernels.check_draft_extend(case, case.expected(), buffers)


def _fused_check(item: Any) -> Callable[[list[bytes]], None]:
    import cpu_kernels

    return lambda buffers: cpu_kernels.check_fused(item, buffers)


def _count(counts: Result, jobs: list[HarnessJob], run: Future[Any]) -> None:
    """Wait for a process of the harness, and compare what its jobs have left."""
    try:
        results = run.result()
    except (AssertionError, subprocess.TimeoutExpired) as error:  # a sanitizer's report ends it
        counts["batches"] += len(jobs)
        counts["mismatches"] += 1
        counts.setdefault("first_mismatch", str(error).strip()[:300])
        return
    for job, buffers in zip(jobs, results, strict=True):
        counts["batches"] += 1
        try:
            job.check(buffers)
        except AssertionError as error:
            counts["mismatches"] += 1
            counts.setdefault("first_mismatch", f"{job.name}: {str(error).strip()[:300]}")
