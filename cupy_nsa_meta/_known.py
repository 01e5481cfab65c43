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
from operator import itemgetter
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
        for tensor in tensors:  # two thirds of the time of any(map())
            if tensor.is_nested:
                return False
        return guard(*tensors)
    except Exception:  # no tensor; the check says what
        return False


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


#: Of a call's tensors those that are not None, each once.
_Pick = Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]]


class _Known(Generic[Value]):
    """What is kept for one call, and by what calls are told to be like it."""

    __slots__ = ("addresses", "guard", "pick", "value")

    def __init__(
        self,
        pick: _Pick,
        guard: Guard,
        addresses: tuple[int, ...],
        value: Value,
    ) -> None:
        self.pick = pick
        self.guard = guard
        self.addresses = addresses
        self.value = value


#: The types of all tensors, and where two are the very same object, at which place each is first;
#: the size of the first; addresses.
Memory = tuple[tuple[Any, ...], int, tuple[int, ...]]


class KnownCalls(Generic[Value]):
    """What is kept for calls on memory that was met before. Keeps no tensor alive.

    ``tensors`` are those of a call, None where one is not given. A call is found by the very
    objects of an earlier one, or else by their memory: servers cut ``seq_lens[:bs]`` anew at every
    step. What is kept by objects ends with the first of them, so an id that is found is that of the
    very object. Sizes and so on are for the guard to compare.

    Anything is kept when it is met the second time, then the eighth and so on: what comes once does
    not come back, and calls with equal addresses that differ otherwise would replace each other (of
    two such calls one is checked every time). A full collection starts anew: a server makes few
    kinds of calls.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._of_objects: dict[tuple[int, ...], _Known[Value]] = {}  # by ids
        self._alive: dict[tuple[int, ...], list[weakref.ref[torch.Tensor]]] = {}
        #: Everything that is kept; its size is for whoever bounds the values.
        self.of_memory: dict[Memory, _Known[Value]] = {}
        self._picks: dict[tuple[Any, ...], _Pick] = {}  # by the first part of a Memory
        self._met: dict[int, int] = {}

    def find(self, tensors: tuple[Any, ...]) -> tuple[Value | None, Memory | None]:
        """What is kept for a call; its memory where its objects do not tell."""
        ids = (*map(id, tensors),)
        known = self._of_objects.get(ids)
        if known is not None:
            present = known.pick(tensors)
            if known.guard(*present) and known.addresses == (*map(data_ptr, present),):
                return known.value, None
        return self._by_memory(ids, tensors)

    def _by_memory(
        self, ids: tuple[int, ...], tensors: tuple[Any, ...]
    ) -> tuple[Value | None, Memory | None]:
        try:
            pattern: tuple[Any, ...] = (*map(type, tensors),)
            num_none = ids.count(_ID_OF_NONE)
            if len({*ids}) != len(ids) - (num_none - 1 if num_none else 0):  # two are one object
                pattern += tuple(ids.index(number) for number in ids)
            present = (self._picks.get(pattern) or self._pick(pattern, ids))(tensors)
            memory = pattern, tensors[0].numel(), (*map(data_ptr, present),)
        except Exception:  # what DLPack shares, and what is no tensor: the check says what
            return None, None
        known = self.of_memory.get(memory)
        if known is None or not is_like(known.guard, present):
            return None, memory
        if self.is_due(ids):
            self._keep_objects(ids, known, present)
        return known.value, memory

    def is_due(self, key: Hashable) -> bool:
        """Count a meeting with a memory, or with objects, for which nothing is kept; whether to."""
        number = hash(key)
        times = self._met.pop(number, 0) + 1
        if len(self._met) >= self.max_size:
            self._met.clear()
        self._met[number] = times
        return times in DUE

    def keep(self, memory: Memory, tensors: tuple[Any, ...], value: Value) -> None:
        """For calls like this one, where there can be a guard."""
        pattern, _, addresses = memory
        ids = (*map(id, tensors),)
        pick = self._picks.get(pattern) or self._pick(pattern, ids)
        present = pick(tensors)
        is_alike = guard(present)
        if is_alike is None:
            return
        if len(self.of_memory) >= self.max_size:
            self.clear()
        self.of_memory[memory] = known = _Known(pick, is_alike, addresses, value)
        self._keep_objects(ids, known, present)

    def clear(self) -> None:
        for kept in (self._of_objects, self._alive, self.of_memory, self._picks, self._met):
            kept.clear()

    def _pick(self, pattern: tuple[Any, ...], ids: tuple[int, ...]) -> _Pick:
        first = dict(zip(reversed(ids), reversed(range(len(ids))), strict=True))
        first.pop(_ID_OF_NONE, None)
        places = sorted(first.values())
        if len(places) == 1:  # would be picked without a tuple around it; twice there is no guard
            places *= 2
        if len(self._picks) >= self.max_size:
            self.clear()
        # ``tuple`` of a tuple is that tuple, in a third of the time.
        pick: _Pick = tuple if len(places) == len(ids) else itemgetter(*places)
        self._picks[pattern] = pick
        return pick

    def _keep_objects(
        self, ids: tuple[int, ...], known: _Known[Value], present: Sequence[torch.Tensor]
    ) -> None:
        if len(self._of_objects) >= self.max_size:
            self.clear()
        of_objects, alive = self._of_objects, self._alive

        def forget(_: weakref.ref[torch.Tensor]) -> None:
            of_objects.pop(ids, None)
            alive.pop(ids, None)

        # In this order: ``clear`` in between, by another thread, may leave weak references behind,
        # and no entry without them.
        of_objects[ids] = known
        alive[ids] = [weakref.ref(tensor, forget) for tensor in present]


_ID_OF_NONE = id(None)

#: Meetings with what is not known at which it is worth to make it known.
DUE = frozenset(2 * 4**k for k in range(12))
