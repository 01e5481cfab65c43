"""Compile cuda_src/ with g++ and run its kernels on the CPU, plain or under a sanitizer.

The argument structs are packed by the package itself; pointers are replaced by references to
buffers that the harness (cpu_harness.cpp) allocates.
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from cases import POISON, QUADS_MIN_ROWS, Case, Expected
from cupy_nsa_meta import (
    _check,
    _draft_extend_args,
    _fused_args,
    _module,
    fused,
    reference_fused,
)
from cupy_nsa_meta._check import DraftExtendKey, FusedCall
from cupy_nsa_meta._launch import PackedLaunch
from fused_cases import Built, FusedCase
from planted import Patch

TESTS = Path(__file__).resolve().parent
NUM_SMS = 1  # six blocks at most: they run one after another, and large batches reach quad mode
SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
has_compiler = shutil.which("g++") is not None


@functools.cache
def build(sanitizer: str, patch: Patch | None = None, stem: str | None = None) -> Path:
    """The harness executable, with the sources as they stand or with one fault planted.

    ``stem``: with the kernels of one source file; default: of the faulty one, else of all.

    A faulty one runs a case or two, and compiling it is most of its time: it is not optimised.
    """
    if stem is None and patch is not None and patch.file.endswith(".cu"):
        stem = patch.file.removesuffix(".cu")
    stems = tuple(_module.KERNELS) if stem is None else (stem,)
    kernels = [name for stem in stems for name in _module.KERNELS[stem]]
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_cpu_"))
    sources = folder / "cuda_src"
    shutil.copytree(_module.source_dir(), sources)
    if patch is not None:
        patch.apply(sources)
    executable = folder / "harness"
    (folder / "sources.inc").write_text("".join(f'#include "{stem}.cu"\n' for stem in stems))
    (folder / "kernels.inc").write_text(
        "".join(f'{{"{n}", wrap({n}, {_module.block_threads(n)})}},\n' for n in kernels)
    )
    subprocess.run(
        ["g++", "-std=c++20", *(("-O1", "-g") if patch is None else ("-O0",)), "-pthread", "-Wall", "-Wextra", "-Werror",
         "-Wno-unknown-pragmas", *SANITIZERS[sanitizer], f"-I{folder}", f"-I{sources}", f"-I{TESTS}",
         str(TESTS / "cpu_harness.cpp"), "-o", str(executable)],
        check=True,
    )  # fmt: skip
    return executable


def _number(value: int) -> bytes:
    return struct.pack("<Q", value)


def _counted(data: bytes) -> bytes:
    return _number(len(data)) + data


def run(executable: Path, jobs: list[Job], timeout: float = 600) -> list[list[bytes]]:
    """Run jobs in one process; the bytes of every job's buffers afterwards."""
    done = subprocess.run(
        [str(executable)],
        input=_number(len(jobs)) + b"".join(job.encode() for job in jobs),
        capture_output=True,
        timeout=timeout,
        # A race may lead threads to different barriers: end at its report, not at a deadlock.
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
    )
    if done.returncode != 0:
        raise HarnessError(done.stderr.decode(errors="replace"))
    out, at = [], 0
    for job in jobs:
        buffers = []
        for buffer in job.buffers:
            buffers.append(done.stdout[at : at + len(buffer.data)])
            at += len(buffer.data)
        out.append(buffers)
    assert at == len(done.stdout)
    return out


class HarnessError(AssertionError):
    """The harness ended with an error; the text is its stderr (a sanitizer's report, mostly)."""


@dataclass
class Buffer:
    data: bytes
    misalignment: int = 0


@dataclass
class Job:
    """Buffers, an argument struct that points into them, and the launches that share it."""

    buffers: list[Buffer]
    args: bytes
    pointers: list[tuple[int, int, int]]  # position in args, buffer, byte offset
    launches: tuple[tuple[str, int], ...]

    def encode(self) -> bytes:
        parts = [_number(len(self.buffers))]
        parts += [_number(buffer.misalignment) + _counted(buffer.data) for buffer in self.buffers]
        parts += [_counted(self.args), _number(len(self.pointers))]
        parts += [_number(number) for pointer in self.pointers for number in pointer]
        parts.append(_number(len(self.launches)))
        parts += [_counted(name.encode()) + _number(grid) for name, grid in self.launches]
        return b"".join(parts)


