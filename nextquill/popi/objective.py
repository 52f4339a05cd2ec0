"""The objective of POPI (arXiv 2510.17881): its preference loss, the parts of the loss, and the gradient of summaries.

The inference model φ writes a summary s ~ φ(· | d) of a user's signals d, and the generator θ reads it. Of two
responses to a request x, the user prefers y⁺ to y⁻. Both models share one loss,

    min_{θ, φ}  E_{s ~ φ(·|d)}  L(θ; x, s, y⁺, y⁻)

    r       = [log π_θ(y⁺|x,s) - log π_ref(y⁺|x)] - [log π_θ(y⁻|x,s) - log π_ref(y⁻|x)]           (nats)
    L_DPO   = -log σ(β r)                                               (arXiv 2305.18290)
    L_IPO   = (r - 1 / (2β))²      r of means per token, as TRL has it        (arXiv 2310.12036, eq. 17)

The reference is the initial generator *without* the summary, so a log-ratio contains the summary's effect on the
response: for an untrained θ, log π(y|x,s) - log π(y|x) is exactly the summary's causal effect.
`reference_sees_summary` gives the reference the summary too; then the log-ratio contains the effect of training alone.

Under DPO, σ(β r) is the probability q_θ(y⁺ ≻ y⁻ | x, s) that the generator gives to the user's choice c. Let p be the
true distribution of choices. The expected loss is a cross-entropy with two parts,

    E L  =  H_p(c | x, y, s)   +   E_s KL( p(c | x, y, s) ‖ q_θ(c | x, y, s) )
         =  H_p(c | x, y) - I(c; s | x, y)   +   generator's approximation error

Summaries change the first part: it falls by the information that they hold about the choice. The generator changes the
second. So the only way for φ to lower the loss is to be informative, as far as θ uses the information.

Neither part is known without p, so two estimates are logged. They are exact if the generator is calibrated:

    informativeness  =  E[ log q_θ(c | x, s) - log mean_s' q_θ(c | x, s') ]     s' of this user and of others
    generator_error  =  E[ L - H(q_θ(· | x, s)) ]        0 if calibrated, above if overconfident, below if timid

The gradient of the expected reward of summaries, E[R], is estimated from a group s_1 … s_K ~ φ of one user:

    g = 1/K Σ_k A_k ∇ log φ(s_k | d)

    reinforce   A_k = R_k                                       unbiased
    rloo        A_k = R_k - mean_{j≠k} R_j                      unbiased, with less variance     (arXiv 2402.14740)
    grpo        A_k = (R_k - mean R) / (std R + ε)              biased by its scale              (arXiv 2402.03300)

Leave-one-out is unbiased because the baseline of s_k is made from the others, which are independent of it. The mean in
GRPO contains R_k, which shrinks the gradient by (K-1)/K. Its division by the group's deviation gives groups whose
summaries hardly differ the same weight as all others. Log-probabilities are sums over tokens: means over tokens would
optimize another objective (arXiv 2503.20783).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nextquill.errors import ArgumentError
from nextquill.weighting import check_number

KINDS = ("dpo", "ipo")
ESTIMATORS = ("rloo", "grpo", "reinforce")
_EPSILON = 1e-4  # of GRPO's division


class PairLosses(NamedTuple):
    """The loss of each pair, and its derivatives. All float64 [pairs].

    Attributes:
        loss: [pairs], L; no unit.
        margin: [pairs], r in nats.
        chosen_slope, rejected_slope: [pairs], dL/dlog π of y⁺ and y⁻, per nat: the weight of the log-probability of
            each token of the response in a forward with gradient.
    """

    loss: Tensor
    margin: Tensor
    chosen_slope: Tensor
    rejected_slope: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """The preference loss L; the module's text has the formulas.

    Args:
        kind: "dpo" or "ipo".
        beta: β of DPO, τ of IPO; above 0.
        average: whether each response's log-probability is first divided by its number of tokens; by default for IPO
            only.

    Raises:
        ArgumentError: an argument is out of range.
    """

    kind: str = "dpo"
    beta: float = 0.1
    average: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        check_number("beta", self.beta, above=0.0)

    @property
    def averages(self) -> bool:
        """Whether log-probabilities are means over tokens."""
        return self.kind == "ipo" if self.average is None else self.average

    def __call__(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> PairLosses:
        """Compute the loss of each pair.

        Args:
            policy: floating [pairs, 2], log π_θ(y⁺|x,s) and log π_θ(y⁻|x,s), sums over tokens in nats.
            reference: [pairs, 2], the same for the reference.
            lengths: integers [pairs, 2], the numbers of tokens of y⁺ and y⁻.
        """
        scale = 1 / lengths.double() if self.averages else torch.ones_like(lengths, dtype=torch.float64)
        with torch.enable_grad():
            log_probs = policy.detach().double().requires_grad_()
            ratios = (log_probs - reference.double()) * scale
            margin = ratios[:, 0] - ratios[:, 1]
            is_dpo = self.kind == "dpo"
            loss = -logsigmoid(self.beta * margin) if is_dpo else (margin - 1 / (2 * self.beta)).square()
            (slopes,) = torch.autograd.grad(loss.sum(), log_probs)
        return PairLosses(loss.detach(), margin.detach(), slopes[:, 0], slopes[:, 1])

    def log_choice(self, margin: Tensor) -> Tensor:
        """Return log q(y⁺ ≻ y⁻) = log σ(β r), the Bradley-Terry log-probability of the user's choice.

        Args:
            margin: floating, any shape, r in nats.

        Returns:
            float64, in the shape of `margin`, in nats.
        """
        return logsigmoid(self.beta * margin.double())


def informativeness(own: Tensor, others: Tensor) -> Tensor:
    """Estimate how much a user's summary says about the user's choices, by the generator's own probabilities.

        Î  =  mean_pairs [ log q(c | x, s) - log q̄(c | x) ],    q̄(c | x) = mean over summaries of q(c | x, ·)

    the plug-in estimate of I_q(c; s | x, y), with q̄ over the user's own summary and those of `others`. It is 0 if all
    summaries lead to the same choice. If q is the truth, its mean lies between 0 and log(1 + number of others).

    Args:
        own: floating [pairs], log q under a summary of the user, in nats.
        others: floating [pairs, others], log q under summaries of other users, in nats.

    Returns:
        A float64 scalar, in nats per pair.
    """
    every = torch.cat((own[:, None], others), dim=1).double()
    mixture = every.logsumexp(1) - math.log(every.shape[1])
    return (own.double() - mixture).mean()


def generator_error(log_choice: Tensor) -> Tensor:
    """Return the loss of each pair minus the loss that the generator itself expects, float64 [pairs], nats.

        -log q(c) - H(q),    H(q) = -q log q - (1-q) log(1-q)

    Its mean over pairs, E_p[-log q] - H(q), is 0 for a calibrated q. It is a part of the approximation error and does
    not bound the whole: a generator that always answers ½ is calibrated, and its error is the information that it does
    not use.

    Args:
        log_choice: floating [pairs], log q of the user's choice, in nats.
    """
    log_q = log_choice.double().clamp(max=0)
    q = log_q.exp()
    entropy: Tensor = torch.special.entr(q) + torch.special.entr(1 - q)  # 0 log 0 is 0
    return -log_q - entropy


# ---- the gradient of summaries ----------------------------------------------------------------------


class Advantages(NamedTuple):
    """The weights of summaries' log-probabilities, and the number of rewards and groups that teach nothing.

    Attributes:
        values: float64 [groups, K]; 0 for a reward that is not finite.
        not_finite: the number of rewards that are NaN or infinite.
        equal: the number of groups in which all rewards are equal; only `reinforce` learns from these.
    """

    values: Tensor
    not_finite: int
    equal: int


def advantages(rewards: Tensor, estimator: str = "rloo") -> Advantages:
    """Compute the weights A_k of each group; the module's text has the formulas.

    A reward that is not finite is ignored: its weight is 0, and the baselines of the others are made without it.

    Args:
        rewards: floating [groups, K], in any unit.
        estimator: "rloo", "grpo" or "reinforce".

    Returns:
        The weights, float64 [groups, K] in the unit of the rewards (no unit for "grpo"), and two counts.

    Raises:
        ArgumentError: the estimator is unknown, or a group of one has no others to make a baseline from.
    """
    if estimator not in ESTIMATORS:
        raise ArgumentError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if rewards.dim() != 2:
        raise ArgumentError(f"rewards: expected [groups, K], got shape {list(rewards.shape)}")
    if estimator != "reinforce" and rewards.shape[1] < 2:
        raise ArgumentError(f"group_size: expected at least 2 for {estimator}, got {rewards.shape[1]}")
    finite = rewards.isfinite()
    values = torch.where(finite, rewards.double(), 0.0)
    count = finite.sum(1, keepdim=True)
    total = values.sum(1, keepdim=True)
    highest = torch.where(finite, values, -torch.inf).amax(1)
    lowest = torch.where(finite, values, torch.inf).amin(1)
    equal = highest <= lowest  # also without any finite reward
    if estimator == "reinforce":
        found = values
    elif estimator == "rloo":
        found = values - (total - values) / (count - 1).clamp(min=1)
    else:
        centred = torch.where(finite, values - total / count.clamp(min=1), 0.0)
        deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        found = centred / (deviation + _EPSILON)
    if estimator != "reinforce":
        # Equal rewards may differ by rounding, which GRPO would scale up to a signal.
        found = torch.where(equal[:, None] | (count < 2), 0.0, found)
    return Advantages(torch.where(finite, found, 0.0), int((~finite).sum()), int(equal.sum()))
