"""Choosing a backend: CUDA, else Triton, else Python; once per device, by what is available."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from . import _check, _env, _launch, _module, _traced
from ._draft_extend_args import BLOCK_THREADS, LINEAR_SEARCH_MAX_BS
from .draft_extend import fill_draft_extend_metadata_cuda, fill_draft_extend_metadata_cuda_async
from .draft_extend_python import (
    fill_draft_extend_metadata_python,
    fill_draft_extend_metadata_python_async,
)


class Backend(NamedTuple):
    """The functions of one backend."""

    name: str
    fill: Callable[..., int]
    fill_async: Callable[..., torch.Tensor]


PYTHON = Backend(
    "python", fill_draft_extend_metadata_python, fill_draft_extend_metadata_python_async
)
CUDA = Backend("cuda", fill_draft_extend_metadata_cuda, fill_draft_extend_metadata_cuda_async)

_chosen: dict[tuple[str, int], Backend] = {}
_cuda_reasons: dict[int, str | None] = {}


def _after_fork_in_child() -> None:
    _chosen.clear()
    _cuda_reasons.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def cuda_unavailable_reason(device: int | None = None) -> str | None:
    """None where the CUDA kernels run on ``device`` (default: the current one), else why not.

    The first call per device compiles the kernels, unless a CUDA graph is being captured. In a
    forked child of a process that used CUDA, where no backend serves CUDA tensors, the question
    about tensors of a device raises.
    """
    if device is None:
        if _launch.is_forked():
            return _launch.FORKED
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    if device in _cuda_reasons:
        return _cuda_reasons[device]
    if device >= 0:
        _launch.refuse_forked()
    try:
        _module.import_cupy()
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing is compiled now, and nothing is remembered
        _launch.device_state(device)
        reason = None
    except _module.KernelUnavailableError as error:
        reason = str(error)
    _cuda_reasons[device] = reason
    return reason


def triton_unavailable_reason() -> str | None:
    """None where Triton kernels run, else why not and what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    from triton import knobs

    if not torch.cuda.is_available() and not knobs.runtime.interpret:
        return "torch sees no CUDA device; a GPU, or TRITON_INTERPRET=1 for the CPU, is needed"
    return None


def choose(device: int) -> Backend:
    """The backend for tensors on CUDA device ``device`` (-1: the CPU)."""
    wanted = _env.backend()
    backend = _chosen.get((wanted, device))
    if backend is None:
        backend = _chosen[wanted, device] = _choose(wanted, device)
    return backend


def _choose(wanted: str, device: int) -> Backend:
    if wanted == "python" or (wanted == "auto" and device < 0):
        return PYTHON
    if wanted in ("cuda", "auto"):
        reason = cuda_unavailable_reason(device if device >= 0 else None)
        if reason is None:
            return CUDA
        if wanted == "cuda":
            raise RuntimeError(f"CUPY_NSA_META_BACKEND=cuda cannot run: {reason}")
    reason = triton_unavailable_reason()
    if reason is None:
        from . import draft_extend_triton

        return Backend(
            "triton",
            draft_extend_triton.fill_draft_extend_metadata_inplace,
            draft_extend_triton.fill_draft_extend_metadata_triton_async,
        )
    if wanted == "triton":
        raise RuntimeError(f"CUPY_NSA_META_BACKEND=triton cannot run: {reason}")
    return PYTHON


def _device_of(array: Any) -> int:
    """CUDA device index of a tensor or DLPack array; -1 for everything else."""
    if isinstance(array, torch.Tensor):
        return array.get_device() if array.is_cuda else -1
    device_of = getattr(array, "__dlpack_device__", None)
    if device_of is None:
        return -1  # the backend's check raises
    kind, index = device_of()
    return int(index) if kind in (2, 13) else -1


def fill_draft_extend_metadata(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: int | None = None,
) -> int:
    """``fill_draft_extend_metadata_cuda`` where it runs, else the Triton kernel, else plain torch.

    CPU tensors go to plain torch. The choice is made once per device, by what is available;
    CUPY_NSA_META_BACKEND=cuda|triton|python makes it instead, and a backend asked for by name that
    cannot run raises ``RuntimeError``. An error in a call is raised, it never changes the choice.
    Arguments, result and errors are those of ``fill_draft_extend_metadata_cuda``.
    """
    if is_compiling():
        return _traced.fill(
            "auto", extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
            out_nsa_cache_seqlens, use_adaptive, total_tokens,
        )  # fmt: skip
    return choose(_device_of(extend_seq_lens)).fill(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens=total_tokens,
    )


def fill_draft_extend_metadata_async(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: int | None = None,
    out_total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Enqueue the seed operation; leave total and status on the device.

    Args:
        out_total: [2] int32 on the same device, filled and returned; allocated where None.
        The others as in ``fill_draft_extend_metadata_cuda``.

    Returns:
        int32 [2]: T (-1 with status 2 and 3) and the status word: 0 fine; 1 T over the capacity;
        2 a negative extend length; 3 a length or sum outside int32; 4 T differs from
        ``total_tokens``. Rows are written with 0 ([0, T)) and 4 ([0, min(T, total_tokens))) only.

    Raises:
        TypeError, ValueError: bad arguments, before the launch.

    Stream: torch's current stream of the tensors' device; no synchronisation. Can be captured after
    ``warmup``; replay reads the lengths that the buffers hold then.
    """
    if is_compiling():
        return _traced.fill_async(
            extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens,
            use_adaptive, total_tokens, out_total,
        )  # fmt: skip
    return choose(_device_of(extend_seq_lens)).fill_async(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens=total_tokens,
        out_total=out_total,
    )


def is_cuda_kernel_available() -> bool:
    """Whether the CUDA kernels run on the current device. Compiles them at the first call."""
    return cuda_unavailable_reason() is None


def get_kernel_info() -> dict[str, Any]:
    """What the CUDA backend is, and why it is unavailable where it is (``reason``)."""
    reason = cuda_unavailable_reason()
    on_gpu = torch.cuda.is_available() and not _launch.is_forked()
    device = torch.cuda.current_device() if on_gpu else None
    return {
        "available": reason is None,
        "backend": "CUDA C++",
        "adaptive": True,
        "binary_search_threshold": LINEAR_SEARCH_MAX_BS,
        "block_size": BLOCK_THREADS,
        "reason": reason,
        "device": None if device is None else torch.cuda.get_device_name(device),
        "architecture": None if device is None else _module.architecture(device),
        "torch_version": torch.__version__,
        **_module.versions(),
    }


def warmup(device: int | torch.device | str | None = None) -> None:
    """Compile, load and allocate everything for a device ahead of the first call or capture.

    After it, no call loads a module or allocates pinned memory. Runs every kernel once on a batch
    without rows and waits for it.

    Args:
        device: a CUDA device; default: the current one.

    Raises:
        TypeError, ValueError: no CUDA device.
        RuntimeError: the CUDA backend cannot run here (reason and remedy), or a CUDA graph is being
            captured.
    """
    _launch.refuse_forked()
    _module.import_cupy()
    index = torch.cuda.current_device() if device is None else _check.device_index(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("cupy_nsa_meta.warmup: not allowed while a CUDA graph is being captured")
    for stem in _module.KERNELS:  # the Python twin of each source file; fused imports this module
        importlib.import_module(f".{stem}", __package__).warm(index)
