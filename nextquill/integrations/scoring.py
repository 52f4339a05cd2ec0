"""Scoring a data set without gradient: every supervised token's nll with, without and under another user's history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextquill.data import EncodedExample
from nextquill.data.collator import to_device
from nextquill.errors import ArgumentError
from nextquill.integrations.passes import PairPasses
from nextquill.losses import SFTLoss

_REPLACEMENT = "\ufffd"


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
    model: Any,
    examples: Sequence[EncodedExample],
    pad_token_id: int = 0,
    batch_size: int = 8,
    *,
    attention: str = "auto",
    max_tokens: int | None = None,
) -> Iterator[ExampleScores]:
    """Yield the scores of each example, in order.

    Examples of a batch share prefixes, so records that stand user by user are scored faster.

    Args:
        model: a causal language model; used in eval mode and left as it was.
        examples: encoded examples; the placebo branch is scored where every example has one.
        pad_token_id: fills padded batches.
        batch_size: examples at a time.
        attention, max_tokens: see `PairPasses`; several forwards are made of a batch that takes more tokens.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size: expected a positive number, got {batch_size}")
    placebo = bool(examples) and all(example.placebo is not None for example in examples)
    device, training = next(model.parameters()).device, model.training
    with PairPasses(model, SFTLoss(), attention) as passes:
        collate = passes.scoring_collator(pad_token_id, max_tokens, placebo=placebo)
        model.eval()
        try:
            for start in range(0, len(examples), batch_size):
                batch = examples[start : start + batch_size]
                yield from _score_batch(passes, batch, collate(batch)["parts"], device)
        finally:
            model.train(training)


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The piece of text each token adds; they join to the decoded text.

    A token that ends inside a character adds nothing, and the one that completes it adds the character. Each step
    decodes the tokens since the last but one that completed something, so the cost is linear in the length. A tokenizer
    whose decoding reaches further back (a clean-up of spaces) is found out at the end, and decoded from the start for
    every token.
    """
    full = tokenizer.decode(list(token_ids))
    pieces: list[str] = []
    previous, complete, known = 0, 0, ""  # `known` is the text of the tokens from `previous` to `complete`
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[previous:end]))
        if text.endswith(_REPLACEMENT) or not text.startswith(known):
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        previous, complete = complete, end
        known = tokenizer.decode(list(token_ids[previous:complete]))
    joined = "".join(pieces)
    if pieces and full.startswith(joined):  # the last character may be incomplete
        pieces[-1] += full[len(joined) :]
        return pieces
    return _token_texts_from_start(tokenizer, token_ids, full)


def _token_texts_from_start(tokenizer: Any, token_ids: Sequence[int], full: str) -> list[str]:
    pieces: list[str] = []
    start = done = 0
    for end in range(1, len(token_ids) + 1):
        text = full if end == len(token_ids) else tokenizer.decode(list(token_ids[:end]))
        while done < min(len(text), len(full)) and text[done] == full[done]:
            done += 1
        pieces.append(full[start:done])
        start = done
    return pieces


def _score_batch(
    passes: PairPasses, examples: Sequence[EncodedExample], parts: Sequence[Any], device: torch.device
) -> list[ExampleScores]:
    found: dict[int, ExampleScores] = {}
    for part in parts:
        scores = passes.scores(to_device(part, device))
        pair = scores.output.pair_nll
        assert pair.counterfactual is not None
        members = part["sequence_ids"].unique_consecutive().tolist()  # every example has a response
        sizes = [len(examples[index].factual.response_ids) for index in members]
        streams = (pair.factual, pair.counterfactual, scores.placebo_nll)
        split = [[None] * len(sizes) if s is None else s.float().cpu().split(sizes) for s in streams]
        for index, factual, counterfactual, placebo in zip(members, *split, strict=True):
            example = examples[index]
            ids = example.factual.response_ids
            found[index] = ExampleScores(example, ids, factual, counterfactual, placebo)
    return [found[index] for index in range(len(examples))]
