"""Plain PyTorch twins of every fast path: the oracle of the tests. Imports no fast path."""

from nextquill.reference.linear import linear_pair_jsd, linear_pair_nll, linear_pair_stats, linear_token_nll
from nextquill.reference.losses import clip_weights, exp_clip_weights, pair_loss, threshold_weights

__all__ = [
    "clip_weights",
    "exp_clip_weights",
    "linear_pair_jsd",
    "linear_pair_nll",
    "linear_pair_stats",
    "linear_token_nll",
    "pair_loss",
    "threshold_weights",
]
