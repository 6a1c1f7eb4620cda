"""How many bytes of tensors a computation holds at once, counted and not sampled.

In: a function. Out: what it returned, and its peak. On CUDA PyTorch's allocator is asked. On the CPU every storage that
an operation makes is followed until it is freed, backward passes included, so that the number is the same on every
machine; scratch space inside kernels is not seen. Deliberately elsewhere: bytes that are moved (`observe.cost`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(NamedTuple):
    """What a function returned, and the most bytes it held at once beyond those that were there before."""

    value: Any
    bytes: int


def peak(function: Callable[[], Any], device: torch.device | None = None) -> Peak:
    """Run `function` and weigh what it holds at its fullest moment.

    Args:
        device: a CUDA device to ask; None counts storages on the CPU.

    >>> peak(lambda: (torch.zeros(1000) + 1).sum()).bytes  # zeros, and what one was added to
    8000
    """
    if device is not None and device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        value = function()
        return Peak(value, torch.cuda.max_memory_allocated(device) - before)
    with Meter() as meter:
        value = function()
    return Peak(value, meter.most)


class Meter(TorchDispatchMode):
    """Follows the storages that operations make."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)}
        result = operation(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage not in self.known:
                    self.follow(storage)
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size
