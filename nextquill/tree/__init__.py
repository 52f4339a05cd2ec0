"""Prefix trees: branches that begin alike computed once, their masks, and attention over them."""

from nextquill.tree.attention import tree_attention
from nextquill.tree.masks import additive_mask, visibility_mask
from nextquill.tree.prefix_tree import PrefixTree, build_prefix_tree
from nextquill.tree.segments import TreeLayout

__all__ = [
    "PrefixTree",
    "TreeLayout",
    "additive_mask",
    "build_prefix_tree",
    "tree_attention",
    "visibility_mask",
]
