"""Encoded examples as what a data loader reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from nextquill.data.encoding import EncodedExample


class EncodedDataset(Dataset[EncodedExample]):
    """Encoded examples as a map-style data set."""

    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> EncodedExample:
        return self.examples[index]

    @property
    def has_placebo(self) -> bool:
        """Whether every example has a placebo branch."""
        return bool(self.examples) and all(example.placebo is not None for example in self.examples)
