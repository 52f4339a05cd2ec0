"""Permutation tests of paired results, and Holm's correction for several of them.

If two methods did not differ, it would not matter which of a user's two results is called a and which b. The p-value is
the share of all such exchanges whose difference, of either sign, is at least as large as the observed one:

    exact        p = #{|T_π| ≥ |T|} / #π               every exchange, if there are few
    sampled      p = (1 + #{|T_π| ≥ |T|}) / (1 + R)     R random ones; the observed one counts, so p is never 0

Sources: E. Pitman, Significance tests which may be applied to samples from any populations, 1937; B. Phipson and G.
Smyth, Permutation P-values should never be zero, 2010; S. Holm, A simple sequentially rejective multiple test
procedure, 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics.scores import Floats, finite_numbers

#: Up to this many exchanges are all tried: those of 12 users.
EXACT = 4096
_BLOCK = 1 << 21


def sign_flip_p_value(
    from_sums: Callable[[Floats], Floats], a: Floats, b: Floats, resamples: int, rng: np.random.Generator
) -> float:
    """The p-value of f(Σ a) − f(Σ b), exchanging a user's rows in `a` and `b`.

    For a mean it is the test that flips the sign of each user's difference.

    Args:
        from_sums: f, the measure as a function of summed statistics.
        a, b: each user's statistics, [users, columns].
        resamples: exchanges to draw if there are more than `EXACT`.
        rng: draws them.
    """
    users = len(a)
    exact = 2**users <= EXACT
    total = 2**users if exact else resamples
    sum_a, sum_b, swap = a.sum(axis=0), b.sum(axis=0), b - a
    differences, block = [], max(1, _BLOCK // users)
    for start in range(0, total, block):
        rows = np.arange(start, min(start + block, total))
        bits = rows[:, None] >> np.arange(users) & 1 if exact else rng.integers(2, size=(len(rows), users))
        moved = bits.astype(np.float64) @ swap
        differences.append(from_sums(sum_a + moved) - from_sums(sum_b - moved))
    values = from_sums(np.stack([sum_a, sum_b]))
    return _p_value(float(values[0] - values[1]), np.concatenate(differences), float(np.abs(values).max()), exact)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, adjusted so that the chance of any false finding stays below the level.

        p̃₍ᵢ₎ = max_{j ≤ i} min(1, (m − j + 1) p₍ⱼ₎)      p₍₁₎ ≤ … ≤ p₍ₘ₎

    Args:
        p_values: the p-values of comparisons that are judged together.

    Returns:
        The adjusted values, in the order given.

    Raises:
        ArgumentError: one is not between 0 and 1.
    """
    if not len(p_values):
        return []
    given = finite_numbers("p_values", p_values)
    bad = np.flatnonzero((given < 0) | (given > 1))
    if len(bad):
        raise ArgumentError(f"p_values[{bad[0]}]: expected a number from 0 to 1, got {given[bad[0]]}")
    order = np.argsort(given, kind="stable")
    steps = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(each) for each in adjusted]


def _p_value(observed: float, exchanged: Floats, scale: float, exact: bool) -> float:
    sizes = np.abs(exchanged)
    # The same sums in another order differ by rounding, which must not decide a tie.
    count = int((sizes >= abs(observed) - 1e-12 * max(scale, float(sizes.max()))).sum())
    return count / len(sizes) if exact else (1 + count) / (1 + len(sizes))
