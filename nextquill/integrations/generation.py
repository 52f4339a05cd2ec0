"""Greedy responses with and without a user's history, in left-padded batches, and their ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nextquill.data import EncodedExample
from nextquill.errors import ArgumentError
from nextquill.integrations.loading import context_length

#: Thai and Lao, kana, CJK ideographs: scripts without spaces between words.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


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
    """Yield the model's most likely response to each example's prompt, token by token, without special tokens.

    Plain greedy decoding: what the model's own generation config says of sampling and penalties is left out. A response
    ends at what ended the training response, at the tokenizer's end token or at one of the generation config's, after
    `max_new_tokens`, or where the model's context does.

    Args:
        model, tokenizer: a causal language model, also a PEFT model, and its tokenizer.
        examples: encoded examples.
        branch: whose prompt is used: "factual" or "counterfactual".
        max_new_tokens: bound on a response's length.
        batch_size: prompts at a time.
    """
    if branch not in ("factual", "counterfactual"):
        raise ArgumentError(f"branch: expected 'factual' or 'counterfactual', got {branch!r}")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ArgumentError(f"{name}: expected a positive number, got {value}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stops = stop_tokens(base, tokenizer, examples)
    with _plain_greedy(base, stops):
        for start in range(0, len(examples), batch_size):
            prompts = [getattr(example, branch).prompt_ids for example in examples[start : start + batch_size]]
            for ids in _generate(base, prompts, max_new_tokens):
                end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
                yield tokenizer.decode(ids[:end], skip_special_tokens=True)


def stop_tokens(model: Any, tokenizer: Any, examples: Sequence[EncodedExample]) -> set[int]:
    """The ids a response ends at; a chat model's end of turn is often not its tokenizer's end token."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stops |= {example.factual.response_ids[-1] for example in examples[:1]} & special
    return stops - {None}


def rouge_l(references: Sequence[str], texts: Sequence[str]) -> float:
    """Mean ROUGE-L F1 of `texts` against `references`, with stemming."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=RougeWords())
    pairs = zip(references, texts, strict=True)
    scores = [scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs]
    return float(sum(scores) / len(scores))


class RougeWords:
    """Words of any script, for ROUGE: rouge_score's own tokenizer knows ASCII letters only and scores other text 0.

    Scripts that do not put spaces between words count by the character. On ASCII text the words, and so the scores, are
    rouge_score's with its stemmer.
    """

    _WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        words = self._WORD.findall(text.lower())
        return [self._stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


@contextmanager
def _plain_greedy(model: Any, stops: set[int]) -> Iterator[None]:
    """Eval mode and a generation config with nothing in it but greedy decoding, for a while."""
    from transformers import GenerationConfig

    own, training = model.generation_config, model.training
    pad = min(stops) if stops else 0  # behind the attention mask in prompts, cut off in responses
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=sorted(stops) or None
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _generate(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    context = context_length(model)
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - longest)
    if max_new_tokens < 1:
        return [[] for _ in prompts]
    device, pad = next(model.parameters()).device, model.generation_config.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    outputs = model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens)
    responses: list[list[int]] = outputs[:, longest:].tolist()
    return responses
