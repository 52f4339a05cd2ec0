"""POPI's training: the same gradient for any division of a step, exact resume, and the effect of each setting."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextquill.data import HistoryItem
from nextquill.errors import ArgumentError, ArgumentTypeError, BudgetError, CheckpointError, NonFiniteError, RecordError
from nextquill.generation.rollouts import RecordedRollouts, RecordingRollouts, Sample
from nextquill.popi import Pair, POPIConfig, POPITrainer, Roles, User
from nextquill.popi.passes import BranchPasses
from nextquill.popi.steps import StepMaker
from nextquill.training.finite import FiniteGuard
from tests.models.model_helpers import tiny_model as any_model
from tests.popi.popi_helpers import (
    CONFIG,
    TEMPLATES,
    WORDS,
    logs_of,
    lora,
    make_trainer,
    make_users,
    summaries_of,
    tiny_model,
    trained_weights,
    word_tokenizer,
)
from tests.sharding import CHECKPOINTING

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)


SGD = {"optim": "sgd", "learning_rate": 0.3}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = float((found[name] - want).norm() / want.norm().clamp(min=1e-3))
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def run(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> POPITrainer:
    trainer = make_trainer(folder, config, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[POPITrainer, Path]:
    """Four steps of four users in one micro-batch."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, per_device_train_batch_size=4, save_strategy="steps", save_steps=2), folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[POPITrainer, Path]:
    """The same with an optimiser that does not divide by the gradient's size, which would magnify rounding."""
    folder = tmp_path_factory.mktemp("plain")
    return run(folder, per_device_train_batch_size=4, **SGD), folder


