"""Replay steps on every backend: check each step against the reference, then time it.

A step whose outcome differs from ``cupy_nsa_meta.reference.draft_extend`` in the total, in a row or
in any byte around the rows is a mismatch, and a backend with one is not timed any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np
import torch

import cupy_nsa_meta
from cupy_nsa_meta import dispatch, reference

from . import BenchError
from .workload import Step

#: extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens
Arguments = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor]
#: Arguments -> total
Fill = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor], int]

BACKENDS = ("cuda", "triton", "python", "reference")
ON_GPU = ("cuda", "triton", "python")  # what "all" means with a GPU
ON_CPU = ("python", "reference")  # and without one


class BackendError(BenchError):
    """A backend or device asked for by name cannot run."""


@dataclass(frozen=True)
class Selection:
    """What is replayed, and what is left out and why."""

    device: torch.device
    fills: dict[str, Fill]
    absent: dict[str, str]


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to a device; auto is the GPU where torch sees one."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise BackendError(
            "--device cuda: expected an NVIDIA GPU, got none; torch sees no CUDA device"
        )
    if name == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def select(names: Sequence[str], device: torch.device) -> Selection:
    """The functions of the named backends; ``all`` stands for every backend that can run.

    Raises:
        BackendError: a backend asked for by name cannot run.
    """
    fills: dict[str, Fill] = {}
    absent: dict[str, str] = {}
    defaults = ON_GPU if device.type == "cuda" else ON_CPU
    for name in BACKENDS:
        by_name = name in names
        if not by_name and not ("all" in names and name in defaults):
            continue
        reason = unavailable_reason(name, device)
        if reason is None:
            try:
                fills[name] = load_fill(name)
                continue
            except ImportError as error:
                reason = _one_line(error)
        if by_name:
            raise BackendError(f"--backend {name} cannot run: {_one_line(reason)}")
        absent[name] = _one_line(reason)
    return Selection(device, fills, absent)


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """None where a backend runs on ``device``, else why not. Compiles the CUDA kernels."""
    if name == "cuda":
        if device.type == "cuda":
            return dispatch.cuda_unavailable_reason(device.index)
        if torch.cuda.is_available():
            return "it takes CUDA tensors, got --device cpu"
        return dispatch.cuda_unavailable_reason()
    if name == "triton":
        reason = dispatch.triton_unavailable_reason()
        if reason is None and device.type == "cpu" and not _triton_interprets():
            return "it takes CUDA tensors, got --device cpu"
        return reason
    return None


def _triton_interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def load_fill(name: str) -> Fill:
    """The synchronous function of a backend."""
    if name == "reference":
        return fill_by_reference
    functions: dict[str, str] = {
        "cuda": "fill_draft_extend_metadata_cuda",
        "triton": "fill_draft_extend_metadata_inplace",
        "python": "fill_draft_extend_metadata_python",
    }
    fill: Fill = getattr(cupy_nsa_meta, functions[name])
    return fill


def fill_by_reference(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> int:
    """The vectorised torch form, ``reference.draft_extend_into``, for T rows; T is read back.

    It searches rows where ``reference.draft_extend``, which it is checked against, repeats them.
    """
    total = int(extend_seq_lens.sum())
    outcome = reference.draft_extend_into(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        total,
        True,
    )
    written, status = outcome.tolist()
    if status:
        raise ValueError(f"reference.draft_extend_into: expected status 0, got {status}")
    return int(written)


class Arena:
    """Inputs and outputs of one step in one buffer, so that one copy sets or reads all of them.

    In int32 elements, each part a multiple of 512 bytes, the guards never written by anyone::

        extend_seq_lens | seq_lens (int64) | guard | out_seqlens_expanded | guard
        | out_nsa_cache_seqlens | guard
    """

    SENTINEL = -559038737  # 0xdeadbeef; no length is negative
    ALIGN = 128
    GUARD = 128

    def __init__(self, max_bs: int, capacity: int, device: torch.device) -> None:
        slots = self._round_up(max_bs)
        # A row of slack, so that even the largest step has something behind T in its own buffer.
        room = self._round_up(capacity + 1)
        self.extend = slice(0, slots)
        self.seq = slice(slots, 3 * slots)
        self.expanded = slice(self.seq.stop + self.GUARD, self.seq.stop + self.GUARD + room)
        self.clamped = slice(
            self.expanded.stop + self.GUARD, self.expanded.stop + self.GUARD + room
        )
        size = self.clamped.stop + self.GUARD
        on_gpu = device.type == "cuda"

        self._device_image = torch.full((size,), self.SENTINEL, dtype=torch.int32, device=device)
        self.out_expanded = self._device_image[self.expanded]
        self.out_clamped = self._device_image[self.clamped]
        self._device_extend = self._device_image[self.extend]
        self._device_seq = self._device_image[self.seq].view(torch.int64)

        self._initial = torch.full((size,), self.SENTINEL, dtype=torch.int32, pin_memory=on_gpu)
        self._read = self._device_image
        if on_gpu:
            self._read = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self._expected = np.full(size, self.SENTINEL, dtype=np.int32)
        self.bs = 0
        self.total = 0

    @classmethod
    def _round_up(cls, count: int) -> int:
        return -(-max(count, 1) // cls.ALIGN) * cls.ALIGN

    def set_step(self, step: Step, topk: int) -> None:
        """Take over the lengths of a step, and its expected rows from the reference on the CPU."""
        expanded, clamped = reference.draft_extend(
            torch.from_numpy(step.extend_seq_lens), torch.from_numpy(step.seq_lens), topk
        )
        initial = self._initial.numpy()
        for begin in (self.expanded.start, self.clamped.start):  # the rows of the step before
            self._expected[begin : begin + self.total] = self.SENTINEL
        self.bs, self.total = len(step.seq_lens), expanded.numel()
        for image in (initial, self._expected):  # lengths behind bs stay as they were: a stale tail
            image[self.extend][: self.bs] = step.extend_seq_lens
            image[self.seq].view(np.int64)[: self.bs] = step.seq_lens
        for begin, rows in ((self.expanded.start, expanded), (self.clamped.start, clamped)):
            self._expected[begin : begin + self.total] = rows.numpy()

    def reset(self) -> None:
        """Lengths in the input buffers, the sentinel everywhere else."""
        self._device_image.copy_(self._initial, non_blocking=True)

    def arguments(self, topk: int) -> Arguments:
        """Arguments of the seed operation for the step."""
        return (
            self._device_extend[: self.bs],
            self._device_seq[: self.bs],
            topk,
            self.out_expanded,
            self.out_clamped,
        )

    def difference(self, total: object) -> str | None:
        """None where the returned total and every element are as expected, else the first fault."""
        if self._read is not self._device_image:
            self._read.copy_(self._device_image)  # waits for the rows
        image = self._read.numpy()
        if type(total) is not int or total != self.total:
            return f"returned total: expected {self.total}, got {total!r}"
        if np.array_equal(image, self._expected):
            return None
        index = int(np.flatnonzero(image != self._expected)[0])
        expected, got = int(self._expected[index]), int(image[index])
        return (
            f"{self._name(index)}: "
            f"expected {'no write' if expected == self.SENTINEL else expected}, "
            f"got {'no write' if got == self.SENTINEL else got}"
        )

    def _name(self, index: int) -> str:
        if index < self.extend.stop:
            return f"extend_seq_lens[{index}], an input"
        if index < self.seq.stop:
            return f"seq_lens[{(index - self.seq.start) // 2}], an input"
        for name, part in (
            ("out_seqlens_expanded", self.expanded),
            ("out_nsa_cache_seqlens", self.clamped),
        ):
            if index < part.start:
                return f"{part.start - index} elements in front of {name}"
            if index < part.stop:
                return f"{name}[{index - part.start}]"
        return f"{index - self.clamped.stop} elements behind out_nsa_cache_seqlens"


@dataclass
class Result:
    """One backend over all steps."""

    backend: str
    steps: int = 0  # replayed, right or wrong
    requests: int = 0
    rows: int = 0
    mismatches: int = 0
    first_mismatch: str | None = None
    failed: bool = False  # it raised; not called any more
    times_ns: list[int] = field(default_factory=list)

    def count(self, step: Step, rows: int) -> None:
        self.steps += 1
        self.requests = max(self.requests, int(step.request_ids[-1]) + 1)
        self.rows += rows

    def mismatch(self, step_idx: int, arena: Arena, what: str) -> None:
        self.mismatches += 1
        if self.first_mismatch is None:
            self.first_mismatch = f"step {step_idx} (bs {arena.bs}, T {arena.total}): {what}"

    def percentiles_us(self) -> tuple[float, float, float] | None:
        """Median, p20, p80 of the microseconds per step; None for a backend with a mismatch."""
        if self.mismatches or not self.times_ns:
            return None
        median, p20, p80 = np.percentile(np.array(self.times_ns), (50, 20, 80)) / 1000.0
        return round(float(median), 2), round(float(p20), 2), round(float(p80), 2)


@dataclass
class Replay:
    """Results of all backends, and why the run ended early where it did."""

    results: list[Result]
    stopped: str | None = None

    @property
    def mismatches(self) -> int:
        return sum(result.mismatches for result in self.results)


def replay(
    steps: Sequence[Step],
    fills: dict[str, Fill],
    device: torch.device,
    topk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Replay:
    """Check and time every backend on every step.

    In each step all backends are checked; then those without a mismatch so far are timed on the
    same buffers, one call each, starting with another backend each step. A time is that of the call
    until it has returned the total, from an idle device; rows may still be on their way.

    CPU tensors are computed by one thread: the batches are small, and on a machine with other work
    torch's threads wait for each other for milliseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _replay(steps, fills, device, topk, progress)
    finally:
        torch.set_num_threads(threads)


