"""Trees to test with, and what they mean, written out naively: sets of prefixes, and dense float64 attention."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from nextquill.tree import PrefixTree, build_prefix_tree

#: Every shape at once: a chain, forks at several depths, a branch that ends inside another, roots of one token.
SMALL = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8], [1, 2, 3, 4, 5, 9, 9, 9], [1, 2, 3, 4], [8, 8], [8], [0]]


@st.composite
def branch_lists(draw, most=7):
    """Branches over few tokens, which fork often, each token repeated so that runs without a fork have any length."""
    token = st.integers(0, 2)
    found = draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=most))
    repeat = draw(st.integers(1, 3))
    branches = [[t for t in branch for _ in range(repeat)] for branch in found]
    inside = [b[: draw(st.integers(1, len(b)))] for b in draw(st.lists(st.sampled_from(branches), max_size=2))]
    return branches + inside


def prefixes(branches) -> list[tuple[int, ...]]:
    """Every distinct prefix. In lexicographic order they are depth-first, siblings by their tokens."""
    return sorted({tuple(branch[: n + 1]) for branch in branches for n in range(len(branch))})


def visible_naively(rows: list[tuple[int, ...]], window: int | None = None) -> Tensor:
    """bool [T, T]: row j's prefix begins row i's, and at most `window` - 1 tokens follow it there."""
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
) -> Tensor:
    """Softmax attention with all scores written out, in the dtype of its inputs."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ value
