"""A million runs of a plan, then plan launches of the fused family, then calls on new tensors.

Memory is looked at after the first tenth of each part, when caches and pools have filled, and from
then on: what it grows by is a leak.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import cupy_nsa_meta
from cases import case, random_case
from fused_cases import case as fused_case
from fused_cases import lengths, shuffled
from fused_plans import batch_of

from . import Result, Save, Settings
from .forms import fused_batch, plan_at, seed_arguments, seed_batch

PLAN_RUNS = 1_000_000
FUSED_LAUNCHES = 200_000
EAGER_CALLS = 100_000
QUICK_DIVISOR = 50
PLAN_BS = 32
FUSED_BS = 64
ROUNDS = 100  # of a part; memory is looked at and all bytes are compared after each
#: Growth that is no leak: the driver hands out device memory in pieces of 2 MiB, and a Python
#: process gives pages back late. An object lost by each of a million runs would be 16 MB and more.
DEVICE_TOLERANCE = 4 << 20
HOST_TOLERANCE = 8 << 20
SHARES = {"plan_runs": 0.4, "fused_launches": 0.2, "eager_calls": 0.4}  # of the budget
_PAGE = os.sysconf("SC_PAGE_SIZE")


def memory(device: str) -> dict[str, int]:
    """Bytes in use: of torch on the device, of the whole device, of this process on the host."""
    with open("/proc/self/statm") as file:
        used = {"host": int(file.read().split()[1]) * _PAGE}
    if device != "cpu":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        used |= {"torch": torch.cuda.memory_allocated(), "device": total - free}
    return used


class Watch:
    """Memory of a part: before, the most and the last, from the end of its first tenth."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.after: dict[str, int] = {}

    def look(self) -> None:
        self.after = memory(self.device)
        if not self.before:
            self.before = self.peak = self.after
        self.peak = {name: max(self.peak[name], now) for name, now in self.after.items()}

    def result(self) -> Result:
        growth = {name: now - self.before[name] for name, now in self.after.items()}
        limits = {"host": HOST_TOLERANCE, "torch": 0, "device": DEVICE_TOLERANCE}
        return {
            "before": self.before,
            "peak": self.peak,
            "after": self.after,
            "growth": growth,
            "flat": all(grown <= limits[name] for name, grown in growth.items()),
        }


def plan_runs(device: str, count: int) -> Iterator[tuple[int, int]]:
    """After each round: runs made, wrong results. The lengths change from round to round."""
    first = random_case("first", "", PLAN_BS, 5, 1)
    swapped = case("second", "", first.extend[::-1].copy() // 2, first.seq + 3)
    slack = first.capacity - swapped.total
    second = case("second", "", swapped.extend, swapped.seq, slack=slack)
    variants = [seed_batch(first), seed_batch(second)]
    befores = [batch.before.to(device) for batch in variants]
    afters = [batch.after.to(device) for batch in variants]
    block = befores[0].clone()
    tensors = variants[0].block.arguments(block, variants[0].tensors)
    plan = cupy_nsa_meta.plan_draft_extend_metadata(*seed_arguments(variants[0], tensors))
    per_round = count // ROUNDS
    for number in range(ROUNDS):
        variant = number % 2
        block.copy_(befores[variant])
        wanted = variants[variant].total
        run = plan.run
        wrong = 0
        for _ in range(per_round):
            if run() != wanted:
                wrong += 1
        wrong += not torch.equal(block, afters[variant])
        yield per_round, wrong


def fused_launches(device: str, count: int) -> Iterator[tuple[int, int]]:
    item = fused_case("decode", "soak", "", lengths(FUSED_BS, 0, 900, 1), width=1024)
    variants = [fused_batch(shuffled(item, seed)) for seed in (0, 1)]
    befores = [batch.before.to(device) for batch in variants]
    afters = [batch.after.to(device) for batch in variants]
    block = befores[0].clone()
    plan = plan_at(variants[0], variants[0].block.arguments(block, variants[0].built.arguments))
    batch = batch_of(variants[0].built)
    per_round = count // ROUNDS
    for number in range(ROUNDS):
        block.copy_(befores[number % 2])
        for _ in range(per_round):
            plan.launch(**batch)
        wrong = plan.status() != 0
        yield per_round, wrong + (not torch.equal(block, afters[number % 2]))


def eager_calls(device: str, count: int) -> Iterator[tuple[int, int]]:
    """Tensors of another size at every call, of which the last few stay alive."""
    rng = np.random.default_rng(3)
    extend = torch.from_numpy(rng.integers(0, 6, 512)).to(device, torch.int32)
    seq = torch.from_numpy(rng.integers(6, 9000, 512)).to(device)
    prefix = np.concatenate(([0], np.cumsum(extend.cpu().numpy()))).tolist()
    alive: list[Any] = [None] * 16
    per_round = count // ROUNDS
    for _ in range(ROUNDS):
        wrong = 0
        begins = rng.integers(0, 448, per_round).tolist()
        sizes = rng.integers(1, 64, per_round).tolist()
        for at, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            q, kv = extend[begin : begin + size].clone(), seq[begin : begin + size].clone()
            out = torch.empty((2, 400 + at % 97), dtype=torch.int32, device=device)
            total = cupy_nsa_meta.fill_draft_extend_metadata(q, kv, 2048, out[0], out[1])
            alive[at % 16] = (q, kv, out)
            wrong += total != prefix[begin + size] - prefix[begin]
        if total:  # the last row of the last call sees the KV tokens of its request
            last = int(torch.nonzero(q)[-1])
            wrong += int(out[0, total - 1]) != int(kv[last])
        alive = [None] * 16
        del q, kv, out  # nothing of the round is left when memory is looked at
        yield per_round, wrong


PARTS: dict[str, tuple[int, Callable[[str, int], Iterator[tuple[int, int]]]]] = {
    "plan_runs": (PLAN_RUNS, plan_runs),
    "fused_launches": (FUSED_LAUNCHES, fused_launches),
    "eager_calls": (EAGER_CALLS, eager_calls),
}


def run(settings: Settings, save: Save) -> Result:
    result: Result = {"ok": True}
    if settings.device != "cpu":
        cupy_nsa_meta.warmup()
    for name, (wanted, part) in PARTS.items():
        count = wanted // QUICK_DIVISOR if settings.quick else wanted
        begin = time.monotonic()
        watch = Watch(settings.device)
        done = mismatches = 0
        for number, (made, wrong) in enumerate(part(settings.device, count)):
            done += made
            mismatches += int(wrong)
            if number + 1 >= ROUNDS // 10:
                watch.look()
            if time.monotonic() - begin > settings.budget * SHARES[name]:
                watch.look()
                break
        seconds = round(time.monotonic() - begin, 1)
        result[name] = {
            "runs": done,
            "of_runs": count,
            "mismatches": mismatches,
            "seconds": seconds,
            "memory": watch.result(),
        }
        result["ok"] &= not mismatches and result[name]["memory"]["flat"]
        save(result)
        print(f"{name}: {done:,} in {seconds} s, {watch.result()['growth']}", flush=True)
    return result
