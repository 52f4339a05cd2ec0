"""Selects the past texts of a user that a prompt shows.

    selector = make_selector("bm25", num_items=8)
    records = [selector.select(record) for record in records]

    all        every item
    recency    the newest items
    bm25       the items that share words with the query
    dense      the items with a similar meaning
    fixed      the same items for all records of a user, which then share one prefix (`order="history_first"`)
    random     random items, as a baseline for the others

A selected history is in the order of time and holds no item dated after its record.
"""

from __future__ import annotations

from collections.abc import Callable

from nextquill.data._checks import check_integer, check_one_of
from nextquill.data.histories.base import RandomSelector, RecencySelector, Selector, TokenBudget
from nextquill.data.histories.bm25 import BM25Selector
from nextquill.data.histories.dense import DenseSelector, TextEncoder
from nextquill.data.histories.fixed import FixedSelector
from nextquill.errors import ArgumentError

SELECTORS = ("all", "recency", "bm25", "dense", "fixed", "random")

__all__ = ["SELECTORS", "FixedSelector", "Selector", "make_selector"]


def make_selector(
    name: str,
    *,
    num_items: int | None,
    max_tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    seed: int = 0,
    encoder: TextEncoder | str | None = None,
) -> Selector:
    """Return a selector by its name.

    Args:
        name: "all", "recency", "bm25", "dense", "fixed" or "random".
        num_items: the most items of a selected history; None with "all", and if `max_tokens` is the only limit.
        max_tokens: the most tokens of a selected history. Items are counted one by one and dropped whole. "all",
            "recency" and "fixed" keep the newest run of items that fits; the others skip an item that is too long and
            try the next in rank.
        count_tokens: returns the number of tokens of a text; needed with `max_tokens`.
        seed: for "random". A record gets the same items whatever its position.
        encoder: for "dense": the name or folder of a sentence-transformers model, or a function that takes a list of n
            texts and returns an array [n, size]. None takes all-MiniLM-L6-v2.

    Raises:
        ArgumentError: an unknown name, or arguments that do not fit the name or each other.
        ArgumentTypeError: a number that is not an integer.
        BackendUnavailableError: "bm25" without bm25s, or "dense" without sentence-transformers.
    """
    check_one_of("name", name, SELECTORS)
    for argument, value in (("num_items", num_items), ("max_tokens", max_tokens)):
        check_integer(argument, value, least=1, or_none=True)
    if max_tokens is not None and count_tokens is None:
        raise ArgumentError("count_tokens: expected a function that counts a text's tokens with max_tokens, got None")
    if name == "all" and num_items is not None:
        raise ArgumentError(f"num_items: expected None with 'all', got {num_items}; 'recency' takes the newest")
    if name != "all" and num_items is None and max_tokens is None:
        raise ArgumentError(f"num_items: expected a number of items with {name!r}, or max_tokens, got neither")
    if name != "dense" and encoder is not None:
        raise ArgumentError(f"encoder: expected none with {name!r}, only 'dense' has one")
    budget = None if max_tokens is None or count_tokens is None else TokenBudget(max_tokens, count_tokens)
    if name == "dense":
        return DenseSelector(num_items, budget, encoder)
    if name == "random":
        return RandomSelector(num_items, budget, seed)
    if name == "bm25":
        return BM25Selector(num_items, budget)
    return (FixedSelector if name == "fixed" else RecencySelector)(num_items, budget)
