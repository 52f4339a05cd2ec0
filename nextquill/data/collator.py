"""From encoded examples to padded tensors, one set per branch.

Labels are aligned with hidden states: `labels[b, t]` is the token that position t predicts, which is
`input_ids[b, t + 1]` where that is a response token, and -100 elsewhere. No loss has to shift them. Read in row-major
order, the supervised labels of every branch are the same sequence, so the rows that the branches' labels select can be
compared one by one.

    example: prompt p0 p1 p2, response r0 r1, padded to 6
    input_ids       p0    p1    p2    r0    r1    pad
    attention_mask   1     1     1     1     1     0
    labels         -100  -100   r0    r1   -100  -100
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextquill.data._checks import check_integer
from nextquill.data.encoding import Branch, EncodedExample
from nextquill.errors import ArgumentError

IGNORE_INDEX = -100
_BRANCHES = ("factual", "counterfactual", "placebo")
_PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX}


@dataclass
class PairCollator:
    """Pads each branch of a batch on the right, to the branch's own longest row.

    Args:
        pad_token_id: fills `input_ids`; it is never attended and never a label.
        branches: which branches to build, of "factual", "counterfactual" and "placebo".
        pad_to_multiple_of: round each branch's length up to a multiple of this.

    Raises:
        ArgumentError: an argument has an unusable value.
        ArgumentTypeError: a number is not an integer, such as the pad_token_id of a tokenizer without padding.
    """

    pad_token_id: int
    branches: tuple[str, ...] = ("factual", "counterfactual")
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_integer("pad_token_id", self.pad_token_id, least=0)
        if self.pad_to_multiple_of is not None:
            check_integer("pad_to_multiple_of", self.pad_to_multiple_of, least=1)
        unknown = [name for name in self.branches if name not in _BRANCHES]
        if isinstance(self.branches, str) or unknown or not self.branches:
            raise ArgumentError(f"branches: expected a tuple of some of {_BRANCHES}, got {self.branches!r}")
        if len(set(self.branches)) < len(self.branches):
            raise ArgumentError(f"branches: expected each once, got {self.branches!r}")

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        """Return `{branch: {"input_ids", "attention_mask", "labels"}, ..., "example_index"}`.

        Args:
            examples: B examples.

        Returns:
            For each branch a dict of int64 tensors [B, T] with the branch's own T, and `example_index`, int64 [B].

        Raises:
            ArgumentError: no examples, an example without a branch that is asked for, or a branch without a prompt.
        """
        if not examples:
            raise ArgumentError("examples: expected at least one, got none")
        batch: dict[str, Any] = {}
        for name in self.branches:
            batch[name] = self._pad([_branch(example, name) for example in examples])
        batch["example_index"] = torch.tensor([example.index for example in examples], dtype=torch.long)
        return batch

    def _pad(self, branches: list[Branch]) -> dict[str, torch.Tensor]:
        longest = max(len(branch.prompt_ids) + len(branch.response_ids) for branch in branches)
        multiple = self.pad_to_multiple_of or 1
        shape = (len(branches), -(-longest // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        for row, branch in enumerate(branches):
            ids = branch.input_ids
            first = len(branch.prompt_ids) - 1
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            attention_mask[row, : len(ids)] = 1
            labels[row, first : len(ids) - 1] = torch.tensor(branch.response_ids, dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def stack_branches(*branches: Mapping[str, torch.Tensor], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Put branches of one batch into one set of tensors, the first branch's rows first.

    Args:
        branches: what `PairCollator` yields for single branches: `input_ids`, `attention_mask` and `labels`, int64
            [B_i, T_i].
        pad_token_id: fills `input_ids` up to the longest T_i. Those positions are masked out, so any valid id does.

    Returns:
        The same keys, int64 [sum of B_i, max of T_i].

    Raises:
        ArgumentError: no branches, or a branch without one of the three tensors.
    """
    if not branches:
        raise ArgumentError("branches: expected at least one, got none")
    padding = {"input_ids": pad_token_id, **_PADDING}
    for position, branch in enumerate(branches):
        if set(branch) != set(padding):
            raise ArgumentError(f"branches[{position}]: expected the keys {sorted(padding)}, got {sorted(branch)}")
    longest = max(branch["input_ids"].shape[1] for branch in branches)
    return {
        name: torch.cat([_widen(branch[name], longest, fill) for branch in branches]) for name, fill in padding.items()
    }


def _branch(example: EncodedExample, name: str) -> Branch:
    branch: Branch | None = getattr(example, name)
    if branch is None:
        raise ArgumentError(
            f"examples: expected a {name} branch in each, got none in example {example.index} "
            f"(user {example.user_id!r}); encode with placebo=True, on records of at least two users"
        )
    if not branch.prompt_ids:
        raise ArgumentError(
            f"examples: expected a prompt in each branch, got none in the {name} branch of example {example.index}: "
            f"nothing predicts the first response token"
        )
    return branch


def _widen(tensor: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fill)
