"""Glue between the losses and training loops: the loss inside a model's head, and the Hugging Face Trainer."""

from __future__ import annotations

from nextquill.tree import TREE_KERNELS

#: How rows of trees are attended, see `attention`.
ATTENTIONS = ("auto", *TREE_KERNELS, "mask", "padded")
