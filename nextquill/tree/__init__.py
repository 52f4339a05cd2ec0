"""Prefix trees: branches that begin alike computed once, their masks, and attention over them."""

from nextquill.tree.attention import tree_attention
from nextquill.tree.dispatch import TREE_KERNELS, attend
from nextquill.tree.masks import additive_mask, visibility_mask
from nextquill.tree.packing import pack_branches, split_by_gradient
from nextquill.tree.prefix_tree import PrefixTree, build_prefix_tree
from nextquill.tree.segments import TreeLayout

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
