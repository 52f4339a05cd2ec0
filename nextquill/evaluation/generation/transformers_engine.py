"""Generation by transformers' own `generate`, in left-padded batches of prompts of similar length.

A sample is argmax(log p + g) with Gumbel noise g, which has the distribution p (E. J. Gumbel, Statistical Theory of
Extreme Values, 1954). Each prompt has its own generator of noise. With one generator for a batch, a prompt's sample
would depend on the prompts beside it. Padding changes the logits by rounding alone, so another batch size can give
another token only if two candidates are closer than that. The noise is drawn in double precision: on a GPU, float32
exponential variates begin at 6e-8, and the many tokens of a large vocabulary with smaller probabilities would hardly
ever be drawn.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from nextquill.evaluation.generation import Engine, GenerationOptions, Prompt, token_limit, up_to_stop
from nextquill.models.configs import context_length
from nextquill.models.probe import in_eval_mode


@contextmanager
def transformers_engine(
    model: Any, tokenizer: Any, stops: set[int], options: GenerationOptions
) -> Iterator[TransformersEngine]:
    """An engine around a model in eval mode, whose generation config only says where to stop.

    Generation uses a cache even if the model's own config has none, as in training with gradient checkpointing.
    """
    own = model.generation_config
    pad = min(stops) if stops else 0  # behind the attention mask in prompts, cut off in responses
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=sorted(stops) or None
    )
    try:
        with in_eval_mode(model):
            yield TransformersEngine(tokenizer, stops, options, model)
    finally:
        model.generation_config = own


@dataclass
class TransformersEngine(Engine):
    """See `Engine`; the longest prompts come first."""

    model: Any

    def generate_ids(self, prompts: Sequence[Prompt], done: Container[int] = ()) -> Iterator[tuple[int, list[int]]]:
        """Yield each prompt's index and token ids, in the order they are computed."""
        for batch, limit in self._batches(prompts):
            if all(prompt.index in done for prompt in batch):
                continue
            for prompt, ids in zip(batch, self._respond(batch, limit), strict=True):
                if prompt.index not in done:
                    yield prompt.index, up_to_stop(ids, self.stops)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[Prompt], int]]:
        """Prompts to run together, longest first, and the most tokens that each may get.

        Near the end of the model's context that number depends on a prompt's length. Only prompts with the same number
        run together, so that the length of a response depends on its own prompt alone.
        """
        context, size = context_length(self.model), self.options.batch_size
        ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.index))
        for tokens, group in groupby(ordered, lambda prompt: token_limit(prompt, self.options, context)):
            members = list(group)
            for start in range(0, len(members), size):
                yield members[start : start + size], tokens

    @torch.no_grad()
    def _respond(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        device, pad = next(self.model.parameters()).device, self.model.generation_config.pad_token_id
        rows = [torch.tensor(prompt.ids, device=device) for prompt in prompts]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        outputs = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            logits_processor=self._sampling(prompts, device),
        )
        return list(outputs[:, input_ids.shape[1] :].tolist())

    def _sampling(self, prompts: Sequence[Prompt], device: torch.device) -> LogitsProcessorList:
        """The processors that turn the most likely token into a sample; none for greedy responses."""
        options, found = self.options, LogitsProcessorList()
        if options.temperature > 0:
            found.append(TemperatureLogitsWarper(float(options.temperature)))
            if options.top_p < 1:
                found.append(TopPLogitsWarper(options.top_p))
            found.append(_GumbelNoise([prompt.seed for prompt in prompts], device))
        return found


class _GumbelNoise(LogitsProcessor):
    """Adds to each row -log(E), E exponential, from the row's own generator."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
        noise = torch.empty_like(scores, dtype=exact)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()
