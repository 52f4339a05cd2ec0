"""The preference objective of POPI (arXiv 2510.17881), and what its value is made of.

A summary s ~ φ(· | d) of a user's signals d stands between them and the generator θ. For a request x, of whose two
responses the user prefers y⁺ to y⁻, both models share one loss,

    min_{θ, φ}  E_{s ~ φ(·|d)}  L(θ; x, s, y⁺, y⁻)

    r       = [log π_θ(y⁺|x,s) - log π_ref(y⁺|x)] - [log π_θ(y⁻|x,s) - log π_ref(y⁻|x)]           (nats)
    L_DPO   = -log σ(β r)                                               (arXiv 2305.18290)
    L_IPO   = (r - 1 / (2β))²      r of means per token, as TRL has it        (arXiv 2310.12036, eq. 17)

The reference is the initial generator *without* the summary, so a log-ratio holds what the summary does to the
response: with θ not trained at all, log π(y|x,s) - log π(y|x) is the summary's causal effect and nothing else.
`reference_sees_summary` gives it the summary instead, and the log-ratio then holds what training did.

Under DPO, σ(β r) is the probability q_θ(y⁺ ≻ y⁻ | x, s) that the generator gives to the user's choice c. With p for
how users really choose, the expected loss is a cross-entropy and falls into two parts,

    E L  =  H_p(c | x, y, s)   +   E_s KL( p(c | x, y, s) ‖ q_θ(c | x, y, s) )
         =  H_p(c | x, y) - I(c; s | x, y)   +   generator's approximation error

The first term is what summaries can change: it falls by what they say about the choice. The second is what the
generator can change. One loss drives both: φ has no other way to lower it than to be informative, as far as θ reads it.

Neither part is known without p, so two estimates are logged, and they are exact where the generator is calibrated:

    informativeness  =  E[ log q_θ(c | x, s) - log mean_s' q_θ(c | x, s') ]     s' of this user and of others
    generator_error  =  E[ L - H(q_θ(· | x, s)) ]        0 if calibrated, above if overconfident, below if timid
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nextquill.errors import ArgumentError

KINDS = ("dpo", "ipo")


class PairLosses(NamedTuple):
    """Each pair's loss, and what a forward with gradient needs of it. All float64 [pairs].

    Attributes:
        loss: [pairs], L; no unit.
        margin: [pairs], r in nats.
        chosen_slope, rejected_slope: [pairs], dL/dlog π of y⁺ and y⁻, per nat: what the log-probability of each of the
            response's tokens is weighted with.
    """

    loss: Tensor
    margin: Tensor
    chosen_slope: Tensor
    rejected_slope: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """L of log-probabilities; see this module's text for the formulas.

    Args:
        kind: "dpo" or "ipo".
        beta: β of DPO, the τ of IPO; above 0.
        average: divide each response's log-probability by its tokens first. None is the kind's own: IPO does, DPO does
            not.

    Raises:
        ArgumentError: an argument has an unusable value.
    """

    kind: str = "dpo"
    beta: float = 0.1
    average: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ArgumentError(f"beta: expected a number above 0, got {self.beta}")

    @property
    def averages(self) -> bool:
        """Whether log-probabilities are means over tokens."""
        return self.kind == "ipo" if self.average is None else self.average

    def __call__(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> PairLosses:
        """The loss of each pair.

        Args:
            policy: floating [pairs, 2], log π_θ(y⁺|x,s) and log π_θ(y⁻|x,s), sums over tokens in nats.
            reference: [pairs, 2], the same of the reference.
            lengths: integers [pairs, 2], tokens of y⁺ and y⁻.
        """
        scale = 1 / lengths.double() if self.averages else torch.ones_like(lengths, dtype=torch.float64)
        with torch.enable_grad():
            log_probs = policy.detach().double().requires_grad_()
            ratios = (log_probs - reference.double()) * scale
            margin = ratios[:, 0] - ratios[:, 1]
            loss = self._of_margin(margin)
            (slopes,) = torch.autograd.grad(loss.sum(), log_probs)
        return PairLosses(loss.detach(), margin.detach(), slopes[:, 0], slopes[:, 1])

    def _of_margin(self, margin: Tensor) -> Tensor:
        if self.kind == "dpo":
            return -logsigmoid(self.beta * margin)
        return (margin - 1 / (2 * self.beta)).square()

    def log_choice(self, margin: Tensor) -> Tensor:
        """log q(y⁺ ≻ y⁻) = log σ(β r), the Bradley-Terry probability of the user's choice; for IPO a reading of r.

        Args:
            margin: floating, any shape, r in nats.

        Returns:
            float64, in the shape of `margin`, in nats.
        """
        return logsigmoid(self.beta * margin.double())


def informativeness(own: Tensor, others: Tensor) -> Tensor:
    """What a user's summary says about the user's choices, in nats per pair, by the generator's own probabilities.

        Î  =  mean_pairs [ log q(c | x, s) - log q̄(c | x) ],    q̄(c | x) = mean over summaries of q(c | x, ·)

    the plug-in estimate of I_q(c; s | x, y), with q̄ over the user's own summary and those of `others`; 0 where all
    summaries lead to the same choice. If q is the truth its mean is at least 0 and at most log(1 + number of others).

    Args:
        own: floating [pairs], log q under a summary of the user's own, in nats.
        others: floating [pairs, others], log q under summaries of other users, in nats.

    Returns:
        A float64 scalar, in nats per pair.
    """
    every = torch.cat((own[:, None], others), dim=1).double()
    mixture = every.logsumexp(1) - math.log(every.shape[1])
    return (own.double() - mixture).mean()


def generator_error(log_choice: Tensor) -> Tensor:
    """By how much the loss of each pair exceeds what the generator itself expects of it, float64 [pairs], nats.

        -log q(c) - H(q),    H(q) = -q log q - (1-q) log(1-q)

    Its mean over pairs, E_p[-log q] - H(q), is 0 for a calibrated q. It is a part of the approximation error and no
    bound of all of it: a generator that says ½ to everything is calibrated, and its error is then in what it fails to
    use.

    Args:
        log_choice: floating [pairs], log q of the user's choice, in nats.
    """
    log_q = log_choice.double().clamp(max=0)
    q = log_q.exp()
    entropy: Tensor = torch.special.entr(q) + torch.special.entr(1 - q)  # 0 log 0 is 0
    return -log_q - entropy
