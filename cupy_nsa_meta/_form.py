"""Calls of the seed operation that are like an earlier one: all but their addresses is known.

A call lasts a few microseconds, and each attribute of a tensor (dtype, device, size, stride) costs
0.1 of one. A ``Form`` is what calls on tensors of the same dtypes, sizes and strides share. From
about the third call on one guard over all tensors tells the form, whatever objects they are; what
is left are addresses, to be compared with each other and packed, or found among those of captured
launches.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from typing import Any

import torch

from . import _check, _known, _launch
from ._check import Addresses, DraftExtendKey, DraftExtendTensors
from ._draft_extend_args import (
    ONE_LAUNCH_MAX_BS,
    Constants,
    alignment_bits,
    constants_of,
    geometry,
)
from ._graphs import thread
from ._known import Guard
from ._launch import Launches

MAX_FORMS = 1024
MAX_TOTALS = 256  # of a form


class Form:
    """The numbers that calls share which differ in addresses alone. Keeps no tensor alive.

    There is one form of the same numbers, until there are MAX_FORMS and all are forgotten.
    """

    __slots__ = (
        "_bits", "_cuts", "_spans", "_total_guard", "device", "key", "number", "only_cut", "state",
        "times_met",
    )  # fmt: skip

    def __init__(self, tensors: DraftExtendTensors, key: DraftExtendKey) -> None:
        #: Names the form in the keys of launches; never used again.
        self.number = next(_numbers)
        #: Of the first call: its addresses are not those of others (``key_at``).
        self.key = key
        self.device = key.device
        self.state = _launch.device_state(key.device)
        self._spans = tuple(map(_check.span, tensors))
        self._bits = alignment_bits(key.limit)
        self._cuts: dict[tuple[int | None, bool], tuple[Constants, Launches]] = {}
        #: That of calls without a total where addresses do not matter, once it was asked for.
        self.only_cut: tuple[Constants, Launches] | None = None
        self._total_guard: Guard | None = None  # of an ``out_total``
        self.times_met = 1  # by calls that were not found

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
        if total_tokens is None and not self._bits:
            self.only_cut = cut
        return cut

    def key_at(self, addresses: Addresses) -> DraftExtendKey:
        """The key of a call of this form."""
        extend_ptr, seq_ptr, expanded_ptr, clamped_ptr = addresses
        return self.key._replace(
            extend_ptr=extend_ptr,
            seq_ptr=seq_ptr,
            expanded_ptr=expanded_ptr,
            clamped_ptr=clamped_ptr,
        )

    def check(self, tensors: DraftExtendTensors, addresses: Addresses) -> None:
        """Raise where an output shares a byte with another tensor, or a tensor has no memory."""
        if not _check.are_apart(addresses, self._spans):
            extend, seq, expanded, clamped = tensors
            _check.draft_extend(extend, seq, self.key.topk, expanded, clamped, True, None)

    def knows_total(self, out_total: Any) -> bool:
        """Whether an ``out_total`` is like one that was checked; its address is not looked at."""
        try:  # _known.is_like, less its loop
            return (
                self._total_guard is not None
                and not out_total.is_nested
                and self._total_guard(out_total)
            )
        except Exception:  # no tensor; the check says so
            return False

    def know_total(self, out_total: torch.Tensor) -> None:
        self._total_guard = _known.guard((out_total,))


class _Likeness:
    """By what calls of a form are recognised."""

    __slots__ = ("form", "guard", "topk", "use_adaptive")

    def __init__(self, guard: Guard, topk: int, use_adaptive: bool, form: Form) -> None:
        self.guard = guard  # over types, dtypes, devices, sizes and strides
        self.topk = topk
        self.use_adaptive = use_adaptive
        self.form = form


_numbers = count()
_forms: dict[Hashable, Form] = {}
_likenesses: dict[Hashable, _Likeness] = {}
_last: _Likeness | None = None


def find(
    extend: Any, seq: Any, topk: Any, expanded: Any, clamped: Any, use_adaptive: Any
) -> Form | None:
    """The form of a call; None where everything has to be looked at."""
    global _last
    try:
        if extend.is_nested or seq.is_nested or expanded.is_nested or clamped.is_nested:
            return None  # shown to a guard it ends the process
        like = _last
        if (
            like is not None
            and topk.__class__ is int
            and topk == like.topk
            and use_adaptive is like.use_adaptive
            and like.guard(extend, seq, expanded, clamped)
        ):
            return like.form
        like = _likenesses.get(_name(extend, seq, topk, expanded, clamped, use_adaptive))
        if (
            like is None
            or topk.__class__ is not int  # 4.0 and True are not 4 and 1
            or use_adaptive.__class__ is not bool
            or not like.guard(extend, seq, expanded, clamped)
        ):
            return None
    except Exception:  # whatever is no tensor or number; the check says what
        return None
    _last = like
    return like.form


def form_of(
    tensors: DraftExtendTensors,
    key: DraftExtendKey,
    topk: Any,
    use_adaptive: Any,
    may_be_the_only: bool,
) -> Form | None:
    """The form of a call that was checked and not found; later ones are found by it. Above
    ONE_LAUNCH_MAX_BS there is none: a launch needs scratch of its own.

    ``key`` is the call without a total, ``topk`` and ``use_adaptive`` are as they were given. Where
    it ``may_be_the_only`` call of its numbers, it has no form unless they are met again.
    """
    if not 0 < key.bs <= ONE_LAUNCH_MAX_BS:
        return None
    extend, seq, expanded, clamped = tensors
    numbers = (
        key.device, key.bs, key.limit, key.topk, key.extend_stride, key.seq_stride, key.flags,
        key.use_adaptive, expanded.numel(), clamped.numel(),
    )  # fmt: skip
    form = _forms.get(numbers)
    if form is None:
        if may_be_the_only and not thread.met_forms.is_again(numbers):
            return None
        if len(_forms) >= MAX_FORMS:
            _forms.clear()
        _forms[numbers] = form = Form(tensors, key)
        return form
    form.times_met += 1
    if (
        form.times_met in _known.DUE  # some are never found: arrays of DLPack, subclasses in turn
        and topk.__class__ is int
        and use_adaptive.__class__ is bool
        and (guard := _known.guard(tensors)) is not None
    ):
        if len(_likenesses) >= MAX_FORMS:
            _likenesses.clear()
        name = _name(extend, seq, topk, expanded, clamped, use_adaptive)
        _likenesses[name] = _Likeness(guard, topk, use_adaptive, form)
    return form


def _name(
    extend: Any, seq: Any, topk: Any, expanded: Any, clamped: Any, use_adaptive: Any
) -> Hashable:
    """Tells likenesses apart. Of those that differ in more (a subclass) the last one is kept."""
    return (
        extend.numel(), seq.numel(), expanded.numel(), clamped.numel(), topk, use_adaptive,
        extend.get_device(), extend.dtype, seq.dtype, extend.stride(), seq.stride(),
    )  # fmt: skip
