"""A record as token ids, and what a list of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """One prompt and the response to it, as token ids.

    Args:
        prompt_ids: everything before the response; never empty, as its last position predicts the first response token.
        response_ids: the response and what ends it; all supervised.
    """

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def input_ids(self) -> list[int]:
        """The prompt and the response, in one list."""
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One record as token ids.

    Args:
        user_id: whose record it is.
        index: the record's position among the records it was encoded with.
        factual, counterfactual: the branches with and without the user's history; equal if no item was kept.
        placebo: the branch with another user's history, or None.
        history_kept: how many of the user's own history items are in the factual branch.
        history_total: how many the record has.
        effects: float32 [2, n], nll_factual and nll_counterfactual of the response as some model has measured them, in
            nats, or None; see `load_effects`.
    """

    user_id: str
    index: int
    factual: Branch
    counterfactual: Branch
    placebo: Branch | None
    history_kept: int
    history_total: int
    effects: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class EncodingStats:
    """What encoding kept and dropped.

    Args:
        examples: number of examples.
        history_items: history items of all records.
        history_items_dropped: those that did not fit the budget.
        examples_truncated: examples that lost at least one item.
        examples_without_history: examples with no item left, whose factual and counterfactual branches are equal.
        prompt_tokens: tokens of all factual prompts.
        response_tokens: supervised tokens of all examples, counted once per example.
    """

    examples: int
    history_items: int
    history_items_dropped: int
    examples_truncated: int
    examples_without_history: int
    prompt_tokens: int
    response_tokens: int

    @classmethod
    def from_examples(cls, examples: Sequence[EncodedExample]) -> EncodingStats:
        """Count over `examples`."""
        return cls(
            examples=len(examples),
            history_items=sum(example.history_total for example in examples),
            history_items_dropped=sum(example.history_total - example.history_kept for example in examples),
            examples_truncated=sum(example.history_kept < example.history_total for example in examples),
            examples_without_history=sum(example.history_kept == 0 for example in examples),
            prompt_tokens=sum(len(example.factual.prompt_ids) for example in examples),
            response_tokens=sum(len(example.factual.response_ids) for example in examples),
        )
