"""The running means that divide the two terms of MIRROR-F."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

#: Nats. A smaller mean is rounding, which a division would make the whole loss.
_LEAST = 1e-6
#: The divergence and the anchor of a step.
Terms = tuple[float, float | None]


class TermMeans(TrainerCallback, ExportableState):
    """The means of the divergence and of the anchor over the optimiser steps so far, kept in checkpoints.

    A step without informative tokens has no anchor, and does not count for its mean.
    """

    def __init__(self) -> None:
        self.sums, self.counts = [0.0, 0.0], [0, 0]
        self._before = (self.sums, self.counts)

    def has(self, *, anchor: bool) -> bool:
        """Whether there is a mean of the divergence, and of the `anchor` if that is asked for."""
        return all(self.counts[: 1 + anchor])

    def values(self, otherwise: Terms = (1.0, 1.0)) -> tuple[float, float]:
        """The means of both terms, in nats; `otherwise` gives those of no step."""
        each = zip(self.sums, self.counts, otherwise, strict=True)
        first, second = (total / count if count else other for total, count, other in each)
        return max(first or 0.0, _LEAST), max(second or 0.0, _LEAST)

    def add(self, terms: Terms) -> None:
        """Add the terms of one step, in nats; None for an anchor of no token."""
        self._before = (self.sums, self.counts)
        self.sums = [total + (term or 0.0) for total, term in zip(self.sums, terms, strict=True)]
        self.counts = [count + (term is not None) for count, term in zip(self.counts, terms, strict=True)]

    def forget(self) -> None:
        """Take the step that was added last out again."""
        self.sums, self.counts = self._before

    def state(self) -> dict[str, Any]:
        """The values that a checkpoint stores."""
        return {"args": {}, "attributes": {"sums": list(self.sums), "counts": list(self.counts)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the values of the checkpoint that the run resumes from."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and state.global_step > 0:
            self.sums, self.counts = list(saved["attributes"]["sums"]), list(saved["attributes"]["counts"])
