"""Checkpoints: exact resume, complete files, refusal of other models, limits, and the best model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import TrainerCallback

from nextquill import CheckpointError, NextQuillLoss, NextQuillTrainer, PairLoss, PerCELoss
from nextquill.errors import OutputExistsError
from nextquill.models.loading import load_model
from nextquill.storage.checkpoints import RUN_FILE, STAGING, trained_users, user_digest
from nextquill.storage.locks import LOCK_FILE, held
from nextquill.storage.manifests import MANIFEST
from tests.models.model_helpers import logs_of, loss_cases, make_records, make_trainer, tiny_model, word_tokenizer

DROPOUT = {"attention_dropout": 0.2}


def full_model() -> nn.Module:
    return tiny_model(**DROPOUT)


def lora_model(dropout: float = 0.1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type=TaskType.CAUSAL_LM)
    return get_peft_model(tiny_model(**(options or DROPOUT)), config)


def lora_model_without_dropout() -> nn.Module:
    return lora_model(0.0, attention_dropout=0.0)


class KillAt(TrainerCallback):
    """Stops the training like a killed process, before step `step` + 1."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_in(folder: Path, model: nn.Module | None = None, loss: PairLoss | None = None, **options: Any) -> Any:
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_dataset": make_records(20)}
    defaults["attention"] = "padded"  # which dropout needs
    return make_trainer(folder, loss, full_model() if model is None else model, **{**defaults, **options})


def test_two_trainers_cannot_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    trainer = trainer_in(tmp_path)
    with (
        held(tmp_path / LOCK_FILE, tmp_path),
        pytest.raises(OutputExistsError, match=r"^args\.output_dir: another process.* is writing "),
    ):
        trainer.train()
    assert not (tmp_path / RUN_FILE).exists()


