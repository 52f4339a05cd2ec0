"""The trainer refuses bad input before any work, and names the argument."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.fsdp import StateDictType
from transformers import TrainingArguments

from nextquill import (
    ArgumentError,
    ArgumentTypeError,
    BudgetError,
    NextQuillLoss,
    NextQuillTrainer,
    PerCELoss,
    RecordError,
)
from nextquill.models.configs import default_max_length
from nextquill.training import checks
from nextquill.training.checks import FILLED_OPTIONS
from tests.models.model_helpers import make_args, make_records, make_trainer, tiny_model, word_tokenizer


def make(tmp_path: Path, **options: Any) -> NextQuillTrainer:
    defaults = {
        "model": tiny_model(),
        "args": make_args(tmp_path),
        "train_dataset": make_records(4),
        "processing_class": word_tokenizer(),
    }
    return NextQuillTrainer(**{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": None}, ArgumentTypeError, "model: expected a torch module, got NoneType"),
        ({"model": "llama"}, ArgumentTypeError, "model: expected a torch module, got str"),
        ({"processing_class": None}, ArgumentTypeError, "processing_class"),
        ({"loss": "nextquill"}, ArgumentTypeError, "loss: expected a nextquill loss, got str"),
        ({"loss": PerCELoss}, ArgumentTypeError, "loss: .* give an instance"),
        ({"loss": NextQuillLoss(softcap=30.0)}, ArgumentError, "softcap is 30.0, but the model applies None"),
        ({"processing_class": word_tokenizer(50)}, ArgumentError, "processing_class: its token ids go up to 135"),
        ({"max_length": 0}, ArgumentError, "max_length"),
        ({"max_length": 5}, BudgetError, "max_length is 5"),
        ({"train_dataset": [{"user_id": "a"}]}, RecordError, "history"),
        ({"train_dataset": 3}, ArgumentTypeError, "source"),
        ({"eval_dataset": {"a": []}}, RecordError, "no records"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unusable_arguments(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path, **options)


def test_processes_with_different_numbers_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    with pytest.raises(ArgumentError, match="even_batches=False is not supported with 2 processes"):
        make(tmp_path, args=make_args(tmp_path, accelerator_config={"even_batches": False}))


def test_a_run_under_fsdp_that_would_save_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, plugin = make(tmp_path), SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    monkeypatch.setattr(checks, "fsdp_plugin", lambda _: plugin)
    with pytest.raises(ArgumentError, match="expected state_dict_type FULL_STATE_DICT, got SHARDED_STATE_DICT"):
        trainer.train()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILLED_OPTIONS)
def test_options_the_trainer_fills_itself(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        make(tmp_path, **{name: lambda *args: None})


def test_best_model_by_the_greatest_nll(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    args.metric_for_best_model, args.greater_is_better = "eval_nll_factual", True
    with pytest.raises(ArgumentError, match=r"args\.greater_is_better"):
        make(tmp_path, args=args)


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing_factor": 0.1},
        {"batch_eval_metrics": True},
        {"eval_do_concat_batches": False},
        {"include_for_metrics": ["inputs"]},
        {"use_liger_kernel": True},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_training_arguments_that_would_be_ignored(tmp_path: Path, option: dict[str, Any]) -> None:
    args = make_args(tmp_path)
    for name, value in option.items():
        setattr(args, name, value)
    with pytest.raises(ArgumentError, match=rf"args\.{next(iter(option))}"):
        make(tmp_path, args=args)


def test_training_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset"):
        make(tmp_path, train_dataset=None).train()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_default_length_is_the_models_limit(kind: str) -> None:
    assert default_max_length(tiny_model(kind)) == 64
    assert default_max_length(tiny_model("llama", max_position_embeddings=9000)) == 2048


def test_default_loss_is_perce(tmp_path: Path) -> None:
    assert repr(make(tmp_path).loss) == repr(PerCELoss())


def test_default_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make(tmp_path, args=None).args.output_dir == "tmp_trainer"


def test_a_tokenizer_without_padding_is_accepted(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    make_trainer(tmp_path, processing_class=tokenizer, max_steps=1).train()