@pytest.mark.parametrize(
    "split",
    [
        pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "max_tokens": 40},
        pytest.param({"per_device_train_batch_size": 4, "attention": "padded"}, marks=pytest.mark.slow),
        pytest.param({"per_device_train_batch_size": 4, "attention": "mask"}, marks=pytest.mark.slow),
        {"per_device_train_batch_size": 4, CHECKPOINTING: True},
    ],
    ids=["2x2", "4x1", "max_tokens", "padded", "mask", "checkpointing"],
)
def test_no_split_and_no_layout_changes_what_is_learnt(
    plain: tuple[POPITrainer, Path], tmp_path: Path, split: dict[str, Any]
) -> None:
    trainer, folder = plain
    other = run(tmp_path, **SGD, **split)
    # The same summaries and rewards, in any order of users.
    keys = ("step", "user_id", "summary")
    ours, theirs = ([tuple(line[key] for key in keys) for line in summaries_of(f)] for f in (folder, tmp_path))
    assert sorted(ours) == sorted(theirs)
    assert_close(trained_weights(other), trained_weights(trainer))
    for one, two in zip(logs_of(trainer), logs_of(other), strict=True):
        for name in ("loss", "preference_loss", "reward", "kl"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_a_step_moves_both_adapters_and_nothing_else(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.roles.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.roles.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".lora_B.inference." in name or ".lora_B.generator." in name for name in changed)
    assert {name.split("lora_B.")[1].split(".")[0] for name in changed} == {"inference", "generator"}


@pytest.mark.parametrize(
    ("config", "moved"),
    [
        ({"freeze_generator": True}, [{"inference"}] * 2),
        ({"freeze_inference": True}, [{"generator"}] * 2),
        ({"update": "alternate"}, [{"generator"}, {"inference"}]),
        ({"update": "alternate", "alternate_every": 2}, [{"generator"}, {"generator"}]),
    ],
)
def test_only_the_role_whose_turn_it_is_moves(tmp_path: Path, config: dict[str, Any], moved: list[set[str]]) -> None:
    trainer = make_trainer(tmp_path, config, max_steps=2, weight_decay=0.1)
    seen = [trained_weights(trainer)]
    trainer.add_callback(_AfterStep(lambda: seen.append(trained_weights(trainer))))
    trainer.train()
    for before, after, expected in zip(seen, seen[1:], moved, strict=False):
        changed = {
            name.split(".lora_")[1].split(".")[1] for name in after if not torch.equal(after[name], before[name])
        }
        assert changed == expected


def test_resumed_training_equals_uninterrupted_bit_by_bit(whole: tuple[POPITrainer, Path], tmp_path: Path) -> None:
    trainer, folder = whole
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    # A run that was killed after its third step has logged steps that the resumed one makes again.
    lines = (folder / "sampled_summaries.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sampled_summaries.jsonl").write_text("".join(lines[:-5]) + '{"step": 3, "us')
    resumed = make_trainer(tmp_path, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    expected = trained_weights(trainer)
    for name, tensor in trained_weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    assert (tmp_path / "sampled_summaries.jsonl").read_text() == "".join(lines)


def test_a_checkpoint_of_another_run_is_refused(whole: tuple[POPITrainer, Path], tmp_path: Path) -> None:
    checkpoint, log = str(whole[1] / "checkpoint-2"), tmp_path / "sampled_summaries.jsonl"
    log.write_text('{"step": 9}\n')
    with pytest.raises(CheckpointError, match="another loss"):
        make_trainer(tmp_path, {"beta": 0.2}).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match="another users"):
        make_trainer(tmp_path, train_dataset=make_users(5)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert log.read_text() == '{"step": 9}\n', "a refused resume must leave the log as it is"


def test_a_damaged_run_is_refused(whole: tuple[POPITrainer, Path], tmp_path: Path) -> None:
    trainer, folder = whole
    trainer.save_model(str(tmp_path))
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    for run in (tmp_path, tmp_path / "checkpoint-2"):
        Roles.load(run)
        weights = run / "generator" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        with pytest.raises(CheckpointError, match=r"generator/adapter_model.safetensors is damaged or was changed"):
            Roles.load(run)
    with pytest.raises(CheckpointError, match=r"generator/adapter_model.safetensors is damaged or was changed"):
        make_trainer(tmp_path, per_device_train_batch_size=4).train(resume_from_checkpoint=True)


def test_a_run_with_another_learning_rate_is_refused(whole: tuple[POPITrainer, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another --learning_rate: there 0\.01, here 0\.5"):
        make_trainer(tmp_path, per_device_train_batch_size=4, learning_rate=0.5).train(
            resume_from_checkpoint=str(whole[1] / "checkpoint-2")
        )


@pytest.mark.parametrize("name", ["inference", "generator"])
def test_an_adapter_missing_from_a_checkpoint_is_named(
    whole: tuple[POPITrainer, Path], tmp_path: Path, name: str
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(whole[1] / "checkpoint-2", checkpoint)
    (checkpoint / name / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"the {name} adapter is missing"):
        make_trainer(tmp_path, per_device_train_batch_size=4).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(CheckpointError, match=f"the {name} adapter is missing"):
        Roles.load(checkpoint)


def test_saved_roles_come_back(whole: tuple[POPITrainer, Path], tmp_path: Path) -> None:
    trainer, _ = whole
    trainer.save_model(str(tmp_path / "saved"))
    roles = Roles.load(tmp_path / "saved")
    assert not any(p.requires_grad for p in roles.parameters())
    ids = torch.arange(3, 12)[None]
    for name in ("inference", "generator"):
        with getattr(trainer.roles, name).active() as ours, getattr(roles, name).active() as theirs, torch.no_grad():
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
    with roles.inference.active() as one, torch.no_grad():
        first = one(ids).logits
    with roles.generator.active() as two, torch.no_grad():
        assert not torch.equal(first, two(ids).logits)


def test_separate_models_are_trained_and_come_back(tmp_path: Path) -> None:
    trainer = run(tmp_path, inference_model=tiny_model(1), generator_model=tiny_model(2), learning_rate=1e-3)
    for role, seed in (("inference", 1), ("generator", 2)):
        own, start = (
            dict(getattr(trainer.roles, role).model.named_parameters()),
            dict(tiny_model(seed).named_parameters()),
        )
        assert any(not torch.equal(own[name], start[name]) for name in own)
        with getattr(trainer.roles, role).initial() as initial:
            assert all(torch.equal(p, start[name]) for name, p in initial.named_parameters())
    trainer.save_model(str(tmp_path / "saved"))
    roles = Roles.load(tmp_path / "saved")
    for role in roles:
        expected = getattr(trainer.roles, role.name).model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in role.model.state_dict().items())


def test_given_adapters_are_trained_further(whole: tuple[POPITrainer, Path], tmp_path: Path) -> None:
    """The reference of a second run is its own initial state, not the base model."""
    whole[0].save_model(str(tmp_path / "first"))
    model = Roles.load(tmp_path / "first").inference.model
    trainer = make_trainer(tmp_path / "second", model=model, peft_config=None)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), trainer.roles.generator.active() as active:
        before = active(ids).logits
    trainer.train()
    with trainer.roles.generator.initial() as initial:
        assert torch.equal(initial(ids).logits, before)
    with torch.no_grad(), trainer.roles.generator.active() as active:
        assert not torch.equal(active(ids).logits, before)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    trainer.save_model(str(tmp_path / "third"))
    assert {path.name for path in (tmp_path / "third").iterdir() if path.is_dir()} >= {"inference", "generator"}


# ---- warm start ------------------------------------------------------------------------------------


def test_a_warm_start_teaches_the_given_summaries(tmp_path: Path) -> None:
    config = {"warm_start_steps": 8, "warm_start": "given", "freeze_generator": True}
    trainer = make_trainer(tmp_path, config, max_steps=8, per_device_train_batch_size=4, learning_rate=2e-2)
    users = make_users()

    def likelihood() -> float:
        with trainer.roles.inference.active() as model, closing(BranchPasses(model)) as passes:
            draws = [trainer.steps._draw(user, 0) for user in users]
            groups = [[trainer.steps._given(user)] for user in users]
            return float(passes.log_probs(trainer.steps._summary_branches(draws, groups)).sum())

    before = likelihood()
    trainer.train()
    assert likelihood() > before + 4
    assert {line["summary"] for line in summaries_of(tmp_path)} == {"red person", "blue person"}
    assert all(entry["warm_start"] == 1 for entry in logs_of(trainer))


def test_summaries_begin_with_the_opening_which_no_one_samples(tmp_path: Path) -> None:
    opened = replace(TEMPLATES, opening="person w3")
    trainer = make_trainer(tmp_path, max_steps=1, rollouts=Scripted(["red", "", "w2"]), templates=opened)
    trainer.train()
    assert {line["summary"] for line in summaries_of(tmp_path)} == {"person w3 red", "", "person w3 w2"}
    infer, tokenizer = trainer.inference_prompts, word_tokenizer()
    ids, _ = infer.ids(make_users()[0].items)
    assert tokenizer.decode(ids).endswith("say person w3")
    draws = [trainer.steps._draw(user, 0) for user in make_users(2)]
    groups = trainer.steps._sample(make_users(2), draws, 0, trainer.steps.phase(0))
    branches = trainer.steps._summary_branches(draws, groups)
    assert [tokenizer.decode(branch.response_ids) for branch in branches[:3]] == ["red </s>", "</s>", "w2 </s>"]
    texts = trainer.summarize(make_users(3))
    assert all(text.startswith("person w3 ") or not text for text in texts)


def test_a_given_summary_that_lacks_the_opening_is_refused_before_training(tmp_path: Path) -> None:
    config, opened = {"warm_start_steps": 1, "warm_start": "given"}, replace(TEMPLATES, opening="red")
    with pytest.raises(ArgumentError, match=r"^warm_start: user 'user 0': expected a summary that begins with 'red'"):
        make_trainer(tmp_path, config, templates=opened)
    users = [replace(user, summary=f"red {user.summary}") for user in make_users()]
    make_trainer(tmp_path, config, templates=opened, train_dataset=users, max_steps=1).train()
    assert {line["summary"] for line in summaries_of(tmp_path)} <= {"red red person", "red blue person"}


def test_a_warm_start_on_its_own_texts_learns_each_groups_best(tmp_path: Path) -> None:
    rollouts = Scripted(["red", "blue w1", "w2 w3"])
    config = {"warm_start_steps": 1, "warm_start": "self", "kl_coef": 0.0}
    trainer = make_trainer(tmp_path, config, max_steps=1, rollouts=rollouts)
    step = trainer.steps.make(make_users(2), 0)
    for own in step.work:
        weights, rewards = own.weights["inference"], [line["reward"] for line in own.lines]
        best = max(range(3), key=lambda index: rewards[index])
        assert weights.nonzero().flatten().tolist() == [best]
        assert weights[best] == pytest.approx(1 / own.lines[best]["tokens"])


def test_a_warm_start_ignores_empty_and_unfinished_texts(tmp_path: Path) -> None:
    config = {"warm_start_steps": 1, "warm_start": "self", "unfinished_penalty": 0.0, "kl_coef": 0.0}
    rollouts = Scripted([""])
    samples = {
        0: Sample([1], "", ended=True),
        1: Sample([7, 7], "red red", ended=False),
        2: Sample([8, 1], "blue", True),
    }
    rollouts.sample = lambda prompts: [samples[prompt.index % 3] for prompt in prompts]  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, config, max_steps=1, rollouts=rollouts)
    for own in trainer.steps.make(make_users(2), 0).work:
        assert own.weights["inference"].tolist() == [0.0, 0.0, 0.5]
    samples[2] = samples[1]
    for own in trainer.steps.make(make_users(2), 0).work:
        assert own.weights["inference"].tolist() == [0.0, 0.0, 0.0]


# ---- bad samples, users and arguments --------------------------------------------------------------


class _AfterStep:
    """A callback that calls one function after each step."""

    def __new__(cls, function: Any) -> Any:
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                function()

        return Callback()


class Scripted:
    """Rollouts that return given texts."""

    def __init__(self, texts: list[str], ended: bool = True) -> None:
        self.texts, self.ended, self.closed, self.synced = texts, ended, 0, 0

    def sample(self, prompts: Any) -> list[Sample]:
        tokenizer = word_tokenizer()
        return [
            Sample([*tokenizer.encode(text, add_special_tokens=False), *([1] * self.ended)], text, self.ended)
            for text in (self.texts[prompt.index % len(self.texts)] for prompt in prompts)
        ]

    def sync(self) -> None:
        self.synced += 1

    def close(self) -> None:
        self.closed += 1


def test_recorded_samples_train_the_same_model(tmp_path: Path) -> None:
    """The samples of one run replace the engine in a second run."""
    first = make_trainer(tmp_path / "first")
    first.rollouts = first.steps.rollouts = RecordingRollouts(first.rollouts, tmp_path / "samples.jsonl")
    first.train()
    recorded = RecordedRollouts(tmp_path / "samples.jsonl", word_tokenizer())
    second = run(tmp_path / "second", rollouts=recorded)
    for name, tensor in trained_weights(first).items():
        assert torch.equal(tensor, trained_weights(second)[name]), name
    with pytest.raises(CheckpointError, match="seed"):  # another run asks for other prompts
        run(tmp_path / "third", rollouts=RecordedRollouts(tmp_path / "samples.jsonl", word_tokenizer()), seed=4)


def test_equal_rewards_are_counted_and_move_no_summary(tmp_path: Path) -> None:
    rollouts = Scripted(["red"])
    trainer = make_trainer(tmp_path, {"kl_coef": 0.0}, max_steps=2, rollouts=rollouts)
    before = trained_weights(trainer, "inference")
    trainer.train()
    assert [entry["groups_equal"] for entry in logs_of(trainer)] == [1.0, 1.0]
    assert all(entry["tokens_per_second"] > 0 for entry in logs_of(trainer))
    after = trained_weights(trainer, "inference")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (rollouts.synced, rollouts.closed) == (2, 1)


def test_empty_and_runaway_summaries_are_counted_and_cost_reward(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, rollouts=Scripted(["", "red", " "]))
    trainer.train()
    assert logs_of(trainer)[0]["summaries_empty"] == pytest.approx(2 / 3)
    trainer = make_trainer(
        tmp_path, {"unfinished_penalty": 0.5}, max_steps=1, rollouts=Scripted(["red w1 w2 w3"], False)
    )
    assert trainer.steps.make(make_users(2), 0).sums["summaries_unfinished"] == (6, 6)
    mixed = Scripted(["red"])
    mixed.sample = lambda prompts: [  # type: ignore[method-assign]
        Sample([7, 1] if prompt.index % 3 else [7], "red", ended=prompt.index % 3 > 0) for prompt in prompts
    ]
    trainer = make_trainer(tmp_path, {"unfinished_penalty": 0.6, "kl_coef": 0.0}, max_steps=1, rollouts=mixed)
    (own, *_) = trainer.steps.make(make_users(1), 0).work
    assert [line["advantage"] for line in own.lines] == pytest.approx([-0.6, 0.3, 0.3])


def test_longer_summaries_cost_reward(tmp_path: Path) -> None:
    rollouts = Scripted(["red", "red", "red red red"])
    rollouts.sample = lambda prompts: [  # type: ignore[method-assign]
        Sample([7, 1] if prompt.index % 3 else [7, 7, 7, 1], "red", ended=True) for prompt in prompts
    ]
    trainer = make_trainer(tmp_path, {"length_penalty": 0.1, "kl_coef": 0.0}, max_steps=1, rollouts=rollouts)
    (own, *_) = trainer.steps.make(make_users(1), 0).work
    assert [line["advantage"] for line in own.lines] == pytest.approx([-0.2, 0.1, 0.1])


def test_a_reward_that_is_not_finite_is_counted_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = BranchPasses.log_probs, []

    def broken(self: BranchPasses, branches: Any) -> Tensor:
        found = honest(self, branches)
        if not calls:  # the generator's first scores: one summary's first pair
            found[0] = math.nan
        calls.append(len(branches))
        return found

    monkeypatch.setattr(BranchPasses, "log_probs", broken)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    (entry,) = logs_of(trainer)
    assert entry["reward_nan"] == 1
    assert math.isfinite(entry["loss"])
    assert math.isfinite(entry["grad_norm"])
    first = summaries_of(tmp_path)[0]
    assert first["reward"] is None
    assert first["advantage"] == 0
    assert all(tensor.isfinite().all() for tensor in trained_weights(trainer).values())


@pytest.mark.parametrize("limit", [0, 1])
def test_a_step_with_a_user_whose_losses_are_all_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """The second step's; it stops the run or is skipped, and what is logged is over the others."""
    honest, calls = StepMaker._score, list[int]()

    def broken(self: StepMaker, draws: Any, *texts: Any) -> Any:
        found = honest(self, draws, *texts)
        calls.append(len(draws))
        if len(calls) == 2:
            found.own[0] = found.own[0]._replace(loss=found.own[0].loss * math.nan)
        return found

    monkeypatch.setattr(StepMaker, "_score", broken)
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=3, callbacks=[FiniteGuard(limit)])
    if limit:
        trainer.train()
        assert trainer.guard.skipped == [2]
        assert math.isfinite(logs_of(trainer)[0]["loss"])
        assert logs_of(trainer)[0]["skipped_steps"] == 1
    else:
        with pytest.raises(NonFiniteError, match=r"^step 2: the loss is not finite, with user 'user \d'; the step"):
            trainer.train()
    assert all(tensor.isfinite().all() for tensor in trained_weights(trainer).values())


def test_users_that_cannot_be_drawn_from_are_left_out_and_named(tmp_path: Path) -> None:
    poor = [User("bare", ()), User("lonely", (Pair("w1", "red", "blue"),))]
    with pytest.warns(UserWarning, match=r"2 of 4 users.*bare.*lonely"):
        trainer = make_trainer(tmp_path, train_dataset=[*make_users(2), *poor])
    assert trainer.train_users is not None
    assert [user.user_id for user in trainer.train_users.users] == ["user 0", "user 1"]
    with pytest.raises(RecordError, match="train_dataset: users: expected some with pairs and signals"):
        make_trainer(tmp_path, train_dataset=poor)


def test_records_are_users_too(tmp_path: Path) -> None:
    records = [
        {"user_id": user.user_id, "query": pair.query, "response": pair.chosen, "chosen": pair.chosen,
         "rejected": pair.rejected, "history": []}
        for user in make_users(2) for pair in user.pairs
    ]  # fmt: skip
    trainer = run(tmp_path, train_dataset=records, max_steps=1)
    assert len(summaries_of(tmp_path)) == 6
    assert trainer.train_users is not None
    assert len(trainer.train_users.users) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"peft_config": lora(lora_dropout=0.1)}, ArgumentError, "lora_dropout=0"),
        ({"peft_config": lora(modules_to_save=["lm_head"])}, ArgumentError, "modules_to_save"),
        ({"model": None}, ArgumentError, "model: expected one model"),
        ({"model": "llama"}, ArgumentTypeError, "model: expected a torch module, got str"),
        ({"model": None, "inference_model": tiny_model()}, ArgumentError, "together"),
        ({"inference_model": tiny_model(), "generator_model": tiny_model(), "peft_config": lora()}, ArgumentError,
         "peft_config: expected None with separate"),
        ({"neftune_noise_alpha": 1.0}, ArgumentError, "neftune"),
        ({"model": tiny_model(vocab_size=9)}, ArgumentError, "token ids go up to"),
        ({"config": {"max_length": 6}}, BudgetError, "train_dataset: user 'user 0'"),
        ({"config": {"warm_start_steps": 1, "warm_start": "given"},
          "train_dataset": [User("a", make_users()[0].pairs)]}, ArgumentError, "warm_start.*'a'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_before_any_work(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, options.pop("config", None), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("objective", "kto"), ("estimator", "ppo"), ("update", "both"), ("warm_start", "x"), ("group_size", 1),
        ("group_size", 0), ("pairs_per_user", True), ("temperature", 0), ("temperature", math.nan), ("kl_coef", -1),
        ("length_penalty", math.inf), ("beta", 0), ("max_summary_tokens", 0), ("alternate_every", 0),
        ("warm_start_steps", -1), ("rollouts", "sglang"), ("unfinished_penalty", "1"), ("rollout_batch_size", 1.5),
    ],
)  # fmt: skip
def test_unusable_settings_are_named(setting: str, value: Any) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=setting):
        POPIConfig(**{setting: value})
    with pytest.raises(ArgumentError, match="freeze_inference"):
        POPIConfig(freeze_inference=True, freeze_generator=True)


