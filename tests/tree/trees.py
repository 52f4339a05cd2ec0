"""Trees for tests, with naive references: sets of prefixes, and dense float64 attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nextquill.tree import PrefixTree, TreeLayout, build_prefix_tree, visibility_mask
from nextquill.tree.varlen import varlen_tree_attention

#: Every shape at once: a chain, forks at several depths, a branch that ends inside another, roots of one token.
SMALL = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8], [1, 2, 3, 4, 5, 9, 9, 9], [1, 2, 3, 4], [8, 8], [8], [0]]


def prefixes(branches) -> list[tuple[int, ...]]:
    """All distinct prefixes. Their lexicographic order is depth-first, with siblings sorted by token."""
    return sorted({tuple(branch[: n + 1]) for branch in branches for n in range(len(branch))})


def visible_naively(rows: list[tuple[int, ...]], window: int | None = None) -> Tensor:
    """bool [T, T]: True if row j's prefix begins row i's, and at most `window` - 1 tokens follow it there."""
    window = window or len(rows)
    return torch.tensor([[i[: len(j)] == j and len(i) - len(j) < window for j in rows] for i in rows])


def grown_tree(rows: int, seed: int = 0, spread: int = 40) -> PrefixTree:
    """About `rows` rows in segments of up to `spread` rows."""
    rng = torch.Generator().manual_seed(seed)
    branches: list[list[int]] = [[]]
    total = 0
    while total < rows:
        old = branches[int(torch.randint(len(branches), (), generator=rng))]
        kept = int(torch.randint(len(old) + 1, (), generator=rng))
        new = torch.randint(1000, (1 + int(torch.randint(spread, (), generator=rng)),), generator=rng).tolist()
        branches.append(old[:kept] + new)
        total += len(new)
    return build_prefix_tree(branches[1:])


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with all scores written out, in the dtype of its inputs; `sinks` [H] are scores of zeros."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is None:
        return scores.softmax(-1) @ value
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


# ---- results to compare -------------------------------------------------------------------------------

NAMES = "output", "query", "key", "value"
OPTIONS = [{}, {"window": 1}, {"window": 3}, {"scale": 0.7}, {"softcap": 1.5}, {"window": 5, "softcap": 2.0}]
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)


def inputs(rows, heads=4, kv_heads=2, size=8, dtype=torch.float32):
    return [torch.randn(1, h, rows, size, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads)]


def run(function, tensors, grad, needs=(True, True, True)):
    """The output, and the gradients of the inputs that need one."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad)]


def varlen_results(tree, tensors, grad, needs=(True, True, True), kernel="emulated", **options):
    layout = TreeLayout.of_tree(tree)
    return run(lambda *qkv: varlen_tree_attention(*qkv, layout, kernel=kernel, **options), tensors, grad, needs)


def dense_results(tree, tensors, grad, *, window=None, **options):
    """The true results, in float64."""
    visible = visibility_mask(tree.position_ids, tree.subtree_end, window).to(tensors[0].device)
    exact = [tensor.double() for tensor in tensors]
    return run(lambda *qkv: dense_attention(*qkv, visible, **options), exact, grad.double())
