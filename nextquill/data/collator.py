"""Collates encoded examples into batches that a model runs on and a loss reads, in one of two layouts.

    trees    branches merged by common prefix, one row without padding (`TreeCollator`)
    padded   a row per branch, filled on the right (`PaddedCollator`)

Both give the same *batch*: `{"example_index": int64 [B], "users": int64 [B], "parts": [part, …]}`. Equal numbers in
`users` mean the same user. The model computes one part at a time. A part holds

    labels          int64 [n]   the supervised tokens of its examples, example by example
    sequence_ids    int64 [n]   the example of each label, as a position in the batch
    num_labels, num_sequences       the number of labels, and of examples
    num_tokens, num_branch_tokens   the tokens that are computed, and the tokens of all branches without sharing
    forwards        the forwards of the model, in order; the last one carries the loss and its gradient
    effects         float32 [2, n]  the stored NLLs of the labels, if every example has them
    anchor_labels, anchor_ids   int64 [m]   labels and examples of the anchor branches' responses, if there are any

A forward holds inputs [rows, T]. Its `rows` give, for each branch, the n positions, counted over all rows, whose hidden
states predict the labels. For trees it also holds `layout`, which stays on the host, and `multiplicity`, the number of
branches that share each token. Nothing is ever shifted: the row after the end of a branch in a tree belongs to another
branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextquill.data._checks import check_integer
from nextquill.data.examples import Branch, EncodedExample
from nextquill.data.templates import BRANCHES
from nextquill.devices import send
from nextquill.errors import ArgumentError, BudgetError
from nextquill.storage.fingerprints import seed_of
from nextquill.tree import TreeLayout, build_prefix_tree
from nextquill.tree.packing import pack_sorted
from nextquill.tree.prefix_tree import SortedBranches, sort_branches

#: Never a label of a batch, as token ids are not negative.
IGNORE_INDEX = -100
#: The branches of each forward. A constant counterfactual has its own forward, which needs no gradient.
Forwards = tuple[tuple[str, ...], ...]
FACTUAL: Forwards = (("factual",),)
CONSTANT_COUNTERFACTUAL: Forwards = (("counterfactual",), ("factual",))
JOINT: Forwards = (("factual", "counterfactual"),)
#: The branch with labels of its own, beside those of `BRANCHES`.
ANCHOR = "anchor"


@dataclass
class TreeCollator:
    """Merges the branches of a batch by common prefix.

    Args:
        forwards: the branches of each forward of a part.
        max_tokens: the most tokens, after sharing, in the forward that carries the loss. A batch that needs more is
            split into several parts; None always gives one part.

    Raises:
        ArgumentError, ArgumentTypeError: an argument has an unusable value.
    """

    forwards: Forwards = JOINT
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_forwards(self.forwards)
        check_integer("max_tokens", self.max_tokens, least=1, or_none=True)

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        """The batch of these examples.

        Raises:
            ArgumentError: no examples, an example without a branch of `forwards`, or a branch without a prompt.
            BudgetError: a single example needs more than `max_tokens`.
        """
        branches = [_branches(examples, names) for names in self.forwards]
        ordered = [sort_branches([branch.input_tensor() for branch in each]) for each in branches]
        groups = [_indices([index], len(examples), self.forwards[-1]) for index in range(len(examples))]
        try:
            packed = pack_sorted(ordered[-1], groups, self.max_tokens)
        except BudgetError as error:
            raise BudgetError(f"examples: {error} (groups are the batch's examples)") from error
        passes = list(zip(self.forwards, branches, ordered, strict=True))
        parts = [_part(examples, chosen, [_tree_forward(*each, chosen) for each in passes]) for chosen in packed]
        return _batch(examples, parts)

    def over(self, example: EncodedExample, budget: int) -> int | None:
        """The tokens that an example alone takes in the forward that carries the loss, if more than `budget`."""
        ids = [branch.input_ids for branch in _branches([example], self.forwards[-1])]
        if sum(map(len, ids)) <= budget:
            return None
        size = len(build_prefix_tree(ids))
        return size if size > budget else None

    def empty_part(self) -> dict[str, Any]:
        """A part without labels, one token per forward, for a rank that has no part left while others have."""
        zero, one = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)
        tree = {"input_ids": zero, "position_ids": zero, "subtree_end": one, "multiplicity": one}
        return _empty_part({**tree, "layout": TreeLayout.of(zero[0], one[0])}, self.forwards)


@dataclass
class PaddedCollator:
    """Gives every branch a row of its own, padded on the right to the longest row of the forward.

    Args:
        pad_token_id: fills `input_ids`; it is never attended to and never a label.
        forwards: the branches of each forward.
        pad_to_multiple_of: round each forward's length up to a multiple of this.
        max_tokens: the most tokens, with padding, in the forward that carries the loss. A batch that needs more is
            split into several parts, examples of similar length together; None always gives one part.

    Raises:
        ArgumentError, ArgumentTypeError: an argument has an unusable value, such as the pad_token_id of a tokenizer
            without padding.
    """

    pad_token_id: int
    forwards: Forwards = JOINT
    pad_to_multiple_of: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_integer("pad_token_id", self.pad_token_id, least=0)
        _check_forwards(self.forwards)
        for name in ("pad_to_multiple_of", "max_tokens"):
            check_integer(name, getattr(self, name), least=1, or_none=True)

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        """The batch of these examples; errors are those of `TreeCollator`."""
        parts = []
        for chosen in self._packed(examples):
            members = [examples[index] for index in chosen]
            forwards = [self._forward(_branches(members, names), names) for names in self.forwards]
            parts.append(_part(examples, chosen, forwards))
        return _batch(examples, parts)

    def over(self, example: EncodedExample, budget: int) -> int | None:
        """The tokens that an example alone takes in the forward that carries the loss, if more than `budget`."""
        size = self._size(example)
        return size if size > budget else None

    def empty_part(self) -> dict[str, Any]:
        """A part without labels, one token per forward, for a rank that has no part left while others have."""
        ids = torch.full((1, 1), self.pad_token_id)
        return _empty_part({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, self.forwards)

    def _packed(self, examples: Sequence[EncodedExample]) -> list[list[int]]:
        """The examples of each part, as indices."""
        if self.max_tokens is None or not examples:
            return [list(range(len(examples)))]
        sizes, packed = [self._size(example) for example in examples], list[list[int]]()
        for index in sorted(range(len(examples)), key=sizes.__getitem__):  # so the last one of a part is its longest
            if sizes[index] > self.max_tokens:
                raise BudgetError(
                    f"examples[{index}]: its rows take {sizes[index]} tokens together; max_tokens is {self.max_tokens}"
                )
            if packed and sizes[index] * (len(packed[-1]) + 1) <= self.max_tokens:
                packed[-1].append(index)
            else:
                packed.append([index])
        return [sorted(chosen) for chosen in packed]

    def _size(self, example: EncodedExample) -> int:
        names = self.forwards[-1]
        return len(names) * self._padded(max(map(_length, _branches([example], names))))

    def _padded(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def _forward(self, branches: Sequence[Branch], names: Sequence[str]) -> dict[str, Any]:
        lengths = [_length(branch) for branch in branches]
        longest = self._padded(max(lengths))
        input_ids = torch.full((len(branches), longest), self.pad_token_id, dtype=torch.long)
        for row, branch in enumerate(branches):
            input_ids[row, : lengths[row]] = branch.input_tensor()
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        predicting = [row * longest + _predicting(branch) for row, branch in enumerate(branches)]
        rows = _rows(predicting, names)
        return {"input_ids": input_ids, "attention_mask": mask, "rows": rows, "num_branch_tokens": sum(lengths)}


@dataclass
class LimitedTreeCollator:
    """Merges the branches of a batch by common prefix, unless one of them is longer than trees may be.

    Args:
        trees: for batches of short branches.
        padded: for a batch with a longer branch, with the same forwards.
        max_depth: the most tokens of a branch in a tree.
    """

    trees: TreeCollator
    padded: PaddedCollator
    max_depth: int

    @property
    def forwards(self) -> Forwards:
        """The branches of each forward."""
        return self.trees.forwards

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        """The batch of these examples; errors are those of the two collators."""
        return self._for(examples)(examples)

    def over(self, example: EncodedExample, budget: int) -> int | None:
        """The tokens that an example alone takes in the forward that carries the loss, if more than `budget`."""
        return self._for([example]).over(example, budget)

    def empty_part(self) -> dict[str, Any]:
        """A part without labels, one token per forward, for a rank that has no part left while others have."""
        return self.trees.empty_part()

    def _for(self, examples: Sequence[EncodedExample]) -> TreeCollator | PaddedCollator:
        branches = (branch for names in self.forwards for branch in _branches(examples, names))
        return self.padded if any(_length(branch) > self.max_depth for branch in branches) else self.trees


Collator = TreeCollator | PaddedCollator | LimitedTreeCollator


def _indices(chosen: Sequence[int], count: int, names: Sequence[str]) -> list[int]:
    """The positions of the chosen examples' branches in a forward's list, which is sorted by branch name first."""
    return [position * count + index for position in range(len(names)) for index in chosen]


def _tree_forward(
    names: Sequence[str], branches: Sequence[Branch], ordered: SortedBranches, chosen: Sequence[int]
) -> dict[str, Any]:
    indices = _indices(chosen, len(branches) // len(names), names)
    tree = ordered.select(indices).tree()
    predicting = [rows[_predicting(branches[i])] for rows, i in zip(tree.branch_rows, indices, strict=True)]
    return {
        "input_ids": tree.input_ids[None],
        "position_ids": tree.position_ids[None],
        "subtree_end": tree.subtree_end[None],
        "multiplicity": torch.bincount(torch.cat(tree.branch_rows), minlength=len(tree))[None],
        "layout": TreeLayout.of_tree(tree),
        "rows": _rows(predicting, names),
        "num_branch_tokens": tree.num_branch_tokens,
    }


def _rows(predicting: list[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """By branch name, the predicting positions of a forward's branches, which are sorted by name first."""
    count = len(predicting) // len(names)
    return {name: torch.cat(predicting[i * count : (i + 1) * count]) for i, name in enumerate(names)}


