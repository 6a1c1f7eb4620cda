"""PyTorch's counter of operations, completed by what it leaves out: attention on the CPU.

In: whatever is run while the counter is entered, or shapes. Out: floating-point operations; a multiplication and an
addition count as two. Deliberately elsewhere: what is counted (`loopaware.observe.cost`, `loopaware.lm.operations`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counter() -> FlopCounterMode:
    """A counter to enter.

    >>> with counter() as seen:
    ...     _ = torch.ones(1, 2) @ torch.ones(2, 3)
    >>> seen.get_total_flops()
    12
    """
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _kernel}
    return FlopCounterMode(display=False, custom_mapping=attention)


def attended(query: Any, key: Any, value: Any) -> int:
    """Operations of attention: q k^T and p v.

    Shapes: query (B, H, Tq, d), key (B, H', Tk, d), value (B, H', Tk, e).
    """
    batch, heads, queries, features = query
    return 2 * batch * heads * queries * key[-2] * (features + value[-1])


def _kernel(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of a call, as PyTorch's counter asks for it."""
    return attended(query, key, value)
