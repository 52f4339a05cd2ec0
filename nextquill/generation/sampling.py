"""From logits to the next token: the most likely one, or a sample with a generator of noise for each row.

A sample is argmax(log p + g) with Gumbel noise g, which has the distribution p (E. J. Gumbel, Statistical Theory of
Extreme Values, 1954). Each prompt has its own generator of noise. With one generator for a batch, a prompt's sample
would depend on the prompts beside it. Other rows beside it change the logits by rounding alone, so another batch size
can give another token only if two candidates are closer than that. The noise is drawn in double precision: on a GPU,
float32 exponential variates begin at 6e-8, and the many tokens of a large vocabulary with smaller probabilities would
hardly ever be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from nextquill.generation import GenerationOptions


class GumbelNoise(LogitsProcessor):
    """Adds to each row -log(E), E exponential, from the row's own generator."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return noisy scores [rows, V], float64 (float32 on mps).

        Args:
            input_ids: int64 [rows, T], or None; not used.
            scores: [rows, V], nats, any floating dtype.
        """
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
        noise = torch.empty_like(scores, dtype=exact)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def sampling(options: GenerationOptions, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """The processors after which the most likely token is a sample; none for greedy responses."""
    found = LogitsProcessorList()
    if options.temperature > 0:
        found.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_p < 1:
            found.append(TopPLogitsWarper(options.top_p))
        found.append(GumbelNoise(seeds, device))
    return found
