"""Metadata arrays for sparse-attention (NSA/DSA) LLM serving, made on the GPU in one launch.

Importing this package touches no GPU, compiles nothing and needs neither CuPy nor Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _ops as _ops  # registers torch.ops.nsa_meta.*
from .dispatch import (
    fill_draft_extend_metadata,
    fill_draft_extend_metadata_async,
    get_kernel_info,
    is_cuda_kernel_available,
    warmup,
)
from .draft_extend import fill_draft_extend_metadata_cuda
from .draft_extend_plan import DraftExtendPlan, plan_draft_extend_metadata
from .draft_extend_python import fill_draft_extend_metadata_python
from .fused import (
    fused_dsa_decode_metadata,
    fused_dsa_draft_extend_metadata,
    fused_dsa_extend_metadata,
    fused_dsa_target_verify_metadata,
    last_status,
    seqlens_expand,
)
from .fused_plan import (
    plan_fused_dsa_decode_metadata,
    plan_fused_dsa_draft_extend_metadata,
    plan_fused_dsa_extend_metadata,
    plan_fused_dsa_target_verify_metadata,
)

if TYPE_CHECKING:
    from .draft_extend_triton import (
        fill_draft_extend_metadata_fused_simple,
        fill_draft_extend_metadata_inplace,
    )

__version__ = "0.1.0"

__all__ = [
    "DraftExtendPlan",
    "__version__",
    "fill_draft_extend_metadata",
    "fill_draft_extend_metadata_async",
    "fill_draft_extend_metadata_cuda",
    "fill_draft_extend_metadata_fused_simple",
    "fill_draft_extend_metadata_inplace",
    "fill_draft_extend_metadata_python",
    "fused_dsa_decode_metadata",
    "fused_dsa_draft_extend_metadata",
    "fused_dsa_extend_metadata",
    "fused_dsa_target_verify_metadata",
    "get_kernel_info",
    "is_cuda_kernel_available",
    "last_status",
    "plan_draft_extend_metadata",
    "plan_fused_dsa_decode_metadata",
    "plan_fused_dsa_draft_extend_metadata",
    "plan_fused_dsa_extend_metadata",
    "plan_fused_dsa_target_verify_metadata",
    "seqlens_expand",
    "warmup",
]

_TRITON_FUNCTIONS = (
    "fill_draft_extend_metadata_fused_simple",
    "fill_draft_extend_metadata_inplace",
)


def __getattr__(name: str) -> Any:
    if name in _TRITON_FUNCTIONS:  # Triton is imported only when one of its functions is used
        from . import draft_extend_triton

        return getattr(draft_extend_triton, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