EPOCH = 77
EXTEND, SEQ, EXPANDED, CLAMPED, OUT_TOTAL, RESULT, SCRATCH, COUNT = range(8)


def draft_extend_job(case: Case, use_adaptive: bool = True, counted: bool = False) -> Job:
    """The launches that the package would make for a case, on buffers that end where they must.

    ``counted``: the epoch comes from a launch counter in device memory, as in a captured graph.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_draft_extend_args, "QUADS_MIN_ROWS", QUADS_MIN_ROWS)
        return _draft_extend_job(case, use_adaptive, counted)


def _draft_extend_job(case: Case, use_adaptive: bool, counted: bool) -> Job:
    extend, seq = case.lengths()
    # Any pointers will do for the key: the harness puts in its own. Out buffers begin where the
    # case puts them, as seen from a 16-byte boundary.
    key = DraftExtendKey(
        device=0,
        bs=case.bs,
        limit=case.capacity if case.total_tokens is None else case.total_tokens,
        topk=min(case.topk, 2**31 - 1),
        extend_ptr=1,
        seq_ptr=1,
        expanded_ptr=16 + 4 * case.offsets[0],
        clamped_ptr=16 + 4 * case.offsets[1],
        extend_stride=extend.stride(0),
        seq_stride=seq.stride(0),
        flags=(extend.dtype is torch.int64) * _check.EXTEND_IS_INT64
        | (seq.dtype is torch.int64) * _check.SEQ_IS_INT64
        | (case.total_tokens is not None) * _check.TOTAL_IS_GIVEN,
        use_adaptive=use_adaptive,
    )
    shape = _draft_extend_args.shape_of(key, NUM_SMS)
    two_launches = len(shape.launches) > 1
    args = bytearray(_draft_extend_args.ARGS.size)
    _draft_extend_args.pack(
        args,
        _draft_extend_args.constants_of(key, shape),
        _draft_extend_args.addresses_of(key),
        epoch=EPOCH,
        result=1,
        launch_count=int(counted),
        out_total=1,
        scratch=int(two_launches),
    )
    rows = np.full(case.capacity, POISON, dtype=np.int32).tobytes()
    buffers = [
        Buffer(_storage(extend)),
        Buffer(_storage(seq)),
        Buffer(rows, 4 * case.offsets[0]),
        Buffer(rows, 4 * case.offsets[1]),
        Buffer(b"\x55" * 8),
        Buffer(b"\x55" * 8),
        Buffer(b"\x55" * (4 * (case.bs + shape.num_entries) if two_launches else 0)),
        Buffer((EPOCH - 1).to_bytes(4, "little")),
    ]
    fields = {
        "extend_seq_lens": (EXTEND, 0),
        "seq_lens": (SEQ, 0),
        "out_seqlens_expanded": (EXPANDED, 0),
        "out_nsa_cache_seqlens": (CLAMPED, 0),
        "out_total": (OUT_TOTAL, 0),
        "result": (RESULT, 0),
    }
    if two_launches:
        fields |= {"request_ends": (SCRATCH, 0), "tile_totals": (SCRATCH, 4 * case.bs)}
    if counted:
        fields["launch_count"] = (COUNT, 0)
    pointers = [(_draft_extend_args.LAYOUT.at(name), *place) for name, place in fields.items()]
    return Job(buffers, bytes(args), pointers, shape.launches)


def _storage(tensor: torch.Tensor) -> bytes:
    """The bytes from a strided tensor's first element to the end of its last."""
    if not tensor.numel():
        return b""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,)).numpy().tobytes()