def state_of(trainer: NextQuillTrainer) -> dict[str, torch.Tensor]:
    """All numbers that the training changes."""
    state = {f"parameter {name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    for index, slots in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer {index} {name}": torch.as_tensor(value).clone() for name, value in slots.items()}
    return state


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    """6 steps end within the second epoch of 5 steps. transformers alone would make a seventh step after a resume."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 6, "save_steps": 6}
    first = trainer_in(tmp_path, **options)
    first.train()
    again = trainer_in(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert all(torch.equal(state_of(first)[name], value) for name, value in state_of(again).items())


def assert_bitwise_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, f"not bitwise equal: {different[:3]} and {max(0, len(different) - 3)} more"


def checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint*"))


TREES = {"attention": "auto", "max_tokens": 60, "examples_per_user": 2}


@pytest.mark.parametrize(
    ("make", "loss_name", "options"),
    [
        (full_model, "official", {}),
        (lora_model, "detached", {}),
        (tiny_model, "official", TREES),
        (lora_model_without_dropout, "detached", TREES),
        (tiny_model, "sft", {**TREES, "gradient_accumulation_steps": 2}),
    ],
    ids=["full", "lora", "trees", "lora under trees", "accumulated trees"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, make: Callable[[], nn.Module], loss_name: str, options: dict[str, Any]
) -> None:
    """It stops within an epoch of 5 steps, or 3 with two batches per step, and uses dropout if rows are padded."""
    loss = loss_cases()[loss_name].loss
    whole = trainer_in(tmp_path / "whole", make(), loss, **options)
    whole.train()
    killed = trainer_in(tmp_path / "parts", make(), loss, callbacks=[KillAt(4)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer_in(tmp_path / "parts", make(), loss, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(state_of(resumed), state_of(whole))
    assert logs_of(resumed) == logs_of(whole), "the logs differ"
    assert len(logs_of(resumed)) == 7


def test_resume_takes_the_weights_from_the_checkpoint(tmp_path: Path) -> None:
    whole = trainer_in(tmp_path)
    whole.train()
    resumed = trainer_in(tmp_path, tiny_model(seed=9, **DROPOUT))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_bitwise_equal(state_of(resumed), state_of(whole))


# ---- another run's checkpoint ----------------------------------------------------------------------


def other_base() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type=TaskType.CAUSAL_LM)
    return get_peft_model(tiny_model(seed=1, **DROPOUT), config)


def other_rank() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type=TaskType.CAUSAL_LM)
    return get_peft_model(tiny_model(**DROPOUT), config)


@pytest.mark.parametrize(
    ("first", "second", "second_loss", "message"),
    [
        (full_model, lambda: tiny_model(num_hidden_layers=3), None, "another model: .*'num_hidden_layers': 2"),
        (full_model, lambda: tiny_model("qwen2"), None, "another model: .*'model_type': 'llama'"),
        (full_model, lora_model, None, "another adapters"),
        (lora_model, other_rank, None, "another adapters: .*r=4"),
        (lora_model, other_base, None, "another frozen weights"),
        (full_model, full_model, PerCELoss(), "another loss: .*Threshold"),
    ],
    ids=["layers", "architecture", "lora over full", "rank", "base of the same shape", "loss"],
)
def test_checkpoint_of_another_run_is_refused_before_training(
    tmp_path: Path, first: Any, second: Any, second_loss: PairLoss | None, message: str
) -> None:
    trainer_in(tmp_path, first(), max_steps=3).train()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    trainer = trainer_in(tmp_path, second(), second_loss)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0
    assert_bitwise_equal({name: p.detach() for name, p in trainer.model.named_parameters()}, start)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before, "files were touched"


def test_a_loss_with_a_function_can_be_resumed(tmp_path: Path) -> None:
    """Its repr holds an address, which differs between processes."""

    def make_loss() -> PairLoss:
        return PairLoss(lambda pair: torch.ones_like(pair.factual))

    trainer_in(tmp_path, None, make_loss(), max_steps=3).train()
    trainer_in(tmp_path, None, make_loss()).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "found none"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "not a complete checkpoint"),
        (lambda folder: (folder / RUN_FILE).unlink(), "not written by NextQuillTrainer"),
        (lambda folder: (folder / RUN_FILE).write_text("{"), "not a run's description"),
        (lambda folder: (folder / RUN_FILE).write_text("[]"), "not a run's description"),
    ],
    ids=["none", "no state", "no identity", "broken identity", "identity of another form"],
)
def test_unusable_checkpoints_are_refused(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    trainer_in(tmp_path, max_steps=3).train()
    spoil(tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointError, match=message):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


# ---- other settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.5}, "another --learning_rate: there 0.001, here 0.5"),
        ({"weight_decay": 0.1}, "another --weight_decay: there 0.0, here 0.1"),
        ({"optim": "sgd"}, "another --optim: there adamw_torch_fused, here sgd"),
        ({"lr_scheduler_type": "linear"}, "another --lr_scheduler_type: there constant, here linear"),
        ({"max_grad_norm": 0.5}, "another --max_grad_norm: there 1.0, here 0.5"),
        ({"seed": 4}, "another --seed: there 3, here 4"),
        ({"data_seed": 4}, "another --data_seed: there None, here 4"),
        ({"bf16": True}, "another --bf16: there False, here True"),
        ({"per_device_train_batch_size": 2}, r"another number of examples per step \(--per_device_.*: there 4, here 2"),
        ({"gradient_accumulation_steps": 3}, r"gradient_accumulation_steps x processes\): there 4, here 12"),
        ({"max_length": 99}, r"another --max_length: there \d+, here 99"),
        (
            {"train_dataset": make_records(20)[::-1]},
            r"another --train_file \(train_dataset\): there 20 examples, [0-9a-f]+",
        ),
        ({"train_dataset": make_records(19)}, "here 19 examples"),
        ({"examples_per_user": 2}, "another examples per user: there 1, here 2"),
        ({"model": tiny_model(attention_dropout=0.1)}, r"another dropout: there \[0.2\], here \[0.1\]"),
        ({"model": tiny_model(dtype=torch.bfloat16, **DROPOUT)}, "another dtype: there ..float32.., here ..bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_with_another_setting_is_refused(
    finished: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    trainer = trainer_in(tmp_path, **options)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-3"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints 3 and 6, which tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    trainer_in(folder).train()
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 7, "logging_steps": 2, "save_steps": 2, "save_total_limit": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["length and files", "division of a batch"],
)
def test_a_run_may_change_what_does_not_shape_it(finished: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    trainer_in(tmp_path, **options).train(resume_from_checkpoint=str(finished / "checkpoint-3"))


def make_older(checkpoint: Path) -> None:
    """Make it what the version before wrote."""
    (checkpoint / MANIFEST).unlink()
    saved = json.loads((checkpoint / RUN_FILE).read_text())
    kept = ("model", "adapters", "frozen_weights", "loss", "effects_file", "examples_per_user", "trained_users")
    (checkpoint / RUN_FILE).write_text(json.dumps({name: saved[name] for name in kept}))


def test_a_checkpoint_of_the_version_before_is_resumed(finished: Path, tmp_path: Path) -> None:
    """It has no manifest, and says less about the run."""
    shutil.copytree(finished / "checkpoint-3", tmp_path / "checkpoint-3")
    make_older(tmp_path / "checkpoint-3")
    trainer_in(tmp_path, learning_rate=0.5).train(resume_from_checkpoint=True)


# ---- damage ----------------------------------------------------------------------------------------


def edit_step(folder: Path) -> None:
    path = folder / "trainer_state.json"
    path.write_text(path.read_text().replace('"global_step": 6', '"global_step": 5'))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is damaged or was changed"),
        (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt is damaged or was changed"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "has no optimizer.pt"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "has no scheduler.pt"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (edit_step, "trainer_state.json is damaged or was changed"),
        (lambda folder: (folder / MANIFEST).write_text(""), f"{MANIFEST}: not valid JSON"),
    ],
    ids=["weights", "optimizer", "no optimizer", "no schedule", "no random state", "step", "manifest"],
)
def test_a_damaged_checkpoint_is_refused(
    finished: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "checkpoint-6")
    with pytest.raises(CheckpointError, match=message):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


def test_the_newest_whole_checkpoint_is_named(finished: Path, tmp_path: Path) -> None:
    for step in (3, 4, 5, 6):
        shutil.copytree(finished / "checkpoint-6", tmp_path / f"checkpoint-{step}")
    for step in (5, 6):
        flip(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"optimizer.pt is .*; .*/checkpoint-4 is the newest checkpoint that is whole"
    ):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match="no other checkpoint there is whole"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("optimizer.pt", b""),
        ("optimizer.pt", b"hello"),
        ("scheduler.pt", b"\0" * 99),
        ("rng_state.pth", b"null"),
        ("trainer_state.json", b"{}"),
        ("trainer_state.json", b"null"),
        ("trainer_state.json", b'{"global_step": 3, "train_batch_size": 2, "best_model_checkpoint": 1.5}'),
    ],
)
def test_a_damaged_checkpoint_is_one_error_that_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    trainer_in(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / MANIFEST).unlink()  # as in earlier versions
    (tmp_path / "checkpoint-3" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint-3/{name}: ") as caught:
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_the_state_of_another_optimiser_is_refused(tmp_path: Path, optim: str) -> None:
    trainer_in(tmp_path, max_steps=3).train()
    for path in (tmp_path / "checkpoint-3" / RUN_FILE, tmp_path / "checkpoint-3" / MANIFEST):  # of an earlier version
        found = json.loads(path.read_text())
        path.unlink()
        if path.name == RUN_FILE:
            path.write_text(json.dumps({name: found[name] for name in ("model", "adapters", "frozen_weights", "loss")}))
    with pytest.raises(CheckpointError, match=r"checkpoint-3/optimizer.pt was written by another optimiser"):
        trainer_in(tmp_path, optim=optim).train(resume_from_checkpoint=True)


def test_a_checkpoint_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


# ---- interrupted while saving ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> NextQuillTrainer:
    trainer = trainer_in(tmp_path_factory.mktemp("whole"), save_steps=2)
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["save_model", "_save_optimizer_and_scheduler", "_write_identity"])
def test_interrupt_while_saving_leaves_nothing_to_pick_up(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, uninterrupted: NextQuillTrainer
) -> None:
    trainer = trainer_in(tmp_path / "run", save_steps=2)
    original = getattr(trainer, method)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-2"], "checkpoints after the interrupt"
    assert not (tmp_path / "run" / STAGING).exists(), "the half-written checkpoint is still there"

    resumed = trainer_in(tmp_path / "run", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(state_of(resumed), state_of(uninterrupted))
    assert logs_of(resumed) == logs_of(uninterrupted), "the logs differ"


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    trainer_in(tmp_path, max_steps=3).train()
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / STAGING / "checkpoint-5")
    left: list[bool] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            left.append((tmp_path / STAGING).exists())

    resumed = trainer_in(tmp_path, callbacks=[Look()])
    resumed.train(resume_from_checkpoint=True)
    assert left == [False], "the leftover was still there when training began"
    assert resumed.state.log_history[3]["step"] == 4, "did not go on from step 3"
    assert checkpoints_in(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert not (tmp_path / STAGING).exists()


def test_a_checkpoint_is_complete_when_it_appears(tmp_path: Path) -> None:
    """A folder with that name never exists without all its files."""
    folder, seen = tmp_path / "checkpoint-3", []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({path.name for path in folder.iterdir()})

    trainer = trainer_in(tmp_path, max_steps=3, callbacks=[Look()])
    for method in ("_save_optimizer_and_scheduler", "_save_rng_state"):
        original = getattr(trainer, method)
        setattr(trainer, method, lambda *args, original=original: (seen.append(folder.exists()), original(*args)))
    trainer.train()
    assert seen[:2] == [False, False], "the folder stood under its name while it was written"
    wanted = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", RUN_FILE}
    assert wanted <= seen[2], "files missing when on_save was called"


# ---- limits and the best model ---------------------------------------------------------------------


def best_run(folder: Path, limit: int, **options: Any) -> NextQuillTrainer:
    """A run whose best checkpoint is the first, because its falling loss counts as better when greater."""
    trainer = trainer_in(
        folder, save_steps=2, max_steps=8, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, save_total_limit=limit,
        eval_dataset=make_records(20), learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_best_model_is_kept_under_its_final_name_and_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = best_run(tmp_path, limit=2)
    assert checkpoints_in(tmp_path) == ["checkpoint-2", "checkpoint-8"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    for name in ("checkpoint-2", "checkpoint-8"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2"), f"best checkpoint named in {name}"
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in trainer.model.named_parameters() if name in saved)


def test_total_limit_of_one_keeps_the_best(tmp_path: Path) -> None:
    best_run(tmp_path, limit=1)
    assert checkpoints_in(tmp_path) == ["checkpoint-2"]


def test_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    trainer_in(tmp_path, save_steps=1, save_total_limit=2).train()
    assert checkpoints_in(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    trainer_in(tmp_path, max_steps=3).train()
    (tmp_path / "checkpoint-3" / "stale").touch()
    trainer_in(tmp_path, None, NextQuillLoss(), max_steps=3).train()
    assert not (tmp_path / "checkpoint-3" / "stale").exists()
    assert "alpha=0.1, weighted_effect=False, detach_counterfactual=False" in (
        (tmp_path / "checkpoint-3" / RUN_FILE).read_text()
    )


def test_checkpoints_are_pushed_from_where_they_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    pushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, Path(folder).is_dir()))
    )
    trainer = trainer_in(tmp_path, max_steps=3, save_strategy="no")
    trainer.train()
    trainer.args.push_to_hub = True
    trainer._save_checkpoint(trainer.model, None)
    assert pushed == [(str(tmp_path / "checkpoint-3"), True)]


def digests(*users: str) -> set[str]:
    return {user_digest(user) for user in users}


@pytest.mark.parametrize("make", [full_model, lora_model], ids=["full", "lora"])
def test_a_run_knows_its_users_and_those_of_the_run_it_started_from(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    records = [{**record, "user_id": user} for record, user in zip(make_records(8), "aabbccdd", strict=True)]
    base, first, second = tmp_path / "base", tmp_path / "first", tmp_path / "second"
    tiny_model(**DROPOUT).save_pretrained(base)
    model = make()
    if hasattr(model, "peft_config"):  # an adapter finds its base by name
        model.peft_config["default"].base_model_name_or_path = str(base)
    trainer = trainer_in(first, model, train_dataset=records[:4], max_steps=1)
    trainer.train()
    trainer.save_model()
    assert trained_users(first) == trained_users(first / "checkpoint-1") == digests("a", "b")
    word_tokenizer().save_pretrained(base)
    start = load_model(str(first))[0]
    trainer_in(second, start, train_dataset=records[4:6], max_steps=1).train()
    assert trained_users(second) == digests("a", "b", "c")
    make_older(second / "checkpoint-1")  # later versions refuse other records
    resumed = trainer_in(second, start, train_dataset=records[6:], max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert trained_users(second) == digests("a", "b", "c", "d")
    (first / RUN_FILE).write_text("{}")  # a run of an earlier version
    trainer_in(tmp_path / "third", load_model(str(first))[0], max_steps=1).train()
    assert trained_users(tmp_path / "third") is None
