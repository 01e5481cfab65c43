"""Where the tensors of a call lie: each flush with its allocation, or all of them in one block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

ALIGNMENT = 16  # of a vector access; every tensor keeps its distance from such a boundary
GAP = 64  # poisoned bytes between two allocations of a block
POISON_BYTE = 0x55


def extent(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor from its first to its last element, gaps of its strides included."""
    elements = 0
    if tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * step for size, step in steps)
    return tensor.as_strided((elements,), (1,))


def tensors_of(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in arguments.values() if isinstance(value, torch.Tensor)]


def place_exactly(tensor: torch.Tensor, device: str, copies: bool = True) -> torch.Tensor:
    """A twin in an allocation that ends where the tensor ends.

    Without torch's memory cache an allocation is one cudaMalloc of exactly its bytes. ``copies``:
    with the contents, by a copy and not by a kernel, so that a checker of kernels knows of it.
    """
    lead = tensor.data_ptr() % ALIGNMENT // tensor.element_size()
    words = extent(tensor)
    memory = torch.empty(lead + len(words), dtype=tensor.dtype, device=device)
    if copies:
        memory[lead:].copy_(words)
    return memory.as_strided(tensor.shape, tensor.stride(), lead)


class Block:
    """All allocations of a call's CPU tensors in one, with poison between them.

    One copy takes it to the device, one back, and one comparison sees every byte.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._storages: dict[int, tuple[int, torch.Tensor]] = {}  # address -> offset, its bytes
        size = GAP
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in self._storages:
                continue
            data = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            self._storages[storage.data_ptr()] = (size, data)
            size += -(-len(data) // ALIGNMENT) * ALIGNMENT + GAP
        self.size = size

    def contents(self) -> torch.Tensor:
        """uint8 [size] on the CPU: what the tensors hold now."""
        block = torch.full((self.size,), POISON_BYTE, dtype=torch.uint8)
        for offset, data in self._storages.values():
            block[offset : offset + len(data)] = data
        return block

    def view(self, block: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The place of one of the tensors in ``block``, a copy of ``contents()`` anywhere."""
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=block.device
            )
        offset = self._storages[storage.data_ptr()][0] // tensor.element_size()
        return block.view(tensor.dtype).as_strided(
            tensor.shape, tensor.stride(), offset + tensor.storage_offset()
        )

    def arguments(self, block: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """``arguments`` with every tensor replaced by its place; one tensor has one place."""
        views: dict[int, torch.Tensor] = {}
        moved = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                value = views.setdefault(id(value), self.view(block, value))
            moved[name] = value
        return moved