def check_draft_extend(case: Case, expected: Expected, buffers: list[bytes]) -> None:
    """Every byte of every buffer of a job is what the reference says."""
    for name, index, rows in (
        ("out_seqlens_expanded", EXPANDED, expected.expanded),
        ("out_nsa_cache_seqlens", CLAMPED, expected.clamped),
    ):
        wanted = np.full(case.capacity, POISON, dtype=np.int32)
        wanted[: len(rows)] = rows.numpy()
        np.testing.assert_array_equal(
            np.frombuffer(buffers[index], np.int32), wanted, err_msg=f"{case.name}: {name}"
        )
    assert struct.unpack("<2i", buffers[OUT_TOTAL]) == (expected.total, expected.status), case.name
    (word,) = struct.unpack("<Q", buffers[RESULT])
    unsigned_total = expected.total & 0xFFFFFFFF
    assert word == unsigned_total | expected.status << 32 | EPOCH << 35, case.name
    extend, seq = case.lengths()
    assert buffers[EXTEND] == _storage(extend), f"{case.name}: the input was written"
    assert buffers[SEQ] == _storage(seq), f"{case.name}: the input was written"


# ---- The fused family ---------------------------------------------------------------------------

FUSED_INPUTS = 4


def fused_call(case: FusedCase) -> FusedCall:
    """The checked call that a case's public function would enqueue."""
    calls: list[FusedCall] = []

    def run(call: FusedCall, width_name: str, met: object) -> None:
        calls.append(_check.fused(call, width_name))

    with mock.patch.object(fused, "_run", run):
        Built(case).run()
    return calls[0]


@dataclass
class FusedJob:
    case: FusedCase
    call: FusedCall
    job: Job
    tensors: list[torch.Tensor]  # of the first buffers; after them the status and the tile sums


def fused_packed(call: FusedCall, num_sms: int, tile_sums: int = 0) -> PackedLaunch:
    """The launch of a checked call; ``tile_sums`` is 0 in the one-launch form."""
    template = _fused_args.Template(call, num_sms, status=1)
    return template.pack(_fused_args.numbers_of(call), tile_sums)


def fused_job(
    case: FusedCase,
    tiled: bool = False,
    total_is_capacity: bool = False,
    num_sms: int | None = None,
) -> FusedJob:
    """The launches that the package would make; ``tiled``: in the form for more than 16,384."""
    call = fused_call(case)._replace(total_is_capacity=total_is_capacity)
    packed = fused_packed(call, num_sms or NUM_SMS, tile_sums=1 if tiled else 0)
    args = packed.buffer[: _fused_args.ARGS.size]
    pointers: list[tuple[int, int, int]] = []
    tensors: list[torch.Tensor] = []
    names = (*FusedCall._fields[:FUSED_INPUTS], *call.outputs._fields)
    for name, tensor in zip(names, (*call[:FUSED_INPUTS], *call.outputs), strict=True):
        at = _fused_args.LAYOUT.at(name)
        if struct.unpack_from("<Q", args, at)[0]:
            pointers.append((at, len(tensors), 0))
            tensors.append(tensor)
    buffers = [Buffer(_storage(tensor), tensor.data_ptr() % 16) for tensor in tensors]
    pointers.append((_fused_args.STATUS_AT, len(buffers), 0))
    buffers.append(Buffer(bytes(4)))
    if tiled:
        pointers.append((_fused_args.LAYOUT.at("tile_sums"), len(buffers), 0))
        buffers.append(
            Buffer(b"\x55" * (8 * _fused_args.NUM_TILE_SUMS * _fused_args.num_tiles(call.bs)))
        )
    job = Job(buffers, bytes(args), pointers, packed.launches)
    return FusedJob(case, call, job, tensors)


def check_fused(item: FusedJob, buffers: list[bytes]) -> None:
    """Every byte of every buffer of a job, and the status, are what the reference says."""
    status = int(reference_fused.metadata(item.call))
    names = {
        tensor.data_ptr(): name
        for name, tensor in (item.call._asdict() | item.call.outputs._asdict()).items()
        if isinstance(tensor, torch.Tensor)
    }
    for tensor, got in zip(item.tensors, buffers, strict=False):
        wanted = _storage(tensor)
        if got != wanted:
            name = names[tensor.data_ptr()]
            dtype = np.int64 if tensor.dtype == torch.int64 else np.int32
            np.testing.assert_array_equal(
                np.frombuffer(got, dtype),
                np.frombuffer(wanted, dtype),
                err_msg=f"{item.case.name}: {name}",
            )
    got_status = int.from_bytes(buffers[len(item.tensors)], "little")
    assert got_status == status, f"{item.case.name}: status {got_status}, expected {status}"
