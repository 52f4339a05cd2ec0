"""Scoring a data set without gradient: every supervised token's nll with, without and under another user's history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextquill.data import EncodedExample, PairCollator
from nextquill.integrations.passes import PairPasses
from nextquill.losses import SFTLoss


@dataclass(frozen=True)
class ExampleScores:
    """One example's response tokens; the tensors are float32 [tokens] on the CPU, in nats.

    Attributes:
        example: what was scored.
        token_ids: the response's tokens, with what ends it.
        nll_factual, nll_counterfactual: nll with and without the user's history.
        nll_placebo: nll under another user's history, or None.
    """

    example: EncodedExample
    token_ids: list[int]
    nll_factual: Tensor
    nll_counterfactual: Tensor
    nll_placebo: Tensor | None

    @property
    def effect_logprob(self) -> Tensor:
        return self.nll_counterfactual - self.nll_factual

    @property
    def effect_prob(self) -> Tensor:
        return (-self.nll_factual).exp() - (-self.nll_counterfactual).exp()


def score_examples(
    model: Any, examples: Sequence[EncodedExample], pad_token_id: int, batch_size: int = 8
) -> Iterator[ExampleScores]:
    """Yield the scores of each example, in order.

    Args:
        model: a causal language model; used in eval mode and left as it was.
        examples: encoded examples; the placebo branch is scored where every example has one.
        pad_token_id: fills the batches.
        batch_size: examples at a time.
    """
    passes = PairPasses(model, SFTLoss())
    branches = ("factual", "counterfactual")
    if examples and all(example.placebo is not None for example in examples):
        branches += ("placebo",)  # type: ignore[assignment]
    collate = PairCollator(pad_token_id, branches)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            yield from _score_batch(passes, part, collate(part), device)
    finally:
        model.train(training)


def _score_batch(
    passes: PairPasses, examples: Sequence[EncodedExample], batch: dict[str, Any], device: torch.device
) -> Iterator[ExampleScores]:
    batch = {
        name: {key: tensor.to(device) for key, tensor in branch.items()}
        for name, branch in batch.items()
        if isinstance(branch, dict)
    }
    scores = passes.scores(batch)
    pair = scores.output.pair_nll
    assert pair.counterfactual is not None
    sizes = [len(example.factual.response_ids) for example in examples]
    factual, counterfactual = pair.factual.float().cpu().split(sizes), pair.counterfactual.float().cpu().split(sizes)
    placebo = None if scores.placebo_nll is None else scores.placebo_nll.float().cpu().split(sizes)
    for i, example in enumerate(examples):
        ids = example.factual.response_ids
        yield ExampleScores(example, ids, factual[i], counterfactual[i], None if placebo is None else placebo[i])
