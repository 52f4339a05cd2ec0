"""Hypothesis strategies for branches."""

from hypothesis import strategies as st


@st.composite
def branch_lists(draw, most=7):
    """Branches over few tokens, which fork often. Tokens repeat, so that stretches without a fork have any length."""
    token = st.integers(0, 2)
    found = draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=most))
    repeat = draw(st.integers(1, 3))
    branches = [[t for t in branch for _ in range(repeat)] for branch in found]
    inside = [b[: draw(st.integers(1, len(b)))] for b in draw(st.lists(st.sampled_from(branches), max_size=2))]
    return branches + inside
