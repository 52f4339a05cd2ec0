"""Prefix trees: compute the shared beginning of branches once. Trees, masks, and attention over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill.tree.attention import tree_attention
    from nextquill.tree.dispatch import attend
    from nextquill.tree.masks import additive_mask, visibility_mask
    from nextquill.tree.packing import pack_branches, split_by_gradient
    from nextquill.tree.prefix_tree import PrefixTree, build_prefix_tree
    from nextquill.tree.segments import TreeLayout
else:
    __getattr__, __dir__ = on_first_use(
        __name__, ("prefix_tree", "packing", "masks", "segments", "attention", "dispatch")
    )

#: Kernels that `attend` can be told to use, see `dispatch`.
TREE_KERNELS = ("pieces", "varlen", "flex")

__all__ = [
    "TREE_KERNELS",
    "PrefixTree",
    "TreeLayout",
    "additive_mask",
    "attend",
    "build_prefix_tree",
    "pack_branches",
    "split_by_gradient",
    "tree_attention",
    "visibility_mask",
]
