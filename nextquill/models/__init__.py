"""A Hugging Face model as a loss sees it: its head, its attention over trees, its branches.

architectures.py   models that cannot share prefixes, and the reason
attention.py       attention over rows of trees
branch_passes.py   the forward passes of a batch
configs.py         the model inside an adapter, its config, and its limits in tokens
head.py            a loss inside the output head
loading.py         models, tokenizers and their prompts by name
probe.py           the scale or soft cap after a model's head
router.py          the load-balancing loss of mixtures of experts
self_check.py      a small tree compared with its branches in separate rows
stored_effects.py  token weights from effects that were measured before
tiny_models.py     models and tokenizers made from the training text
"""

from __future__ import annotations

from nextquill.tree import TREE_KERNELS

#: Kernels for rows of trees, see `attention`.
ATTENTIONS = ("auto", *TREE_KERNELS, "mask", "padded")
