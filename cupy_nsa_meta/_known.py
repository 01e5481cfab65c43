"""Tensors that were checked before, recognised by one look at all of them.

A call lasts a few microseconds, and each attribute of a tensor (dtype, device, size, stride,
address) costs 0.1 of one. torch has a function that compares all but the addresses of several
tensors at once, for the guards of compiled code; together with the addresses it tells whether the
check, the argument struct or the captured launch of an earlier call is right for this one. No
tensor is kept alive: a guard holds numbers.

Where torch has no such function every call is checked attribute by attribute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch

_TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None

#: ``guard(*tensors)``: True where they are like those that the guard was made from.
Guard = Callable[..., bool]

data_ptr = torch.Tensor.data_ptr
_ANY = None  # a size that the guard does not look at


def guard(tensors: Sequence[torch.Tensor], any_size: bool = False) -> Guard | None:
    """A guard over type, dtype, device, dimensions, sizes (unless ``any_size``) and strides.

    None where there can be none: for the same object twice, or without torch's function, which
    ends the process where it meets a nested tensor (torch 2.11 to 2.13): see ``is_like``.
    """
    if _TensorGuards is None:
        return None
    try:
        sizes = [[_ANY] * t.dim() if any_size else list(t.shape) for t in tensors]
        strides = [list(t.stride()) for t in tensors]
        check: Guard = _TensorGuards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        return check if check(*tensors) else None
    except (TypeError, RuntimeError, AttributeError):  # another version of torch, a nested tensor
        return None


def is_like(guard: Guard, tensors: Sequence[Any]) -> bool:
    """Whether any objects pass a guard, which must not be shown a nested tensor."""
    try:
        return not any(map(_is_nested, tensors)) and guard(*tensors)
    except TypeError:  # no tensor
        return False


_is_nested = torch.Tensor.is_nested.__get__  # type: ignore[attr-defined]


#: In a dict of what is kept for calls: what a key that was never met stands for, None being one
#: that was met once.
NEVER: Any = object()


class MetOnce:
    """Keys that were met once, by their hashes; the oldest makes room."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._hashes: dict[int, None] = {}

    def is_again(self, key: Hashable) -> bool:
        """Whether a key was met before; it is from now on."""
        number = hash(key)
        if number in self._hashes:
            return True
        if len(self._hashes) >= self.max_size:
            self._hashes.pop(next(iter(self._hashes)), None)
        self._hashes[number] = None
        return False

    def forget(self, key: Hashable) -> None:
        self._hashes.pop(hash(key), None)


Value = TypeVar("Value")


class KnownCalls(Generic[Value]):
    """What is kept for calls on known tensors, by the ids of the objects and what else a call is.

    An entry ends with the first of its tensors, so an id that is found is that of the very object,
    whose sizes, address and so on are for the guard to compare. It is made when its key is met the
    second time, then the eighth and so on: most callers either use the same tensors all the time or
    new ones all the time, and new ones may get old ids. A full collection starts anew: a server
    makes few kinds of calls.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.entries: dict[Hashable, Value] = {}
        self.find = self.entries.get
        self._alive: dict[Hashable, list[weakref.ref[torch.Tensor]]] = {}
        self._met: dict[int, int] = {}

    def is_due(self, key: Hashable) -> bool:
        """Count a meeting with a key that has no valid entry; whether to make one now."""
        number = hash(key)
        times = self._met.pop(number, 0) + 1
        if len(self._met) >= self.max_size:
            self._met.clear()
        self._met[number] = times
        return times in DUE

    def keep(self, key: Hashable, value: Value, tensors: Sequence[torch.Tensor]) -> None:
        if len(self.entries) >= self.max_size:
            self.clear()
        entries, alive = self.entries, self._alive

        def forget(_: weakref.ref[torch.Tensor]) -> None:
            entries.pop(key, None)
            alive.pop(key, None)

        alive[key] = [weakref.ref(tensor, forget) for tensor in tensors]
        entries[key] = value

    def clear(self) -> None:
        self.entries.clear()
        self._alive.clear()
        self._met.clear()


#: Meetings with what is not known at which it is worth to make it known.
DUE = frozenset(2 * 4**k for k in range(12))


def addresses(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return tuple(map(data_ptr, tensors))