# ---- evaluation ------------------------------------------------------------------------------------


def test_evaluation_judges_held_out_pairs(whole: tuple[POPITrainer, Path]) -> None:
    trainer, _ = whole
    users = make_users(3)
    metrics = trainer.evaluate(users)
    assert {
        "eval_accuracy",
        "eval_loss",
        "eval_margin",
        "eval_accuracy_none",
        "eval_accuracy_placebo",
    } <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 <= metrics["eval_accuracy"] <= 1
    texts = trainer.summarize(users)
    assert texts == trainer.summarize(users)  # greedy
    assert set(" ".join(texts).split()) <= set(WORDS)


def test_users_that_cannot_be_evaluated_are_left_out_or_named(whole: tuple[POPITrainer, Path], tmp_path: Path) -> None:
    """As in the command, users with too few signals before the scored pairs are left out."""
    trainer, _ = whole
    pairs = tuple(Pair(f"w{i}", f"red w{i}", f"blue w{i}", timestamp=float(i)) for i in range(2))
    late = tuple(HistoryItem(f"red w{9 + i}", timestamp=50.0) for i in range(3))  # later than the judged pairs
    poor = User("poor", pairs, late)
    assert trainer.evaluate([*make_users(3), poor]) == trainer.evaluate(make_users(3))
    with pytest.raises(RecordError, match="eval_dataset: users: expected some with pairs and signals"):
        make_trainer(tmp_path, eval_dataset=[poor])


