"""Measures which item of a history a response depends on: the effect of leaving each item out on every token.

    effect[item, token] = nll(token | history without the item) - nll(token | whole history)        (nats)

It is the difference that one item makes while the others stay. Two items that say the same have small effects each,
although leaving out both would have a large one, so the effects of items do not add up to the effect of the history.
All n + 1 prompts share the part before the item that is left out, and run in one forward if they fit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from nextquill.data import Branch, EncodedExample, HistoryItem, PromptRenderer, Record
from nextquill.errors import ArgumentError
from nextquill.evaluation.results import ItemEffects
from nextquill.evaluation.scoring import BranchScorer, rounded, token_texts


def leave_one_out(scorer: BranchScorer, renderer: PromptRenderer, record: Record, example: EncodedExample) -> Tensor:
    """The effect of each history item of a prompt on each token of the response.

    Args:
        scorer: the model's scorer.
        renderer: the renderer that made the example's prompts.
        record: the example's record.
        example: the encoded record; its factual prompt holds the newest `history_kept` items.

    Returns:
        [items, tokens], in nats, oldest item first; float32, or the model's own float64.

    Raises:
        ArgumentError: the example's prompt holds no history, or is not the record's.
        BudgetError: a prompt with its response takes more than the scorer's `max_tokens`.
    """
    items, response = kept_items(record, example), example.factual.response_ids
    if not items:
        raise ArgumentError(f"example: expected one with history in its prompt, got none in example {example.index}")
    if renderer.prompt_ids(record.query, items) != example.factual.prompt_ids:
        raise ArgumentError(f"example: expected the prompt of record {example.index} by this renderer, got another")
    without = [
        Branch(renderer.prompt_ids(record.query, items[:left] + items[left + 1 :]), response)
        for left in range(len(items))
    ]
    nll_all, *nll_without = scorer([example.factual, *without])
    return torch.stack(nll_without) - nll_all


def kept_items(record: Record, example: EncodedExample) -> tuple[HistoryItem, ...]:
    """The history items that an example's factual prompt holds, oldest first."""
    return record.history[len(record.history) - example.history_kept :]


def item_effects(
    scorer: BranchScorer, renderer: PromptRenderer, tokenizer: Any, record: Record, example: EncodedExample
) -> ItemEffects:
    """`leave_one_out` as a line of an evaluation's folder, rounded to six decimals; arguments as there."""
    return ItemEffects(
        index=example.index,
        items=[dataclasses.asdict(item) for item in kept_items(record, example)],
        effects=[rounded(row) for row in leave_one_out(scorer, renderer, record, example)],
        tokens=token_texts(tokenizer, example.factual.response_ids),
    )
