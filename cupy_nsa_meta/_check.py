"""Host-side checks: what types, shapes, devices, layouts and capacities can tell before a launch.

One line per error: the argument's name, what was expected, what came. ``TypeError`` for types and
dtypes, ``ValueError`` for shape, device, layout and overlap. Nothing has been written when one of
these is raised. What only the device knows becomes a status word instead (``_status.py``).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy
import torch

from ._status import INT32_MAX

_Tensor = torch.Tensor
_int32 = torch.int32
_int64 = torch.int64
_CONTIGUOUS = (1,)


DraftExtendArrays = (
    "extend_seq_lens",
    "seq_lens",
    "out_seqlens_expanded",
    "out_nsa_cache_seqlens",
)
DraftExtendTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

EXTEND_IS_INT64 = 1
SEQ_IS_INT64 = 2
TOTAL_IS_GIVEN = 8


class DraftExtendKey(NamedTuple):
    """A seed-operation call as integers: calls with equal keys are the same launch."""

    device: int  # CUDA device index, -1 for the CPU
    bs: int
    limit: int  # total_tokens where given, else the capacity of the out buffers
    topk: int  # clamped to int32: lengths never pass that
    extend_ptr: int
    seq_ptr: int
    expanded_ptr: int
    clamped_ptr: int
    extend_stride: int
    seq_stride: int
    flags: int  # EXTEND_IS_INT64 | SEQ_IS_INT64 | TOTAL_IS_GIVEN
    use_adaptive: bool


def draft_extend(
    extend_seq_lens: Any,
    seq_lens: Any,
    nsa_index_topk: Any,
    out_seqlens_expanded: Any,
    out_nsa_cache_seqlens: Any,
    use_adaptive: Any,
    total_tokens: Any,
) -> tuple[DraftExtendTensors, DraftExtendKey]:
    """Check the arguments of the seed operation; every backend and plan goes through here.

    A call lasts a few microseconds and an attribute of a tensor costs 0.05 to 0.1: each is read
    once, and ``_explain_draft_extend`` looks again where something is unusual.
    """
    if not (
        isinstance(extend_seq_lens, _Tensor)
        and isinstance(seq_lens, _Tensor)
        and isinstance(out_seqlens_expanded, _Tensor)
        and isinstance(out_nsa_cache_seqlens, _Tensor)
    ):
        extend_seq_lens = as_tensor("extend_seq_lens", extend_seq_lens)
        seq_lens = as_tensor("seq_lens", seq_lens)
        out_seqlens_expanded = as_tensor("out_seqlens_expanded", out_seqlens_expanded, True)
        out_nsa_cache_seqlens = as_tensor("out_nsa_cache_seqlens", out_nsa_cache_seqlens, True)
    tensors = (extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens)
    if type(nsa_index_topk) is not int or not 1 <= nsa_index_topk <= INT32_MAX:
        nsa_index_topk = min(integer("nsa_index_topk", nsa_index_topk, 1), INT32_MAX)
    if use_adaptive is not True and use_adaptive is not False:
        use_adaptive = boolean("use_adaptive", use_adaptive)

    extend_dtype = extend_seq_lens.dtype
    seq_dtype = seq_lens.dtype
    extend_strides = extend_seq_lens.stride()
    seq_strides = seq_lens.stride()
    bs = extend_seq_lens.numel()
    room_expanded = out_seqlens_expanded.numel()
    room_clamped = out_nsa_cache_seqlens.numel()
    device = extend_seq_lens.get_device()  # -1 on the CPU, and on no device at all
    if not (
        (extend_dtype is _int32 or extend_dtype is _int64)
        and (seq_dtype is _int64 or seq_dtype is _int32)
        and out_seqlens_expanded.dtype is _int32
        and out_nsa_cache_seqlens.dtype is _int32
        and len(extend_strides) == 1
        and len(seq_strides) == 1
        and out_seqlens_expanded.stride() == _CONTIGUOUS
        and out_nsa_cache_seqlens.stride() == _CONTIGUOUS
        and seq_lens.numel() == bs
        and extend_seq_lens.is_cuda
        and seq_lens.get_device() == device
        and out_seqlens_expanded.get_device() == device
        and out_nsa_cache_seqlens.get_device() == device
    ):
        _explain_draft_extend(*tensors)

    limit = room_expanded if room_expanded < room_clamped else room_clamped
    if limit > INT32_MAX:
        limit = INT32_MAX
    flags = (extend_dtype is _int64) + 2 * (seq_dtype is _int64)
    if total_tokens is not None:
        if type(total_tokens) is not int or total_tokens < 0:
            total_tokens = integer("total_tokens", total_tokens, 0)
        if total_tokens > limit:
            raise ValueError(
                f"total_tokens: expected <= {limit}, the capacity of the out buffers "
                f"(out_seqlens_expanded [{room_expanded}], out_nsa_cache_seqlens "
                f"[{room_clamped}]), got {total_tokens}"
            )
        limit = total_tokens
        flags += TOTAL_IS_GIVEN

    extend_ptr = extend_seq_lens.data_ptr()
    seq_ptr = seq_lens.data_ptr()
    expanded_ptr = out_seqlens_expanded.data_ptr()
    clamped_ptr = out_nsa_cache_seqlens.data_ptr()
    extend_stride = extend_strides[0]
    seq_stride = seq_strides[0]
    # Spans of bytes first; exact positions only where two of them meet.
    expanded_end = expanded_ptr + 4 * room_expanded
    clamped_end = clamped_ptr + 4 * room_clamped
    extend_end = extend_ptr + (8 if flags & EXTEND_IS_INT64 else 4) * ((bs - 1) * extend_stride + 1)
    seq_end = seq_ptr + (8 if flags & SEQ_IS_INT64 else 4) * ((bs - 1) * seq_stride + 1)
    if (
        (expanded_ptr < clamped_end and clamped_ptr < expanded_end)
        or (expanded_ptr < extend_end and extend_ptr < expanded_end)
        or (clamped_ptr < extend_end and extend_ptr < clamped_end)
        or (expanded_ptr < seq_end and seq_ptr < expanded_end)
        or (clamped_ptr < seq_end and seq_ptr < clamped_end)
    ):
        outside_input("out_nsa_cache_seqlens", tensors[3], "out_seqlens_expanded", tensors[2])
        for name, out in (
            ("out_seqlens_expanded", tensors[2]),
            ("out_nsa_cache_seqlens", tensors[3]),
        ):
            outside_input(name, out, "extend_seq_lens", tensors[0])
            outside_input(name, out, "seq_lens", tensors[1])
    return tensors, tuple.__new__(
        DraftExtendKey,
        (
            device,
            bs,
            limit,
            nsa_index_topk,
            extend_ptr,
            seq_ptr,
            expanded_ptr,
            clamped_ptr,
            extend_stride,
            seq_stride,
            flags,
            use_adaptive,
        ),
    )


def _explain_draft_extend(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> None:
    """Raise for dtype, shape, layout or device; return where the tensors are good (on the CPU)."""
    bs = lengths("extend_seq_lens", extend_seq_lens)
    num_seq_lens = lengths("seq_lens", seq_lens)
    if num_seq_lens != bs:
        raise ValueError(f"seq_lens: expected [{bs}] like extend_seq_lens, got [{num_seq_lens}]")
    output("out_seqlens_expanded", out_seqlens_expanded)
    output("out_nsa_cache_seqlens", out_nsa_cache_seqlens)
    same_device(
        extend_seq_lens=extend_seq_lens,
        seq_lens=seq_lens,
        out_seqlens_expanded=out_seqlens_expanded,
        out_nsa_cache_seqlens=out_nsa_cache_seqlens,
    )


def out_total(array: Any, tensors: DraftExtendTensors, key: DraftExtendKey) -> torch.Tensor:
    """Check the ``out_total`` [2] of an asynchronous call against its other arguments."""
    tensor = array if isinstance(array, _Tensor) else as_tensor("out_total", array, writable=True)
    if not (
        tensor.dtype is _int32
        and tensor.numel() == 2
        and tensor.stride() == (1,)
        and tensor.get_device() == key.device
        and key.device >= 0
    ):
        room = output("out_total", tensor)
        if room != 2:
            raise ValueError(f"out_total: expected shape [2] (total, status), got [{room}]")
        same_device(extend_seq_lens=tensors[0], out_total=tensor)
    begin = tensor.data_ptr()
    end = begin + 8
    for name, other in zip(DraftExtendArrays, tensors, strict=True):
        at = other.data_ptr()
        if at < end and begin < at + other.element_size() * _span(other):
            outside_input("out_total", tensor, name, other)
    return tensor


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one of a 1-D tensor, those between included."""
    return (tensor.numel() - 1) * tensor.stride()[0] + 1


