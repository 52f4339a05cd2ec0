"""The chosen examples are varied, and always the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nextquill.report.examples import ITEMS, LARGEST, MIDDLE, SMALLEST, choose

EFFECTS = {index: float(index) for index in range(100)}


def test_thirds_of_the_largest_the_middle_and_the_smallest() -> None:
    chosen = choose(EFFECTS, 9)
    assert list(chosen) == [99, 98, 97, 51, 50, 49, 2, 1, 0]
    assert list(chosen.values()) == [LARGEST] * 3 + [MIDDLE] * 3 + [SMALLEST] * 3


def test_a_quarter_is_kept_for_measured_items() -> None:
    chosen = choose(EFFECTS, 8, with_items=range(30, 40))
    assert [index for index, why in chosen.items() if why == ITEMS] == [39, 38]
    assert len(chosen) == 8


def test_no_place_is_kept_where_the_mix_has_them() -> None:
    assert ITEMS not in choose(EFFECTS, 8, with_items=[99, 98, 0]).values()


@given(
    st.dictionaries(st.integers(0, 60), st.floats(-5, 5), max_size=40),
    st.integers(0, 50),
    st.sets(st.integers(0, 60), max_size=10),
)
def test_any_choice_is_of_the_asked_size_ordered_and_repeatable(
    effects: dict[int, float], count: int, with_items: set[int]
) -> None:
    chosen = choose(effects, count, with_items)
    assert len(chosen) == min(count, len(effects))
    values = [effects[index] for index in chosen]
    assert values == sorted(values, reverse=True)
    assert list(choose(dict(reversed(effects.items())), count, with_items)) == list(chosen)
    if count and with_items & effects.keys():
        assert set(chosen) & with_items, "an example with measured items is shown where there is one"
