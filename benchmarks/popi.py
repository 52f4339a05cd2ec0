"""Suite `popi`: a step of POPI without sampling, with shared prefixes against a padded row per prompt.

A step computes rewards, KL and both gradients. Every pair is scored under every summary of its user's group, so the
same prompts are read K · P times. In trees, a user's signals are computed once for a group, and a summary once for all
pairs. The summaries are given, as the speed of sampling depends on transformers or vLLM.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import GateError, Options, Row, make_row, ratios, time_in_turns
from benchmarks.prepare import make_tokenizer
from nextquill.generation import Prompt
from nextquill.generation.rollouts import Sample
from nextquill.models.tiny_models import ScratchSize, build_model
from nextquill.popi import GeneratorPrompts, InferencePrompts, Pair, POPIConfig, Roles, User
from nextquill.popi.passes import RolePasses
from nextquill.popi.steps import StepMaker

BASELINE, TREES = "a row per prompt", "shared prefixes"
#: Users per step; summaries, pairs and signals per user; words in a query, a response and a summary.
SHAPES = {
    "K=4, P=4": (2, 4, 4, 6, (8, 20, 12)),
    "K=8, P=4": (2, 8, 4, 6, (8, 20, 12)),
}
QUICK = {"K=2, P=2": (2, 2, 2, 2, (3, 4, 3))}
_TOLERANCE = 1e-3


class Given:
    """Rollouts that return given summaries."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return [self._samples[prompt.index % len(self._samples)] for prompt in prompts]

    def sync(self) -> None: ...

    def close(self) -> None: ...


class PopiStep:
    """One step with one layout; a call runs it and keeps its gradients."""

    def __init__(self, roles: Roles, steps: StepMaker, passes: RolePasses, users: Sequence[User]) -> None:
        self.roles, self._steps, self._passes, self._users = roles, steps, passes, users
        self.tokens = 0

    def __call__(self) -> None:
        self.tokens = 0
        self.roles.zero_grad()
        work = self._steps.make(self._users, 0).work
        for role in self.roles:
            branches = [branch for own in work for branch in own.branches[role.name]]
            weights = torch.cat([own.weights[role.name] for own in work]) / len(work)
            with role.active() as model:
                passes = self._passes.of(role, model)
                for part in passes.parts(branches, weights):
                    self.tokens += part["num_tokens"]
                    passes.loss(part).backward()
        self._passes.close()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.roles.named_parameters() if p.grad is not None}


def run(options: Options) -> list[Row]:
    """Check that both layouts give the same gradients, then time them."""
    rows: list[Row] = []
    for case, shape in (QUICK if options.quick else SHAPES).items():
        steps = make_steps(*shape, quick=options.quick)
        _gate(case, steps)
        budget = None if options.budget is None else options.budget / len(SHAPES)
        seconds = time_in_turns(steps, options.rounds, budget=budget)
        for name, values in ratios(seconds, BASELINE).items():
            rows.append(make_row("popi", case, name, "time", "x", values, BASELINE, device="cpu"))
            rows.append(make_row("popi", case, name, "tokens", "tokens", [float(steps[name].tokens)], device="cpu"))
        options.save(rows)
    return rows


def make_steps(
    users: int, summaries: int, pairs: int, signals: int, words: tuple[int, int, int], *, quick: bool = False
) -> dict[str, PopiStep]:
    """The same step with both layouts and the same models."""
    from peft import LoraConfig

    tokenizer, rng = make_tokenizer(300 if quick else 2000), random.Random(0)
    size = ScratchSize(len(tokenizer), *((32, 2, 1, 64) if quick else (128, 4, 4, 384)))
    model = build_model(size, 0, vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    roles = Roles.shared(model, tokenizer, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    config = POPIConfig(
        group_size=summaries, pairs_per_user=pairs, signals_per_user=signals, max_summary_tokens=4 * words[2],
        beta=1.0, max_length=4096, max_signal_tokens=4096,
    )  # fmt: skip
    query, response, summary = words
    people = [
        User(
            f"user {number}",
            tuple(
                Pair(_words(rng, query), _words(rng, response), _words(rng, response)) for _ in range(pairs + signals)
            ),
        )
        for number in range(users)
    ]
    texts = [_words(rng, summary) for _ in range(summaries)]
    inference, generator = (
        InferencePrompts(tokenizer, max_prompt_tokens=4096),
        GeneratorPrompts(tokenizer, max_length=4096),
    )
    samples = [Sample(inference.summary_ids(text), text, ended=True) for text in texts]
    found = {}
    for name, attention in ((BASELINE, "padded"), (TREES, "auto")):
        passes = RolePasses(attention=attention, max_tokens=None, temperature=1.0)
        steps = StepMaker(roles, config, inference, generator, Given(samples), passes, seed=0)
        found[name] = PopiStep(roles, steps, passes, people)
    return found


def _words(rng: random.Random, count: int) -> str:
    syllables = ("ba", "ne", "ti", "lo", "ru", "sha", "mi", "to")
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))


def _gate(case: str, steps: dict[str, PopiStep]) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for name, step in steps.items():
        step()
        found[name] = step.gradients()
    largest = max(float(tensor.norm()) for tensor in found[BASELINE].values())
    for name, expected in found[BASELINE].items():
        error = float((found[TREES][name] - expected).norm()) / max(float(expected.norm()), 1e-2 * largest)
        if not error <= _TOLERANCE:
            raise GateError(f"popi: {case}: the gradient of {name} differs by {error:.1e} between the layouts")
