"""Calls of the seed operation that are like an earlier one: all but their addresses is known.

A call lasts a few microseconds, and each attribute of a tensor (dtype, device, size, stride) costs
0.1 of one. A ``Form`` is what calls on tensors of the same dtypes, sizes and strides share. That a
call is of a form is told by one guard over all its tensors, whatever objects they are; what is left
are addresses, to be compared with each other and packed, or found among those of captured launches.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from . import _check, _known, _launch
from ._check import MIN_ADDRESS, DraftExtendKey, DraftExtendTensors
from ._draft_extend_args import (
    ONE_LAUNCH_MAX_BS,
    Addresses,
    Constants,
    Launches,
    alignment_bits,
    constants_of,
    geometry,
)
from ._known import Guard

MAX_FORMS = 1024
MAX_TOTALS = 256  # of a form


class Form:
    """What calls on tensors of the same dtypes, sizes and strides share. Keeps no tensor alive."""

    __slots__ = (
        "_bits", "_clamped_bytes", "_cuts", "_expanded_bytes", "_extend_bytes", "_guard",
        "_layout_guard", "_seq_bytes", "_total_guard", "device", "key", "only_cut", "room", "state",
        "topk", "use_adaptive",
    )  # fmt: skip

    def __init__(
        self,
        layout: _check.Layout,
        tensors: DraftExtendTensors,
        key: DraftExtendKey,
        topk: int,
        use_adaptive: bool,
    ) -> None:
        self._layout_guard = layout.guard  # whatever the sizes
        self._guard: Guard | None = None  # made when the form is met again
        self._total_guard: Guard | None = None  # of an ``out_total``
        self.device = key.device
        self.state = _launch.device_state(key.device)
        self.key = key
        self.room = key.limit  # capacity of the outputs
        self.topk = topk
        self.use_adaptive = use_adaptive
        last = key.bs - 1
        self._extend_bytes = tensors[0].element_size() * (last * key.extend_stride + 1)
        self._seq_bytes = tensors[1].element_size() * (last * key.seq_stride + 1)
        self._expanded_bytes = 4 * tensors[2].numel()
        self._clamped_bytes = 4 * tensors[3].numel()
        self._bits = alignment_bits(key.limit)
        self._cuts: dict[tuple[int | None, bool], tuple[Constants, Launches]] = {}
        #: Of calls without a total where addresses do not matter.
        self.only_cut = None if self._bits else self.cut((0, 0, 0, 0))

    def cut(
        self, addresses: Addresses, total_tokens: int | None = None
    ) -> tuple[Constants, Launches]:
        """How a call is cut up: what is packed, kernels and grids."""
        is_aligned = not (addresses[2] | addresses[3]) & self._bits
        found = self._cuts.get((total_tokens, is_aligned))
        if found is not None:
            return found
        key = self.key
        if total_tokens is not None:
            key = key.with_total(total_tokens)
        has_quads = is_aligned and alignment_bits(key.limit) != 0
        shape = geometry(key.bs, key.limit, has_quads, key.use_adaptive, self.state.num_sms)
        if len(self._cuts) >= MAX_TOTALS:
            self._cuts.clear()
        cut = self._cuts[total_tokens, is_aligned] = constants_of(key, shape), shape.launches
        return cut

    def key_at(self, addresses: Addresses) -> DraftExtendKey:
        extend_ptr, seq_ptr, expanded_ptr, clamped_ptr = addresses
        return self.key._replace(
            extend_ptr=extend_ptr,
            seq_ptr=seq_ptr,
            expanded_ptr=expanded_ptr,
            clamped_ptr=clamped_ptr,
        )

    def check(self, tensors: DraftExtendTensors, addresses: Addresses) -> None:
        """Raise where an output shares a byte with another tensor, or a tensor has no memory."""
        extend_ptr, seq_ptr, expanded_ptr, clamped_ptr = addresses
        expanded_end = expanded_ptr + self._expanded_bytes
        clamped_end = clamped_ptr + self._clamped_bytes
        if (
            extend_ptr < MIN_ADDRESS
            or seq_ptr < MIN_ADDRESS
            or expanded_ptr < MIN_ADDRESS
            or clamped_ptr < MIN_ADDRESS
            or (expanded_ptr < clamped_end and clamped_ptr < expanded_end)
            or (extend_ptr < expanded_end and expanded_ptr < extend_ptr + self._extend_bytes)
            or (extend_ptr < clamped_end and clamped_ptr < extend_ptr + self._extend_bytes)
            or (seq_ptr < expanded_end and expanded_ptr < seq_ptr + self._seq_bytes)
            or (seq_ptr < clamped_end and clamped_ptr < seq_ptr + self._seq_bytes)
        ):
            extend, seq, expanded, clamped = tensors
            _check.draft_extend(extend, seq, self.topk, expanded, clamped, True, None)

    def knows_total(self, out_total: Any) -> bool:
        """Whether an ``out_total`` is like one that was checked; its address is not looked at."""
        try:
            return (
                self._total_guard is not None
                and not out_total.is_nested
                and self._total_guard(out_total)
            )
        except (AttributeError, TypeError):  # no tensor
            return False

    def know_total(self, out_total: torch.Tensor) -> None:
        self._total_guard = _known.guard((out_total,))


_forms: dict[Hashable, Form] = {}
_last: Form | None = None  # of the last call


def _key(
    extend: Any, seq: Any, topk: Any, expanded: Any, clamped: Any, use_adaptive: Any
) -> Hashable:
    """What tells one form from most others; the rest is for its guard."""
    return (
        extend.numel(), seq.numel(), expanded.numel(), clamped.numel(), topk, use_adaptive,
        extend.get_device(), extend.dtype, seq.dtype,
    )  # fmt: skip


def find(
    extend: Any, seq: Any, topk: Any, expanded: Any, clamped: Any, use_adaptive: Any
) -> Form | None:
    """The form of a call; None where everything has to be looked at."""
    global _last
    try:
        if extend.is_nested or seq.is_nested or expanded.is_nested or clamped.is_nested:
            return None  # shown to a guard it ends the process
        form = _last
        if (
            form is not None
            and topk.__class__ is int
            and topk == form.topk
            and use_adaptive is form.use_adaptive
            and form._guard is not None
            and form._guard(extend, seq, expanded, clamped)
        ):
            return form
        form = _forms.get(_key(extend, seq, topk, expanded, clamped, use_adaptive))
        if (
            form is None
            or topk.__class__ is not int
            or use_adaptive.__class__ is not bool
            or not form._layout_guard(extend, seq, expanded, clamped)
        ):
            return None
    except (AttributeError, TypeError):  # no tensors, or a number that cannot be hashed
        return None
    if form._guard is None:
        form._guard = _known.guard((extend, seq, expanded, clamped))
    _last = form
    return form


def make(
    tensors: DraftExtendTensors, key: DraftExtendKey, topk: Any, use_adaptive: Any
) -> Form | None:
    """The form of a call that was checked, from now on that of later ones; None: it has none.

    ``key``, ``topk`` and ``use_adaptive`` are what was checked and how it was given.
    """
    if (
        not 0 < key.bs <= ONE_LAUNCH_MAX_BS  # above, a launch needs scratch of its own
        or topk.__class__ is not int
        or use_adaptive.__class__ is not bool
    ):
        return None
    layout = _check.layout_of(tensors)
    if layout.guard is _check.fits_nothing:
        return None
    if len(_forms) >= MAX_FORMS:
        _forms.clear()
    form = Form(layout, tensors, key, topk, use_adaptive)
    extend, seq, expanded, clamped = tensors
    _forms[_key(extend, seq, topk, expanded, clamped, use_adaptive)] = form
    return form
