"""A Hugging Face model as a loss sees it: its head, its attention over trees, its branches.

architectures.py   models that cannot share prefixes, and the reason
attention.py       attention over rows of trees
recurrent.py       layers with a state, over rows of trees
border.py          the border to packages that read folders of models
branch_passes.py   the forward passes of a batch
cache_names.py     the name of a cache in a model and its outputs
configs.py         the model inside an adapter, its config, and its limits in tokens
head.py            a loss inside the output head
loading.py         models, tokenizers and their prompts by name
pretrained.py      `from_pretrained`, so that code in a folder never runs
gguf.py            GGUF files as models of transformers
probe.py           the scale or soft cap after a model's head
router.py          the load-balancing loss of mixtures of experts
self_check.py      a small tree compared with its branches in separate rows
sharded.py         forwards without gradient, where FSDP2 divides the weights
stored_effects.py  token weights from effects that were measured before
tiny_models.py     models and tokenizers made from the training text
"""

from __future__ import annotations

from nextquill.tree import TREE_KERNELS

#: Kernels for rows of trees, see `attention`.
ATTENTIONS = ("auto", *TREE_KERNELS, "mask", "padded")
