"""Inputs of the chunk kernels, and their true results in float64 from the definitions and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nextquill.ops import chunk_native

needs_native = pytest.mark.skipif(chunk_native.why_not() is not None, reason=str(chunk_native.why_not()))

if chunk_native.why_not() is None:
    import nextquill_ext

    ISAS = nextquill_ext.available_isas()
else:
    ISAS = ("absent",)


@dataclass
class Pair:
    """Two streams of logits after scale and cap, and the upstream gradients of their three NLLs."""

    factual: Tensor
    counterfactual: Tensor
    labels: Tensor
    grad_factual: Tensor
    grad_counterfactual: Tensor
    grad_effect: Tensor

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.factual.clone(), self.counterfactual.clone()


def make_pair(n: int, vocabulary: int, softcap: float | None = None, spread: float = 3.0, seed: int = 0) -> Pair:
    """Logits with similar streams, like those of one model, and gradients of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    factual = normal(n, vocabulary) * spread
    counterfactual = factual + normal(n, vocabulary)
    if softcap is not None:
        factual, counterfactual = (softcap * torch.tanh(z / softcap) for z in (factual, counterfactual))
    labels = torch.randint(vocabulary, (n,), generator=generator)
    return Pair(factual, counterfactual, labels, normal(n), normal(n), normal(n))


def true_token_stats(logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.double()
    largest = z.amax(-1)
    nll = z.logsumexp(-1) - z.gather(1, labels[:, None])[:, 0]
    return torch.stack((largest, (z - largest[:, None]).exp().sum(-1), nll))


def true_pair_stats(factual: Tensor, counterfactual: Tensor, labels: Tensor) -> Tensor:
    z1, z0 = factual.double(), counterfactual.double()
    streams = [true_token_stats(z, labels) for z in (z1, z0, z1 - z0)]
    log_p1, log_p0 = z1.log_softmax(-1), z0.log_softmax(-1)
    divergence = (log_p1.exp() * (log_p1 - log_p0)).sum(-1)
    entropy = -(log_p1.exp() * log_p1).sum(-1)
    return torch.cat((*streams, divergence[None], entropy[None]))


@dataclass
class Gradients:
    """A true gradient, and the sum of its terms' magnitudes, which rounding errors are compared with."""

    value: Tensor
    magnitude: Tensor


def true_token_grad(
    logits: Tensor, labels: Tensor, grad_nll: Tensor, softcap: float | None, logit_scale: float
) -> Gradients:
    return _through_cap(logits, [(grad_nll, logits.double())], labels, softcap, logit_scale)


def true_pair_grad(
    pair: Pair, softcap: float | None, logit_scale: float, with_counterfactual: bool = True
) -> tuple[Gradients, Gradients]:
    z1, z0 = pair.factual.double(), pair.counterfactual.double()
    own = [(pair.grad_counterfactual, z0)] if with_counterfactual else []
    return (
        _through_cap(z1, [(pair.grad_factual, z1), (pair.grad_effect, z1 - z0)], pair.labels, softcap, logit_scale),
        _through_cap(z0, [*own, (-pair.grad_effect, z1 - z0)], pair.labels, softcap, logit_scale),
    )


def _through_cap(
    logits: Tensor, terms: list[tuple[Tensor, Tensor]], labels: Tensor, softcap: float | None, logit_scale: float
) -> Gradients:
    onehot = torch.nn.functional.one_hot(labels, logits.shape[1])
    value, magnitude = torch.zeros_like(logits.double()), torch.zeros_like(logits.double())
    for grad, z in terms:
        value += grad.double()[:, None] * (z.softmax(-1) - onehot)
        magnitude += grad.double().abs()[:, None] * (z.softmax(-1) + onehot)
    cap = 1.0 if softcap is None else 1 - (logits.double() / softcap) ** 2
    return Gradients(value * logit_scale * cap, magnitude * abs(logit_scale))


def assert_gradient(actual: Tensor, expected: Gradients) -> None:
    """Assert an error of at most 1e-5 of the summed terms in each element, plus 1e-30."""
    error = (actual.double() - expected.value).abs()
    assert bool((error <= 1e-5 * expected.magnitude + 1e-30).all()), (error / (expected.magnitude + 1e-30)).max()


def token_grad_(
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad_nll: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Overwrite the logits with their gradient."""
    chunk_native.token_grad(logits, labels, stats, grad_nll, logits, softcap, logit_scale)
    return logits


def pair_grad_(
    logits: tuple[Tensor, Tensor],
    labels: Tensor,
    stats: Tensor,
    grad_nlls: tuple[Tensor, Tensor | None, Tensor],
    softcap: float | None = None,
    logit_scale: float = 1.0,
    detach: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Overwrite both logits with their gradient; only the first with `detach`."""
    outs = (logits[0], None if detach else logits[1])
    chunk_native.pair_grad(logits, labels, stats, grad_nlls, outs, softcap, logit_scale)
    return outs