def test_training_evaluates_on_the_way_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=2, eval_dataset=make_users(2))
    assert [entry["step"] for entry in trainer.state.log_history if "eval_accuracy" in entry] == [2, 4]
    assert trainer.roles.inference.model.get_base_model().config._attn_implementation == "sdpa"
    without = run(tmp_path / "without")
    for name, tensor in trained_weights(without).items():
        assert torch.equal(tensor, trained_weights(trainer)[name]), name


def test_the_log_of_summaries_holds_every_sample(whole: tuple[POPITrainer, Path]) -> None:
    lines = summaries_of(whole[1])
    assert len(lines) == 4 * 4 * CONFIG["group_size"]
    for line in lines:
        assert line["pairs"] == 2
        assert 1 <= line["tokens"] <= 4
        assert math.isfinite(line["reward"])
    assert json.dumps(lines[0])  # plain values


@pytest.mark.filterwarnings("ignore:attention. 'auto' computes:RuntimeWarning")
def test_models_that_cannot_share_prefixes_are_trained_in_padded_rows(tmp_path: Path) -> None:
    options = {"n_head": 4, "n_layer": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    trained = []
    for attention in ("auto", "padded"):
        models = [any_model("bloom", seed=seed, attn_implementation="eager", **options) for seed in (0, 1)]
        own = {"inference_model": models[0], "generator_model": models[1], "max_steps": 1}
        trainer = make_trainer(tmp_path / attention, attention=attention, max_tokens=400, **own)
        trainer.train()
        trained.append(trained_weights(trainer))
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], value) for name, value in trained[1].items())
