"""How MIRROR samples responses and shows the user's own; checked without torch, before anything that takes time."""

from __future__ import annotations

from dataclasses import dataclass

from nextquill.data._checks import check_integer
from nextquill.errors import ArgumentError
from nextquill.generation import GenerationOptions

#: The words that show the teacher the user's own response, after the query. Ours: the paper publishes none.
REFERENCE = "\n\nThe user's own response, for reference:\n{response}"


@dataclass(frozen=True)
class MirrorSettings:
    """The arguments of `MirrorTrainer` with these names.

    Raises:
        ArgumentError, ArgumentTypeError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    num_rollouts: int = 1
    reference: str = REFERENCE
    log_samples_every: int = 1

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_rollouts", 1), ("log_samples_every", 0)):
            check_integer(name, getattr(self, name), least=least)
        GenerationOptions(temperature=self.temperature)
        if "{response}" not in self.reference:
            raise ArgumentError(f"reference: expected words with {{response}} in them, got {self.reference!r}")
