"""Tensors that were checked before, recognised by one look at all of them.

A call lasts a few microseconds, and each attribute of a tensor (dtype, device, size, stride,
address) costs 0.1 of one. torch has a function that compares all but the addresses of several
tensors at once, for the guards of compiled code; together with the addresses it tells whether the
check, the argument struct or the captured launch of an earlier call is right for this one. No
tensor is kept alive: a guard holds numbers, and an object or an address that was freed and is used
again passes only if everything that was checked is the same again.

Where torch has no such function every call is checked attribute by attribute.
"""

from __future__ import annotations

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

    None where there can be none: for the same object twice, or without torch's function.
    """
    if _TensorGuards is None:
        return None
    sizes = [[_ANY] * t.dim() if any_size else list(t.shape) for t in tensors]
    strides = [list(t.stride()) for t in tensors]
    try:
        check: Guard = _TensorGuards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        return check if check(*tensors) else None
    except (TypeError, RuntimeError, AttributeError):  # of another version of torch
        return None


Value = TypeVar("Value")


class KnownCalls(Generic[Value]):
    """What is kept for calls on known tensors, by the objects of a call and whatever else it is.

    An object's id is only a hint where to look. An entry is made when its key is met the second
    time: most callers either use the same tensors all the time or new ones all the time. When it is
    full it starts anew: a server makes few kinds of calls.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.entries: dict[Hashable, Value] = {}
        self.find = self.entries.get
        self._met: set[int] = set()

    def is_due(self, key: Hashable) -> bool:
        """Note a key without a valid entry; whether to make one now."""
        number = hash(key)
        if number in self._met:
            self._met.discard(number)
            return True
        if len(self._met) >= self.max_size:
            self._met.clear()
        self._met.add(number)
        return False

    def keep(self, key: Hashable, value: Value) -> None:
        if len(self.entries) >= self.max_size:
            self.entries.clear()
        self.entries[key] = value

    def clear(self) -> None:
        self.entries.clear()
        self._met.clear()


def addresses(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return tuple(map(data_ptr, tensors))
