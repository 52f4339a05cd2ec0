"""Records as token ids, one by one and as a data set that a data loader can read."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextquill.data.tokenizing import Ids
from nextquill.storage.fingerprints import fast_digest


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


class Anchor(NamedTuple):
    """A branch with a response of its own, of which some tokens are supervised.

    Args:
        branch: prompt and response.
        labels: the response's tokens that count, four bytes each, and a negative number for every other token.
    """

    branch: Branch
    labels: Ids


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
        anchor: the branch of MIRROR-F's second term, or None.
    """

    user_id: str
    index: int
    factual: Branch
    counterfactual: Branch
    placebo: Branch | None
    history_kept: int
    history_total: int
    effects: Tensor | None = field(default=None, compare=False)
    anchor: Anchor | None = None

    def branch(self, name: str) -> Branch | None:
        """The branch of that name, if there is one; "anchor" is one too."""
        found: Branch | Anchor | None = getattr(self, name)
        return found.branch if isinstance(found, Anchor) else found


@dataclass(frozen=True, slots=True)
class EncodingStats:
    """Counts of what encoding kept and dropped.

    Args:
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
        rows = [(e.history_kept, e.history_total, e.factual.prompt_length, e.factual.response_length) for e in examples]
        return encoding_stats(torch.tensor(rows, dtype=torch.long).view(-1, 4))


def encoding_stats(counts: Tensor) -> EncodingStats:
    """The sums of examples' counts, int64 [examples, 4]: items kept, all items, prompt tokens, response tokens."""
    kept, total, prompt, response = counts.unbind(1)
    return EncodingStats(
        examples=len(counts),
        history_items=int(total.sum()),
        history_items_dropped=int((total - kept).sum()),
        examples_truncated=int((kept < total).sum()),
        examples_without_history=int((kept == 0).sum()),
        prompt_tokens=int(prompt.sum()),
        response_tokens=int(response.sum()),
    )


def examples_digest(users: Sequence[str], lengths: Tensor, ids: Iterable[Any]) -> str:
    """See `EncodedDataset.digest`.

    Args:
        users: of each example.
        lengths: int64 [examples, 3], the tokens of both prompts and of the response.
        ids: int32 buffers; one after another, they hold each example's prompts and response.
    """
    return fast_digest(chain((json.dumps(users).encode(), lengths.contiguous().numpy()), ids))


class EncodedDataset(Dataset[EncodedExample]):
    """Encoded examples as a map-style data set, in their order."""

    def __init__(self, examples: Iterable[EncodedExample]) -> None:
        self.examples: Sequence[EncodedExample] = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> EncodedExample:
        return self.examples[index]

    @property
    def has_placebo(self) -> bool:
        """Whether every example has a placebo branch."""
        return bool(self.examples) and all(example.placebo is not None for example in self.examples)

    @property
    def user_ids(self) -> list[str]:
        """The user of each example."""
        return [example.user_id for example in self.examples]

    @property
    def digest(self) -> str:
        """A digest of the examples in their order: users and token ids, without the placebo branches."""
        found = [(e.factual, e.counterfactual) for e in self.examples]
        lengths = [(one.prompt_length, other.prompt_length, one.response_length) for one, other in found]
        arrays = ((one.to_arrays()[0], other.to_arrays()[0], one.to_arrays()[1]) for one, other in found)
        return examples_digest(self.user_ids, torch.tensor(lengths), (ids for each in arrays for ids in each))

    @property
    def stats(self) -> EncodingStats:
        """Counts of what encoding kept and dropped."""
        return EncodingStats.from_examples(self.examples)

    def num_branch_tokens(self, names: Sequence[str]) -> list[int]:
        """The tokens of each example's branches with these names, counted separately; 0 for a missing branch."""
        branches = ([example.branch(name) for name in names] for example in self.examples)
        return [sum(b.prompt_length + b.response_length for b in found if b is not None) for found in branches]