def _replay(
    steps: Sequence[Step],
    fills: dict[str, Fill],
    device: torch.device,
    topk: int,
    progress: Callable[[int], None],
) -> Replay:
    results = [Result(name) for name in fills]
    outcome = Replay(results)
    if not steps:
        return outcome
    arena = Arena(
        max(len(step.seq_lens) for step in steps),
        max(int(step.extend_seq_lens.sum(dtype=np.int64)) for step in steps),
        device,
    )

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def call(step_idx: int, result: Result, timed: bool) -> None:
        fill, arguments = fills[result.backend], arena.arguments(topk)
        what: str | None
        try:
            if not timed:
                arena.reset()
                what = arena.difference(fill(*arguments))
            else:
                begin = perf_counter_ns()
                total = fill(*arguments)
                elapsed = perf_counter_ns() - begin
                synchronize()
                result.times_ns.append(elapsed)
                what = None
                if type(total) is not int or total != arena.total:
                    what = f"returned total: expected {arena.total}, got {total!r} (second call)"
        except Exception as error:
            result.failed = True
            what = f"raised {type(error).__name__}: {_one_line(error)}"
        if what is not None:
            result.mismatch(step_idx, arena, what)
        if result.failed:
            try:
                synchronize()
            except Exception as error:  # the context is lost: nothing can be replayed any more
                outcome.stopped = f"the device failed under {result.backend}: {_one_line(error)}"

    for step_idx, step in enumerate(steps):
        arena.set_step(step, topk)
        for result in results:
            if not result.failed and outcome.stopped is None:
                result.count(step, arena.total)
                call(step_idx, result, timed=False)
        first = step_idx % len(results)
        for result in results[first:] + results[:first]:
            if not result.mismatches and outcome.stopped is None:
                call(step_idx, result, timed=True)
        if outcome.stopped is not None or all(result.failed for result in results):
            break
        progress(step_idx + 1)
    return outcome


def _one_line(text: object, longest: int = 400) -> str:
    """The text of an error or reason on one line (NVRTC and CUDA errors have many)."""
    line = " ".join(str(text).split()) or "no message"
    return line if len(line) <= longest else f"{line[:longest]} ..."
