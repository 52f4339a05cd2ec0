"""Which examples a page shows, when it cannot show all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

LARGEST, MIDDLE, SMALLEST = "one of the largest effects", "an effect near the median", "one of the smallest effects"
ITEMS = "its single items, whose effects were measured"
MIX = "a third the largest, a third near the median, a third the smallest"


def choose(effects: Mapping[int, float], count: int, with_items: Collection[int] = ()) -> dict[int, str]:
    """A mix that does not flatter: a third with the largest effects, a third near the median, a third the smallest.

    A quarter of the places, and at least one, goes to the largest effects among examples whose items were measured,
    where there are any and the mix does not have as many already. The same effects give the same choice.

    Args:
        effects: of each example, by index.
        count: how many to choose, 0 or more.
        with_items: indices of the examples whose item effects were measured.

    Returns:
        The chosen indices and why each was chosen, from the largest effect to the smallest.
    """
    order = sorted(effects, key=lambda index: (-effects[index], index))
    measured = [index for index in order if index in with_items]
    wanted = min(len(measured), max(1, count // 4)) if count else 0
    chosen = _mix(order, count)
    kept = sum(index in with_items for index in chosen)
    if kept < wanted:
        reserved = measured[:wanted]
        rest = [index for index in order if index not in reserved]
        chosen = {**_mix(rest, count - wanted), **dict.fromkeys(reserved, ITEMS)}
    return {index: chosen[index] for index in order if index in chosen}


def _mix(order: list[int], count: int) -> dict[int, str]:
    count = min(count, len(order))
    top = -(-count // 3)
    bottom = count // 3
    middle = count - top - bottom
    between = order[top : len(order) - bottom]
    start = (len(between) - middle) // 2
    return {
        **dict.fromkeys(order[:top], LARGEST),
        **dict.fromkeys(between[start : start + middle], MIDDLE),
        **dict.fromkeys(order[len(order) - bottom :], SMALLEST),
    }
