"""Greedy responses with and without a user's history, in left-padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nextquill.data import EncodedExample
from nextquill.errors import ArgumentError


@torch.no_grad()
def greedy_responses(
    model: Any,
    tokenizer: Any,
    examples: Sequence[EncodedExample],
    *,
    branch: str = "factual",
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> Iterator[str]:
    """Yield the model's greedy response to each example's prompt, as text without special tokens.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        examples: encoded examples.
        branch: whose prompt is used: "factual" or "counterfactual".
        max_new_tokens: bound on a response's length.
        batch_size: prompts at a time.
    """
    if branch not in ("factual", "counterfactual"):
        raise ArgumentError(f"branch: expected 'factual' or 'counterfactual', got {branch!r}")
    training = model.training
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            prompts = [getattr(example, branch).prompt_ids for example in examples[start : start + batch_size]]
            yield from _generate(model, tokenizer, prompts, max_new_tokens)
    finally:
        model.train(training)


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    outputs = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return list(tokenizer.batch_decode(outputs[:, longest:], skip_special_tokens=True))
