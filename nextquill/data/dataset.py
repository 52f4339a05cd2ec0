"""Encoded examples as a data set that a data loader can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.utils.data import Dataset

from nextquill.data.examples import EncodedExample, EncodingStats


class EncodedDataset(Dataset[EncodedExample]):
    """Encoded examples as a map-style data set.

    Args:
        examples: the examples, in the order of the data set.
    """

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
    def stats(self) -> EncodingStats:
        """Counts of what encoding kept and dropped."""
        return EncodingStats.from_examples(self.examples)

    def num_branch_tokens(self, names: Sequence[str]) -> list[int]:
        """The tokens of each example's branches with these names, counted separately; 0 for a missing branch."""
        branches = ([getattr(example, name) for name in names] for example in self.examples)
        return [sum(b.prompt_length + b.response_length for b in found if b is not None) for found in branches]
