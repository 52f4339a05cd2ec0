"""A record as token ids, and the counts of a list of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextquill.data.tokenizing import Ids


class Branch:
    """One prompt and the response to it, as token ids.

    An id takes four bytes here, and forty in a list; `prompt_ids` and `response_ids` make new lists.

    Args:
        prompt_ids: everything before the response, [n] with n > 0: its last position predicts the first response token.
        response_ids: the response and its end tokens, [m], all supervised.

    Both can be lists, arrays of type "i" or int32 tensors. Arrays and tensors are kept without a copy.
    """

    __slots__ = ("_prompt", "_response")

    def __init__(self, prompt_ids: Ids | Tensor | Sequence[int], response_ids: Ids | Tensor | Sequence[int]) -> None:
        self._prompt, self._response = _compact(prompt_ids), _compact(response_ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt."""
        return self._prompt.tolist()

    @property
    def response_ids(self) -> list[int]:
        """The response and its end tokens."""
        return self._response.tolist()

    @property
    def input_ids(self) -> list[int]:
        """The prompt and the response, in one list."""
        return self.prompt_ids + self.response_ids

    @property
    def prompt_length(self) -> int:
        """The number of tokens of the prompt."""
        return len(self._prompt)

    @property
    def response_length(self) -> int:
        """The number of tokens of the response."""
        return len(self._response)

    def input_tensor(self) -> Tensor:
        """The prompt and the response, int64 [prompt_length + response_length]."""
        return torch.cat((_tensor(self._prompt), _tensor(self._response))).long()

    def response_tensor(self) -> Tensor:
        """The response, int64 [response_length]."""
        return _tensor(self._response).long()

    def to_arrays(self) -> tuple[Ids, Ids]:
        """Prompt and response, four bytes a token."""
        return _array(self._prompt), _array(self._response)

    def __eq__(self, other: object) -> bool:
        return self.to_arrays() == other.to_arrays() if isinstance(other, Branch) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Branch(prompt_ids={self.prompt_ids}, response_ids={self.response_ids})"

    def __reduce__(self) -> tuple[type[Branch], tuple[Ids, Ids]]:
        return Branch, self.to_arrays()  # a tensor would be pickled with the whole file that it is mapped from


def _compact(ids: Ids | Tensor | Sequence[int]) -> Ids | Tensor:
    return ids if isinstance(ids, (array, Tensor)) else array("i", ids)


def _tensor(ids: Ids | Tensor) -> Tensor:
    if isinstance(ids, Tensor):
        return ids
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)


def _array(ids: Ids | Tensor) -> Ids:
    return ids if isinstance(ids, array) else array("i", ids.tolist())


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One record as token ids.

    Args:
        user_id: the record's user.
        index: the record's position among the records it was encoded with.
        factual, counterfactual: the branches with and without the user's history; equal if no item was kept.
        placebo: the branch with another user's history, or None.
        history_kept: the number of the user's own history items in the factual branch.
        history_total: the number of items in the record's history.
        effects: float32 [2, n], nll_factual and nll_counterfactual of the response in nats, measured by some model, or
            None; see `load_effects`.
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
    """Counts of what encoding kept and dropped.

    Args:
        examples: examples.
        history_items: history items of all records.
        history_items_dropped: history items that did not fit the budget.
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
        """The counts over `examples`."""
        return cls(
            examples=len(examples),
            history_items=sum(example.history_total for example in examples),
            history_items_dropped=sum(example.history_total - example.history_kept for example in examples),
            examples_truncated=sum(example.history_kept < example.history_total for example in examples),
            examples_without_history=sum(example.history_kept == 0 for example in examples),
            prompt_tokens=sum(example.factual.prompt_length for example in examples),
            response_tokens=sum(example.factual.response_length for example in examples),
        )
