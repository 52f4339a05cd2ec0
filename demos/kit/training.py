"""A small base model made from nothing, the steps that train it, and the global state while they run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextquill.models.tiny_models import ScratchSize, build_model

MAX_GRAD_NORM = 1.0


def build_base(size: ScratchSize, seed: int, *, weight_scale: float, **token_ids: int) -> Any:
    """A Llama whose initial matrices have `weight_scale` times the usual standard deviation of 0.02.

    At a width below 100 a model then learns to copy from its prompt several times sooner.
    """
    model = build_model(size, seed, **token_ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(weight_scale)
    return model


class Learner:
    """AdamW on some parameters, with clipped gradients."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float] = (0.9, 0.98)
    ) -> None:
        self.parameters, self.learning_rate = list(parameters), learning_rate
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=betas, weight_decay=0.0)

    def step(self, loss: Tensor, share: float = 1.0) -> None:
        """One step down the gradient of `loss`, at this share of the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside the block.

    Matrices this small gain little from a second (a pass over the test users: 0.6 s with two threads and 0.2 s with one
    while the other core was busy), and with one thread sums have the same order on every machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators inside the block: PEFT and the Trainer draw from them."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
