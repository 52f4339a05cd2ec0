"""Which kernel attends over a row of trees."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nextquill.tree.attention import tree_attention
from nextquill.tree.segments import TreeLayout

TREE_KERNELS = ("pieces", "varlen", "flex")


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, kernel: str = "auto", **options: Any
) -> Tensor:
    return tree_attention(query, key, value, layout, **options)