def _part(examples: Sequence[EncodedExample], chosen: Sequence[int], forwards: list[dict[str, Any]]) -> dict[str, Any]:
    responses = [examples[index].factual for index in chosen]
    labels = torch.cat([response.response_tensor() for response in responses])
    lengths = torch.tensor([response.response_length for response in responses])
    part = _assemble(labels, torch.tensor(list(chosen)).repeat_interleave(lengths), len(responses), forwards)
    if ANCHOR in forwards[-1]["rows"]:
        part |= _anchor_labels(examples, chosen)
    effects = [stored for index in chosen if (stored := examples[index].effects) is not None]
    return {**part, "effects": torch.cat(effects, dim=1)} if len(effects) == len(responses) else part


def _anchor_labels(examples: Sequence[EncodedExample], chosen: Sequence[int]) -> dict[str, Tensor]:
    labels = [torch.tensor(anchor.labels) for index in chosen if (anchor := examples[index].anchor) is not None]
    lengths = torch.tensor([len(each) for each in labels])
    own = torch.cat(labels).long()
    ids = torch.tensor(list(chosen)).repeat_interleave(lengths)
    return {"anchor_labels": own.where(own >= 0, IGNORE_INDEX), "anchor_ids": ids}


def _empty_part(inputs: dict[str, Any], forwards: Forwards) -> dict[str, Any]:
    none = torch.empty(0, dtype=torch.long)
    made = [{**inputs, "rows": dict.fromkeys(names, none), "num_branch_tokens": 0} for names in forwards]
    empty = _assemble(none, none, 0, made)
    return {**empty, "anchor_labels": none, "anchor_ids": none} if ANCHOR in forwards[-1] else empty


