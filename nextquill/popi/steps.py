"""One step of POPI before its gradient: samples summaries, scores pairs under them, and weights every branch.

    1. pairs are drawn from every user, and signals that do not give them away
    2. the inference model samples a group of summaries from the signals
    3. the generator and the reference score the pairs under each summary              losses, and rewards = -mean loss
    4. the inference model and its initial state score the summaries                   KL, advantages
    5. the losses' derivatives and the advantages become the weights of log-probabilities

All of this needs no gradient and is done at once for all users of an optimizer step. `BranchPasses.loss` of the
weighted branches follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nextquill.data import Branch
from nextquill.errors import BudgetError
from nextquill.evaluation.results import finite
from nextquill.generation import Prompt
from nextquill.generation.rollouts import Rollouts, Sample, check_samples
from nextquill.popi.config import POPIConfig
from nextquill.popi.objective import PairLosses, advantages, generator_error, informativeness
from nextquill.popi.passes import RolePasses
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, tidy_summary
from nextquill.popi.roles import GENERATOR, INFERENCE, Roles
from nextquill.popi.users import Draw, Pair, User, draw
from nextquill.storage.fingerprints import seed_of

#: The names of a step's sums, in the order in which they are reduced over ranks.
METRICS = (
    "preference_loss", "preference_margin", "preference_accuracy", "informativeness", "generator_error", "reward",
    "reward_std", "reward_nan", "kl", "summary_tokens", "summaries_empty", "summaries_unfinished", "groups_equal",
    "summaries_too_long", "prompts_without_signals", "warm_start",
)  # fmt: skip


class Phase(NamedTuple):
    """Says which models a step trains, and whether the inference model learns from texts instead of rewards."""

    inference: bool
    generator: bool
    warm: bool


@dataclass
class UserWork:
    """One user's part of a step's gradient.

    Attributes:
        branches: the branches whose log-probabilities are weighted, by role.
        weights: float64 [branches], the weight of each -log p in the user's share of the loss, by role.
        loss: the user's mean preference loss over the finite ones, nats; NaN if none is.
        lines: the sampled summaries and their measures, for the log of summaries.
    """

    branches: dict[str, list[Branch]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    lines: list[dict[str, object]] = field(default_factory=list)


class Step(NamedTuple):
    """The work of a step's users in their order, and sums over them as (sum, count), by name."""

    work: list[UserWork]
    sums: dict[str, tuple[float, float]]


class _Losses(NamedTuple):
    """For each user the losses of its pairs, summary by summary; `swapped`: under another user's summary, if any."""

    own: list[PairLosses]
    swapped: list[PairLosses]


