"""The program that compute-sanitizer watches: every named case once, compared on the CPU.

    python -m benchmarks.reliability.sanitized --result FILE [--cases NAME,...] [--device cpu]

Each tensor is an allocation of its own that ends where the tensor ends (whoever starts this sets
PYTORCH_NO_CUDA_MEMORY_CACHING), its contents come by copies, not by kernels: memcheck then sees the
first byte behind it, and initcheck what nobody has written. No random numbers, no pytest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import cases
import cupy_nsa_meta
import fused_cases
from cases import POISON, Case
from cupy_nsa_meta import _draft_extend_args, _launch, _module
from fused_cases import FUNCTIONS, FusedCase

from . import Result, Settings
from .forms import (
    OUTCOME_POISON,
    FusedBatch,
    SeedBatch,
    call_seed,
    fused_batch,
    record_kernels,
    returns_total,
    seed_batch,
)
from .placing import extent, place_exactly

INPUTS = ("extend_seq_lens", "seq_lens", "req_pool_indices", "req_to_token")
#: Batches of which a plan is made, too: a captured launch of every kernel of the seed operation.
#: They go last: captured graphs are the most that is asked of a tool.
PLAN = "plan_of_"
PLAN_CASES = ("one_row", "quads_warp", "bs_255", "bs_257", "quads_block", "bs_4097", "bs_16385")
QUICK_STRIDE = 6  # --quick takes every sixth case
SAY_EVERY = 20  # cases


class Placed:
    """The tensors of a batch on the device, as they are before it, and what they shall become."""

    def __init__(
        self,
        batch: SeedBatch | FusedBatch,
        arguments: dict[str, Any],
        device: str,
        fresh: bool,
    ) -> None:
        self.after = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
        self.fresh = fresh  # the outputs hold nothing, so that whoever reads one is seen
        self.arguments = batch.block.arguments(batch.before, arguments)
        placed: dict[int, torch.Tensor] = {}
        for name in self.after:
            tensor = self.arguments[name]
            if id(tensor) not in placed:
                placed[id(tensor)] = place_exactly(tensor, device, name in INPUTS or not fresh)
            self.arguments[name] = placed[id(tensor)]

    def difference(self) -> str | None:
        """The first tensor that differs from what it shall be; fresh ones, in what was written."""
        for name, tensor in self.after.items():
            wanted, got = extent(tensor), extent(self.arguments[name]).cpu()
            if self.fresh and name not in INPUTS:
                unwritten = (wanted == POISON) | (wanted == OUTCOME_POISON)
                got = torch.where(unwritten, wanted, got)
            if not torch.equal(wanted, got):
                return name
        return None


def check_seed(
    case: Case, device: str, fresh: bool, forms: Sequence[str] = ("async", "sync")
) -> Iterator[str]:
    """Yield what went wrong, form by form."""
    batch = seed_batch(case)
    for form in forms:
        tensors = dict(batch.tensors)
        if form != "async":
            del tensors["out_total"]  # plans and calls that return the total have none
        placed = Placed(batch, tensors, device, fresh)
        total = None
        try:
            total = call_seed(form, batch, placed.arguments)
        except ValueError:
            if form == "async" or returns_total(batch, form) or case.total_tokens is not None:
                raise
        if returns_total(batch, form) and total != batch.total:
            yield f"{case.name}, {form}: total {total}, expected {batch.total}"
        name = placed.difference()
        if name is not None:
            yield f"{case.name}, {form}: {name}"


def check_fused(case: FusedCase, device: str, fresh: bool) -> Iterator[str]:
    batch = fused_batch(case)
    placed = Placed(batch, batch.built.arguments, device, fresh)
    FUNCTIONS[case.op](**placed.arguments)
    status = cupy_nsa_meta.last_status(device)
    if status != batch.status:
        yield f"{case.name}: status {status}, expected {batch.status}"
    name = placed.difference()
    if name is not None:
        yield f"{case.name}: {name}"


def case_names(quick: bool) -> list[str]:
    names = [item.name for item in cases.CASES + fused_cases.CASES + fused_cases.LARGE_CASES]
    names += [PLAN + name for name in PLAN_CASES]
    return names[::QUICK_STRIDE] if quick else names


SEED = {item.name: item for item in cases.CASES}
FUSED = {item.name: item for item in fused_cases.CASES + fused_cases.LARGE_CASES}


def check(name: str, device: str, fresh: bool) -> Iterator[str]:
    if name.startswith(PLAN):
        return check_seed(SEED[name.removeprefix(PLAN)], device, fresh, ("plan",))
    if name in SEED:
        return check_seed(SEED[name], device, fresh)
    return check_fused(FUSED[name], device, fresh)


def prepare(device: str) -> None:
    """Source lines for the reports, quads at small sizes, a status word that a memset has set."""
    _draft_extend_args.QUADS_MIN_ROWS = cases.QUADS_MIN_ROWS
    if device == "cpu":
        return
    options = _module.compile_options
    _module.compile_options = lambda: (*options(), "-lineinfo")
    word = _launch.status_word(torch.cuda.current_device())
    _module.import_cupy().cuda.runtime.memset(word.data_ptr(), 0, 4)
    torch.cuda.synchronize()


def run(
    names: list[str], settings: Settings, fresh: bool, save: Callable[[Result], None]
) -> Result:
    """Every case until the budget ends; the result is saved as it grows."""
    begin = time.monotonic()
    prepare(settings.device)
    kernels = record_kernels()
    result: Result = {"cases": 0, "of_cases": len(names), "mismatches": 0, "first_mismatch": None}
    for name in names:
        if time.monotonic() - begin > settings.budget:
            break
        for what in check(name, settings.device, fresh):
            result["mismatches"] += 1
            result["first_mismatch"] = result["first_mismatch"] or what
        result["cases"] += 1
        result["kernels"] = sorted(kernels)
        result["seconds"] = round(time.monotonic() - begin, 2)
        save(result)
        if result["cases"] % SAY_EVERY == 1:
            print(f"{result['seconds']:8.2f} s, {result['cases']} cases, {name}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--cases", help="names, separated by commas; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=300)
    parser.add_argument("--fresh", action="store_true", help="outputs that nobody has written")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    names = args.cases.split(",") if args.cases else case_names(args.quick)

    def save(result: Result) -> None:
        args.result.write_text(json.dumps(result))

    run(names, Settings(args.device, args.budget), args.fresh, save)
    if args.device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