def _assemble(labels: Tensor, sequence_ids: Tensor, count: int, forwards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "labels": labels,
        "num_labels": labels.numel(),
        "sequence_ids": sequence_ids,
        "num_sequences": count,
        "num_tokens": sum(forward["input_ids"].numel() for forward in forwards),
        "num_branch_tokens": sum(forward.pop("num_branch_tokens") for forward in forwards),
        "forwards": forwards,
    }


def _batch(examples: Sequence[EncodedExample], parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "example_index": torch.tensor([example.index for example in examples], dtype=torch.long),
        "users": torch.tensor([seed_of(example.user_id) for example in examples], dtype=torch.long),
        "parts": parts,
    }


def _length(branch: Branch) -> int:
    return branch.prompt_length + branch.response_length


def _predicting(branch: Branch) -> Tensor:
    """The positions in the branch that predict a token of the response."""
    first = branch.prompt_length - 1
    return torch.arange(first, first + branch.response_length)


def empty_like(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part without labels, with the same forwards and on the same device."""
    forwards: Forwards = tuple(tuple(forward["rows"]) for forward in part["forwards"])
    in_trees = "layout" in part["forwards"][-1]
    collator = TreeCollator(forwards) if in_trees else PaddedCollator(0, forwards)
    empty: dict[str, Any] = to_device(collator.empty_part(), part["labels"].device)
    return empty


def to_device(batch: Any, device: torch.device | str) -> Any:
    """A batch, or a part of one, with its tensors on a device. The layouts of trees stay on the host."""
    if isinstance(batch, Tensor):
        return send(batch, device)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return [to_device(value, device) for value in batch] if isinstance(batch, list) else batch


def _check_forwards(forwards: Any) -> None:
    names = [name for part in forwards for name in part] if isinstance(forwards, (tuple, list)) else []
    if (
        not names
        or any(isinstance(part, str) or not part for part in forwards)
        or set(names) - {*BRANCHES, ANCHOR}
        or len(set(names)) < len(names)
    ):
        raise ArgumentError(
            f"forwards: expected a tuple of tuples of {BRANCHES}, each name at most once, got {forwards!r}"
        )


def _branches(examples: Sequence[EncodedExample], names: Sequence[str]) -> list[Branch]:
    """The branches of a forward, sorted by name first."""
    if not examples:
        raise ArgumentError("examples: expected at least one, got none")
    return [_branch(example, name) for name in names for example in examples]


def _branch(example: EncodedExample, name: str) -> Branch:
    branch = example.branch(name)
    if branch is None:
        raise ArgumentError(
            f"examples: expected a {name} branch in each, got none in example {example.index} "
            f"(user {example.user_id!r}); encode with placebo=True, on records of at least two users"
        )
    if not branch.prompt_length or not branch.response_length:
        raise ArgumentError(
            f"examples: expected a prompt and a response in each branch, got an empty one in the {name} branch "
            f"of example {example.index}"
        )
    return branch
