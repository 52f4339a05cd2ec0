"""Log-probabilities of responses under prompts that share a prefix, and weighted sums of them.

Both gradients of POPI are weighted sums of log-probabilities. The weights of a pair's responses are the derivatives of
its loss; the weights of a group's summaries are their advantages. All weights of a step are computed first, without
gradient, and are constants in the forward with gradient. So that forward can be divided into trees under a token
budget, micro-batches and ranks, and the gradient stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextquill.data import Branch, EncodedExample
from nextquill.data.collator import to_device
from nextquill.evaluation.scoring import BranchScorer, pad_token
from nextquill.models.sharded import run_in_step
from nextquill.popi.roles import INFERENCE, Role


class BranchPasses(BranchScorer):
    """Runs branches through one model, with or without gradient.

    Args and errors are those of `BranchScorer`; the model is a causal language model or a PEFT model, with the active
    adapter of the moment.
    """

    def set_temperature(self, value: float) -> None:
        """From now on take log-probabilities from softmax(logits / value); at first the value is 1."""
        scale, cap = self._passes.runner.logit_scale, self._passes.runner.softcap
        # cap(x) / T = c/T · tanh((x/T) / (c/T))
        self._passes.loss.logit_scale = scale / value
        self._passes.loss.softcap = None if cap is None else cap / value

    def close(self) -> None:
        """Restore the model; a later call takes hold of it again."""
        self._passes.close()

    def log_probs(self, branches: Sequence[Branch]) -> Tensor:
        """Return log p(response | prompt) of each branch, without gradient, in eval mode; float64 [branches], nats.

        Every process that holds a part of the model must call it, also without branches.
        """
        found = [torch.zeros(0, dtype=torch.float64)]

        def run() -> None:
            found.extend(-nll.double().sum().view(1) for nll in (self(branches) if branches else ()))

        run_in_step(self._model, run)
        return torch.cat(found)

    def parts(self, branches: Sequence[Branch], weights: Sequence[float] | Tensor) -> list[dict[str, Any]]:
        """Return parts for `loss`, one for each forward: the branches with a weight other than 0, merged by prefix.

        Args:
            weights: floating [branches], or numbers; the weight of each -log p(response | prompt) in nats.
        """
        values = torch.as_tensor(weights, dtype=torch.float64)
        kept = values.nonzero().squeeze(1)
        if not len(kept):
            return []
        chosen, values = [branches[index] for index in kept.tolist()], values[kept]
        examples = [EncodedExample("", index, branch, branch, None, 0, 0) for index, branch in enumerate(chosen)]
        return [
            {**part, "token_weights": values[part["sequence_ids"]]} for part in self._parts(examples, training=True)
        ]

    def empty_part(self) -> dict[str, Any]:
        """A part for `loss` without branches, for a process that has fewer parts than others."""
        return {**self._passes.collator(self._pad).empty_part(), "token_weights": torch.zeros(0, dtype=torch.float64)}

    def loss(self, part: dict[str, Any]) -> Tensor:
        """Return Σ weight · -log p(response | prompt) over a part, a scalar with gradient, float32 or float64."""
        part = to_device(part, next(self._model.parameters()).device)
        return self._passes.weighted_nll(part, part["token_weights"])

    def check_training(self, max_length: int) -> None:
        """Raise now the errors that training would raise later."""
        self._passes.check_training(max_length)


class RolePasses:
    """The `BranchPasses` of all models, each made once. The inference model gets the temperature."""

    def __init__(self, *, attention: str, max_tokens: int | None, temperature: float) -> None:
        self._options: dict[str, Any] = {"attention": attention, "max_tokens": max_tokens}
        self._temperature = temperature
        self._known: dict[int, BranchPasses] = {}

    def of(self, role: Role, model: Any) -> BranchPasses:
        """Return the passes of a role's model, or of the model of its initial state."""
        if id(model) not in self._known:
            self._known[id(model)] = BranchPasses(model, pad_token(role.tokenizer), **self._options)
        passes = self._known[id(model)]
        passes.set_temperature(self._temperature if role.name == INFERENCE else 1.0)
        return passes

    def close(self) -> None:
        """Restore all models."""
        for passes in self._known.values():
            passes.close()
