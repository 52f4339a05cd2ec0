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


class NoiseStream:
    """Gumbel noise -log(E), E exponential, for the tokens of one response: the n-th row drawn is for its n-th token."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._drawn = list[Tensor]()

    def ahead(self, count: int, scores: Tensor) -> list[Tensor]:
        """The noise of the next tokens, float64 [V] each (float32 on mps), without using it up.

        Args:
            scores: [.., V], whose device and number of columns the noise has.
        """
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
        for _ in range(count - len(self._drawn)):
            drawn = torch.empty(scores.shape[-1], dtype=exact, device=scores.device)
            self._drawn.append(-drawn.exponential_(generator=self._generator).log())
        return self._drawn[:count]

    def use(self, count: int) -> None:
        """Leave behind the noise of so many tokens, which have been chosen."""
        del self._drawn[:count]


class GumbelNoise(LogitsProcessor):
    """Adds noise to each row, from the row's own stream."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._streams = [NoiseStream(seed, device) for seed in seeds]

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return noisy scores [rows, V], float64 (float32 on mps).

        Args:
            input_ids: int64 [rows, T], or None; not used.
            scores: [rows, V], nats, any floating dtype.
        """
        noise = torch.stack([row for stream in self._streams for row in stream.ahead(1, scores)])
        for stream in self._streams:
            stream.use(1)
        return scores + noise


def warpers(options: GenerationOptions) -> LogitsProcessorList:
    """The processors for temperature and top_p, which change each row alone; none for greedy responses."""
    found = LogitsProcessorList()
    if options.temperature > 0:
        found.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_p < 1:
            found.append(TopPLogitsWarper(options.top_p))
    return found


def sampling(options: GenerationOptions, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """The processors after which the most likely token is a sample; none for greedy responses."""
    found = warpers(options)
    if options.temperature > 0:
        found.append(GumbelNoise(seeds, device))
    return found