class StepMaker:
    """Makes steps. The same users, step number and weights give the same step, whatever their division into batches."""

    def __init__(
        self,
        roles: Roles,
        config: POPIConfig,
        inference_prompts: InferencePrompts,
        generator_prompts: GeneratorPrompts,
        rollouts: Rollouts,
        passes: RolePasses,
        seed: int,
    ) -> None:
        self.roles, self.config, self.rollouts, self.passes, self.seed = roles, config, rollouts, passes, seed
        self._infer, self._generate = inference_prompts, generator_prompts
        self._too_long = self._without_signals = 0  # counted for the present step

    def phase(self, step: int) -> Phase:
        """Return the phase of a step."""
        config = self.config
        inference, generator = not config.freeze_inference, not config.freeze_generator
        if config.update == "alternate" and inference and generator:
            generator = step // config.alternate_every % 2 == 0
            inference = not generator
        return Phase(inference, generator, inference and step < config.warm_start_steps)

    def make(self, users: Sequence[User], step: int) -> Step:
        """Make a step of this rank's users, up to its gradient; without users it has no work.

        The optimizer step's number from 0 decides draws, samples and phase.
        """
        if not users:
            return Step([], {})
        config, phase = self.config, self.phase(step)
        self._too_long = self._without_signals = 0
        draws = [self._draw(user, step) for user in users]
        groups = self._sample(users, draws, step, phase)
        texts = [[self._infer.summary(sample) for sample in group] for group in groups]
        read = [[self._read(text, each.pairs) for text in own] for each, own in zip(draws, texts, strict=True)]
        scored = self._score(draws, texts, read)
        mean_losses = [own.loss.view(-1, len(each.pairs)).mean(1) for own, each in zip(scored.own, draws, strict=True)]
        rewards = -torch.stack(mean_losses)  # float64 [users, K]
        branches = self._summary_branches(draws, groups) if phase.inference else []
        kl = self._kl(branches).view_as(rewards) if phase.inference and config.kl_coef > 0 else None
        lengths = torch.tensor([[len(s.ids) for s in group] for group in groups], dtype=torch.float64)
        unfinished = torch.tensor([[not s.ended for s in group] for group in groups], dtype=torch.float64)
        shaped = rewards - config.length_penalty * lengths - config.unfinished_penalty * unfinished
        shaped = shaped if kl is None else shaped - config.kl_coef * kl
        found = advantages(shaped, config.estimator if lengths.shape[1] > 1 else "reinforce")
        work = [UserWork() for _ in users]
        if phase.generator:
            self._weigh_pairs(work, read, scored)
        if phase.inference:
            values = self._warm_targets(shaped, groups) if phase.warm else found.values
            self._weigh_summaries(work, branches, groups, values, warm=phase.warm)
        for index, each in enumerate(work):
            total, count = _sum_of_finite(scored.own[index].loss)
            each.loss = total / count if count else math.nan
            each.lines = self._lines(step, draws[index], groups[index], rewards[index], found.values[index])
        sums = self._sums(groups, scored, rewards, kl, found.equal)
        return Step(work, sums | {"warm_start": (1, 1)} if phase.warm else sums)

    # ---- samples -----------------------------------------------------------------------------------

    def _draw(self, user: User, step: int) -> Draw:
        pairs, signals = self.config.pairs_per_user, self.config.signals_per_user
        seed = seed_of(self.seed, "draw", step, user.user_id)
        return draw(user, num_pairs=pairs, num_signals=signals, seed=seed)

    def _sample(self, users: Sequence[User], draws: Sequence[Draw], step: int, phase: Phase) -> list[list[Sample]]:
        """A group of sampled summaries for each user, or the single given summary."""
        if phase.warm and self.config.warm_start == "given":
            return [[self._given(user)] for user in users]
        size, prompts = self.config.group_size, list[Prompt]()
        for each in draws:
            ids, kept = self._infer.ids(each.signals)
            self._without_signals += not kept
            for place in range(size):
                seed = seed_of(self.seed, "summary", step, each.user_id, place)
                prompts.append(Prompt(len(prompts), ids, seed))
        self.passes.close()
        with self.roles.inference.active(), torch.no_grad():
            samples = self.rollouts.sample(prompts)
        check_samples(samples, len(prompts))
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def _read(self, summary: str, pairs: Sequence[Pair], *, counted: bool = True) -> list[Branch]:
        """The chosen and the rejected response of every pair under a summary, pair after pair.

        The summary is left out if it is empty or does not fit: its text, tokenised again, may have more tokens than
        were sampled.
        """
        try:
            return [branch for pair in pairs for branch in self._generate.branches(pair, summary=summary or None)]
        except BudgetError:
            self._too_long += counted
            return self._read("", pairs)

    def _given(self, user: User) -> Sample:
        assert user.summary is not None  # see `check_warm_start`
        return Sample(self._infer.summary_ids(user.summary), user.summary, ended=True)

    # ---- scores ------------------------------------------------------------------------------------

    def _score(
        self, draws: Sequence[Draw], texts: Sequence[Sequence[str]], read: Sequence[Sequence[list[Branch]]]
    ) -> _Losses:
        """The losses of every pair under every summary of its user, and under one summary of another user."""
        others = _other_users(draws)
        branches, reference = list[Branch](), list[Branch]()
        for each, own, other in zip(draws, read, others, strict=True):
            borrowed = [] if other is None else [self._read(texts[other][0], each.pairs, counted=False)]
            plain = self._read("", each.pairs)
            for under in [*own, *borrowed]:
                branches += under
                reference += under if self.config.reference_sees_summary else plain
        with self.roles.generator.active() as model:
            policy = self.passes.of(self.roles.generator, model).log_probs(branches).view(-1, 2)
        with self.roles.generator.initial() as model:
            distinct, places = _distinct(reference)
            initial = self.passes.of(self.roles.generator, model).log_probs(distinct)[places].view(-1, 2)
        lengths = torch.tensor([branch.response_length for branch in branches]).view(-1, 2)
        losses = self.config.loss(policy, initial, lengths)
        counts = [(len(own), int(other is not None)) for own, other in zip(read, others, strict=True)]
        sizes = [count * len(each.pairs) for each, both in zip(draws, counts, strict=True) for count in both]
        parts = [PairLosses(*part) for part in zip(*(values.split(sizes) for values in losses), strict=True)]
        return _Losses(parts[::2], parts[1::2])

    def _summary_branches(self, draws: Sequence[Draw], groups: Sequence[Sequence[Sample]]) -> list[Branch]:
        found = list[Branch]()
        for each, group in zip(draws, groups, strict=True):
            ids, _ = self._infer.ids(each.signals)
            found += [Branch(ids, sample.ids) for sample in group]
        return found

    def _kl(self, branches: Sequence[Branch]) -> Tensor:
        """log φ(s) - log φ_initial(s) of each summary, float64 [summaries]; its mean over samples is the KL."""
        role = self.roles.inference
        with role.active() as model:
            now = self.passes.of(role, model).log_probs(branches)
        with role.initial() as model:
            initial = self.passes.of(role, model).log_probs(branches)
        return now - initial

    # ---- weights -----------------------------------------------------------------------------------

    def _weigh_pairs(self, work: Sequence[UserWork], read: Sequence[Sequence[list[Branch]]], scored: _Losses) -> None:
        """Set the generator's weights: -∂(mean loss)/∂log p of every response under every summary of the group."""
        for own, groups, losses in zip(work, read, scored.own, strict=True):
            slopes = torch.stack((losses.chosen_slope, losses.rejected_slope), dim=1)
            slopes = torch.where(losses.loss.isfinite()[:, None], slopes, 0.0) / len(losses.loss)
            own.branches[GENERATOR] = [branch for under in groups for branch in under]
            own.weights[GENERATOR] = -slopes.reshape(-1)

    def _weigh_summaries(
        self,
        work: Sequence[UserWork],
        branches: Sequence[Branch],
        groups: Sequence[Sequence[Sample]],
        values: Tensor,
        *,
        warm: bool,
    ) -> None:
        """Set the inference model's weights: advantages over the group's size, or in the warm start 1 / tokens."""
        left = iter(branches)
        for own, group, weights in zip(work, groups, values, strict=True):
            scale = [1 / len(sample.ids) if warm else 1 / len(group) for sample in group]
            own.branches[INFERENCE] = [next(left) for _ in group]
            own.weights[INFERENCE] = weights * torch.tensor(scale, dtype=torch.float64)

    def _warm_targets(self, rewards: Tensor, groups: Sequence[Sequence[Sample]]) -> Tensor:
        """1 for the best summary of each group, 0 for the others and for those that are empty or did not end."""
        fit = torch.tensor([[each.ended and bool(tidy_summary(each.text)) for each in group] for group in groups])
        value = torch.where(fit & rewards.isfinite(), rewards, -torch.inf)
        best = torch.zeros_like(rewards).scatter_(1, value.argmax(1, keepdim=True), 1.0)
        return torch.where(value.isfinite(), best, 0.0)

    # ---- logs --------------------------------------------------------------------------------------

    def _sums(
        self, groups: Sequence[Sequence[Sample]], scored: _Losses, rewards: Tensor, kl: Tensor | None, equal: int
    ) -> dict[str, tuple[float, float]]:
        """The step's sums as (sum, count); `equal` is the number of groups with equal rewards."""
        log_choice, samples = self.config.loss.log_choice, [sample for group in groups for sample in group]
        margins = torch.cat([losses.margin for losses in scored.own])
        estimates = [  # each summary of the group against one of another user
            float(informativeness(log_choice(own.margin), log_choice(swapped.margin).repeat(len(group))[:, None]))
            for group, own, swapped in zip(groups, scored.own, scored.swapped, strict=True)
            if len(swapped.margin)
        ]
        counts = {
            "summary_tokens": sum(len(sample.ids) for sample in samples),
            "summaries_empty": sum(not tidy_summary(sample.text) for sample in samples),
            "summaries_unfinished": sum(not sample.ended for sample in samples),
            "summaries_too_long": self._too_long,
        }
        sums: dict[str, tuple[float, float]] = {
            "preference_loss": _sum_of_finite(torch.cat([losses.loss for losses in scored.own])),
            "preference_margin": _sum_of_finite(margins),
            "preference_accuracy": _sum_of_finite((margins > 0).double() + 0.5 * (margins == 0)),
            "informativeness": _sum_of_finite(torch.tensor(estimates, dtype=torch.float64)),
            "generator_error": _sum_of_finite(generator_error(log_choice(margins))),
            "reward": _sum_of_finite(rewards),
            "reward_nan": (float((~rewards.isfinite()).sum()), 1),
            "prompts_without_signals": (self._without_signals, len(groups)),
            **{name: (count, len(samples)) for name, count in counts.items()},
        }
        if rewards.shape[1] > 1:
            sums |= {"reward_std": _sum_of_finite(rewards.std(1)), "groups_equal": (equal, len(groups))}
        return sums if kl is None else sums | {"kl": _sum_of_finite(kl)}

    def _lines(
        self, step: int, each: Draw, group: Sequence[Sample], rewards: Tensor, weights: Tensor
    ) -> list[dict[str, object]]:
        return [
            {
                "step": step,
                "user_id": each.user_id,
                "summary": self._infer.summary(sample),
                "tokens": len(sample.ids),
                "ended": sample.ended,
                "reward": finite(round(float(reward), 6)),
                "advantage": finite(round(float(weight), 6)),
                "pairs": len(each.pairs),
                "signals": len(each.signals),
            }
            for sample, reward, weight in zip(group, rewards, weights, strict=True)
        ]


def _other_users(draws: Sequence[Draw]) -> list[int | None]:
    """For each place the next place with another user, or None."""
    count, own = len(draws), [each.user_id for each in draws]
    following = [(*range(place + 1, count), *range(place)) for place in range(count)]
    return [next((other for other in following[i] if own[other] != own[i]), None) for i in range(count)]


def _distinct(branches: Sequence[Branch]) -> tuple[list[Branch], Tensor]:
    """The different objects among these branches, and the place of each branch among them."""
    distinct = {id(branch): branch for branch in branches}
    places = {key: place for place, key in enumerate(distinct)}
    return list(distinct.values()), torch.tensor([places[id(branch)] for branch in branches])


def _sum_of_finite(values: Tensor) -> tuple[float, int]:
    finite = values[values.isfinite()]
    return float(finite.sum()), len(finite)
