"""A Hugging Face model as a loss sees it: its head, its attention over trees, its branches.

architectures.py   which models can share prefixes, and why others are refused
attention.py       how a model attends over rows of trees
branch_passes.py   the forward passes of a batch
head.py            a loss inside the output head
limits.py          how many tokens a model knows, and how long it reads
loading.py         models, tokenizers and their prompts by name
probe.py           what an architecture does to its logits after its head
router.py          the load-balancing loss of mixtures of experts
self_check.py      a small tree against its branches one by one
stored_effects.py  token weights from effects that were measured before
tiny_models.py     models and tokenizers made from the training text
"""

from __future__ import annotations

from nextquill.tree import TREE_KERNELS

#: How rows of trees are attended, see `attention`.
ATTENTIONS = ("auto", *TREE_KERNELS, "mask", "padded")
