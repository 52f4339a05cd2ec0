"""The whole path, from sampling to the gradient of an adapter, against the exact gradient.

A summary of one token has as many values as the vocabulary has words, so the expected reward and its gradient can be
summed over all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextquill.data import Branch
from nextquill.generation.rollouts import Sample
from nextquill.popi import POPITrainer, User
from nextquill.popi.prompts import tidy_summary
from tests.popi.popi_helpers import WORDS, make_trainer, make_users

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
# Beta is large, so that summaries differ in their rewards.
CONFIG = {
    "max_summary_tokens": 1, "pairs_per_user": 3, "signals_per_user": 2, "group_size": 4, "kl_coef": 0.05, "beta": 2.0,
    "length_penalty": 0.1, "unfinished_penalty": 0.3, "temperature": 1.3, "rollout_batch_size": 512,
}  # fmt: skip
STEPS = 80


def one_user() -> User:
    """A user whose pairs are always all drawn, and whose signals are always all items."""
    return make_users(1, pairs=3, items=2)[0]


def trainer_of(folder: Path, **config: Any) -> POPITrainer:
    trainer = make_trainer(folder, {**CONFIG, **config}, train_dataset=[one_user()])
    with torch.no_grad():  # away from the start, at which the adapters have no effect
        for name, parameter in trainer.roles.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return trainer


def policy(trainer: POPITrainer, *, initial: bool = False) -> Tensor:
    """The log φ of every one-token summary, float [V], with gradient, in plain PyTorch."""
    draw = trainer.steps._draw(one_user(), 0)
    ids, _ = trainer.inference_prompts.ids(draw.signals)
    role = trainer.roles.inference
    with role.initial() if initial else role.active() as model:
        logits = model(torch.tensor([ids])).logits[0, -1]
    return (logits.double() / CONFIG["temperature"]).log_softmax(0)


def rewards(trainer: POPITrainer) -> Tensor:
    """The reward of every one-token summary without the KL, float64 [V], from separate forwards."""
    user, tokenizer = one_user(), trainer.processing_class

    def log_prob(model: Any, branch: Branch) -> float:
        ids, size = torch.tensor([branch.input_ids]), branch.response_length
        with torch.no_grad():
            logits = model(ids).logits[0, -size - 1 : -1].double().log_softmax(-1)
        return float(logits.gather(1, ids[0, -size:, None]).sum())

    found = []
    for token in range(len(WORDS)):
        text = tidy_summary(tokenizer.decode([token] if token != 1 else [], skip_special_tokens=True))
        total = 0.0
        for pair in user.pairs:
            own = trainer.generator_prompts.branches(pair, summary=text or None)
            plain = trainer.generator_prompts.branches(pair)
            with trainer.roles.generator.active() as model:
                yes, no = (log_prob(model, branch) for branch in own)
            with trainer.roles.generator.initial() as model:
                ref_yes, ref_no = (log_prob(model, branch) for branch in plain)
            margin = torch.tensor((yes - ref_yes) - (no - ref_no), dtype=torch.float64)
            total += float(torch.nn.functional.logsigmoid(CONFIG["beta"] * margin))
        ended = token == 1
        found.append(total / len(user.pairs) - CONFIG["length_penalty"] - CONFIG["unfinished_penalty"] * (not ended))
    return torch.tensor(found, dtype=torch.float64)


def exact_gradient(trainer: POPITrainer) -> dict[str, Tensor]:
    """The gradient of E[reward] - kl_coef · KL(φ ‖ φ_initial)."""
    value = rewards(trainer)
    log_p = policy(trainer)
    with torch.no_grad():
        reference = policy(trainer, initial=True)
    trainer.roles.zero_grad()
    (log_p.exp() * (value - CONFIG["kl_coef"] * (log_p - reference))).sum().backward()
    found = {name: p.grad.clone() for name, p in trainer.roles.named_parameters() if p.grad is not None}
    trainer.roles.zero_grad()
    return found


def estimate(trainer: POPITrainer, step: int) -> dict[str, Tensor]:
    """The ascent direction that one step takes."""
    trainer.roles.zero_grad()
    work = trainer.steps.make([one_user()], step).work
    trainer._backward(trainer.roles.inference, work, 1.0)
    return {name: -p.grad for name, p in trainer.roles.named_parameters() if p.grad is not None}


def along(gradient: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    return float(
        sum((gradient[name].double() * direction[name].double()).sum() for name in direction if name in gradient)
    )


@pytest.mark.slow
def test_the_mean_of_many_steps_is_the_exact_gradient(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    exact = exact_gradient(trainer)
    size = along(exact, exact)
    assert size > 0
    # Along the exact gradient, the mean must be its squared length. The other direction is random.
    torch.manual_seed(0)
    random = {
        name: torch.randn_like(tensor) * float(tensor.norm()) / tensor.numel() ** 0.5 for name, tensor in exact.items()
    }
    found = [estimate(trainer, step) for step in range(STEPS)]
    for direction in (exact, random):
        values = torch.tensor([along(each, direction) for each in found], dtype=torch.float64)
        error = float(values.std() / STEPS**0.5)
        expected = along(exact, direction)
        assert abs(float(values.mean()) - expected) < 3.5 * error
    # The test distinguishes the gradient from 0 and from twice the gradient.
    values = torch.tensor([along(each, exact) for each in found], dtype=torch.float64)
    assert float(values.std() / STEPS**0.5) < size / 6


class EveryWord:
    """Rollouts of all one-token summaries, each once. An estimate from them, weighted by φ, has no noise."""

    def sample(self, prompts: Any) -> list[Sample]:
        words = [*WORDS]
        return [
            Sample([place], "" if word in ("</s>", "<pad>", "<unk>") else word, ended=place == 1)
            for place, word in zip(range(len(prompts)), words, strict=True)
        ]

    def sync(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.covering(1)
@pytest.mark.parametrize("reference_sees_summary", [False, True])
@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_rewards_are_those_of_forwards_one_by_one(tmp_path: Path, attention: str, reference_sees_summary: bool) -> None:
    config = {**CONFIG, "group_size": len(WORDS), "kl_coef": 0.05, "reference_sees_summary": reference_sees_summary}
    trainer = make_trainer(tmp_path, config, train_dataset=[one_user()], rollouts=EveryWord(), attention=attention)
    with torch.no_grad():
        for name, parameter in trainer.roles.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    (own,) = trainer.steps.make([one_user()], 0).work
    found = torch.tensor([line["reward"] for line in own.lines], dtype=torch.float64)  # without penalties and KL
    penalties = CONFIG["length_penalty"] + CONFIG["unfinished_penalty"] * torch.tensor([w != "</s>" for w in WORDS])
    expected = rewards(trainer) + penalties
    if reference_sees_summary:
        assert float((found - expected)[3:].abs().min()) > 1e-4  # the reference reads the summary as well
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_every_samples_weight_is_its_advantage(tmp_path: Path) -> None:
    """Leave-one-out of reward - penalties - kl_coef · (log φ - log φ_initial), over the group's size."""
    trainer = make_trainer(
        tmp_path, {**CONFIG, "group_size": len(WORDS)}, train_dataset=[one_user()], rollouts=EveryWord()
    )
    with torch.no_grad():
        for name, parameter in trainer.roles.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        shaped = rewards(trainer) - CONFIG["kl_coef"] * (policy(trainer) - policy(trainer, initial=True))
    (own,) = trainer.steps.make([one_user()], 0).work
    count = len(WORDS)
    expected = (shaped - (shaped.sum() - shaped) / (count - 1)) / count
    torch.testing.assert_close(own.weights["inference"], expected, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_leave_one_out_is_less_noisy_than_reinforce_on_the_model(tmp_path: Path) -> None:
    spread = {}
    for estimator in ("rloo", "reinforce"):
        trainer = trainer_of(tmp_path, estimator=estimator)
        exact = exact_gradient(trainer)
        found = [estimate(trainer, step) for step in range(24)]
        mean = {name: torch.stack([each[name] for each in found]).mean(0) for name in exact}
        spread[estimator] = sum(along(d := {n: e[n] - mean[n] for n in exact}, d) for e in found)
    assert spread["rloo"] < 0.8 * spread["reinforce"]


def test_the_generators_step_is_the_gradient_of_the_mean_loss(tmp_path: Path) -> None:
    """For every summary of the group and every pair, against autograd over separate forwards."""
    trainer = trainer_of(tmp_path, group_size=3)
    user, role = one_user(), trainer.roles.generator
    (own,) = trainer.steps.make([user], 0).work
    texts = [str(line["summary"]) for line in own.lines]

    def log_prob(model: Any, branch: Branch) -> Tensor:
        ids, size = torch.tensor([branch.input_ids]), branch.response_length
        logits = model(ids).logits[0, -size - 1 : -1].log_softmax(-1)
        return logits.gather(1, ids[0, -size:, None]).sum()

    trainer.roles.zero_grad()
    losses = []
    for text in texts:
        for pair in user.pairs:
            branches = trainer.generator_prompts.branches(pair, summary=tidy_summary(text) or None)
            plain = trainer.generator_prompts.branches(pair)
            with role.initial() as model:
                reference = [log_prob(model, branch) for branch in plain]
            with role.active() as model:
                yes, no = (log_prob(model, branch) for branch in branches)
            losses.append(-torch.nn.functional.logsigmoid(CONFIG["beta"] * (yes - no - reference[0] + reference[1])))
    torch.stack(losses).mean().backward()
    expected = {name: p.grad.clone() for name, p in trainer.roles.named_parameters() if p.grad is not None}
    trainer.roles.zero_grad()
    trainer._backward(role, [own], 1.0)
    found = {name: p.grad for name, p in trainer.roles.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(".generator." in name for name in found)
    for name, want in expected.items():
        error = float((found[name] - want).norm() / want.norm().clamp(min=1e-4))
        assert error < 2e-4, f"{name}: relative error {error:.1e}"
    assert own.loss == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
    trainer.roles.zero_grad()
    trainer._backward(role, [own], 2.0)  # as one of a step's two users
    parameters = dict(trainer.roles.named_parameters())
    for name, whole in found.items():
        torch.testing.assert_close(parameters[name].grad, whole / 2)