def lengths(name: str, tensor: torch.Tensor) -> int:
    """An input of lengths: 1-D, int32 or int64, any stride. Returns its number of elements."""
    dtype = tensor.dtype
    if dtype is not _int32 and dtype is not _int64:
        raise TypeError(f"{name}: expected dtype torch.int32 or torch.int64, got {dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {list(tensor.shape)}")
    return tensor.numel()


def output(name: str, tensor: torch.Tensor) -> int:
    """An output: 1-D, int32, contiguous. Returns its number of elements."""
    if tensor.dtype is not _int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got stride {tensor.stride(0)} "
            f"(shape {list(tensor.shape)}); it is written in place, so a copy would lose the result"
        )
    return tensor.numel()


def integer(name: str, value: Any, lowest: int) -> int:
    """A Python or NumPy integer >= ``lowest``; a bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, (int, numpy.integer)):
        raise TypeError(f"{name}: expected an int >= {lowest}, got {type(value).__name__}")
    if value < lowest:
        raise ValueError(f"{name}: expected an int >= {lowest}, got {value}")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """A Python or NumPy bool."""
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return bool(value)


def same_device(**tensors: torch.Tensor) -> None:
    """All tensors on one device, which is a CUDA device or the CPU."""
    (first_name, first), *others = tensors.items()
    if not (first.is_cuda or first.is_cpu):
        raise ValueError(f"{first_name}: expected a CUDA or CPU tensor, got {first.device}")
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device} like {first_name}, got {tensor.device}"
            )


def not_on_cuda() -> ValueError:
    """For CPU tensors given to the CUDA function."""
    return ValueError(
        "extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens: expected CUDA "
        "tensors, got cpu (fill_draft_extend_metadata takes tensors of either device)"
    )


def outside_input(out_name: str, out: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise where a contiguous output shares bytes with a 1-D tensor of any stride."""
    if not out.numel() or not other.numel():
        return  # no elements, no overlap: zero-size tensors may share a pointer
    size, step = other.element_size(), other.element_size() * other.stride(0)
    out_begin = out.data_ptr() - other.data_ptr()
    out_end = out_begin + out.element_size() * out.numel()
    # The first element of `other` that ends behind out_begin overlaps if it begins before out_end.
    first = 0 if step == 0 else max(0, (out_begin - size) // step + 1)
    begin = first * step
    if first < other.numel() and begin < out_end and begin + size > out_begin:
        raise overlap_error(out_name, other_name)


def overlap_error(out_name: str, other_name: str) -> ValueError:
    return ValueError(f"{out_name}: expected memory of its own, got an overlap with {other_name}")


# ---- Foreign arrays -----------------------------------------------------------------------------

_DLPACK_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY


class _DLManagedTensorVersioned(ctypes.Structure):
    """The head of DLPack's ``DLManagedTensorVersioned`` (DLPack 1.0), up to ``flags``."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


def as_tensor(name: str, array: Any, writable: bool = False) -> torch.Tensor:
    """Share the memory of any object with ``__dlpack__`` as a torch tensor, without a copy.

    The exporter is asked not to synchronise (stream -1): ordering against the stream that produced
    the array is the caller's.
    """
    if isinstance(array, _Tensor):
        return array
    export = getattr(type(array), "__dlpack__", None)
    if export is None or not hasattr(array, "__dlpack_device__"):
        raise TypeError(
            f"{name}: expected a torch.Tensor or an object with __dlpack__, "
            f"got {type(array).__name__}"
        )
    try:
        capsule = _export(array)
        if writable and (_is_read_only(capsule) or _is_immutable(array)):
            raise ValueError(
                f"{name}: expected a writable array, got a read-only {type(array).__name__}"
            )
        return torch.utils.dlpack.from_dlpack(capsule)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"{name}: expected an array that DLPack can share, got {type(array).__name__} ({error})"
        ) from error


def _export(array: Any) -> Any:
    stream = -1 if array.__dlpack_device__()[0] in _DLPACK_CUDA_DEVICES else None
    try:
        return array.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:  # an exporter from before DLPack 1.0
        pass
    except RuntimeError:  # JAX does not know the stream -1
        return array.__dlpack__()
    return array.__dlpack__(stream=stream)


def _is_read_only(capsule: Any) -> bool:
    name = b"dltensor_versioned"
    is_valid = ctypes.pythonapi.PyCapsule_IsValid
    is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
    if not is_valid(capsule, name):
        return False
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    get_pointer.restype = ctypes.c_void_p
    managed = _DLManagedTensorVersioned.from_address(get_pointer(capsule, name))
    return bool(managed.flags & _DLPACK_READ_ONLY)


def _is_immutable(array: Any) -> bool:
    """Exporters that cannot say so through DLPack: JAX arrays, read-only NumPy arrays."""
    if type(array).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return True
    flags = getattr(array, "flags", None)
    return getattr(flags, "writeable", True) is False
