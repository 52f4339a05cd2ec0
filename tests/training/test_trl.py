"""TRL's trainer with a causal loss equals `NextQuillTrainer`, and refuses options that it would ignore."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nextquill import ArgumentError, ArgumentTypeError, NonFiniteError
from nextquill.data import EncodedDataset, ExampleEncoder, load_records
from nextquill.models.loading import PromptSettings, load_prompt_settings
from nextquill.training.model_card import model_card
from tests.models.model_helpers import TEMPLATE, loss_cases, make_records, make_trainer, tiny_model, word_tokenizer

trl = pytest.importorskip("trl")

# SFTConfig sets an argument of transformers that has another name since.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")

ARGUMENTS = {
    "max_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4,
    "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
    "bf16": False,
}  # fmt: skip


def dataset() -> EncodedDataset:
    encoder = ExampleEncoder(word_tokenizer(), TEMPLATE, max_length=64)
    return EncodedDataset(encoder.encode_all(load_records(make_records()), placebo=True))


def trl_trainer(folder: Path, **options: Any) -> Any:
    from nextquill.training.trl import CausalSFTTrainer

    given = {
        name: options.pop(name)
        for name in ("train_dataset", "eval_dataset", "encoder", "max_tokens", "loss")
        if name in options
    }
    return CausalSFTTrainer(
        tiny_model(),
        args=trl.SFTConfig(output_dir=str(folder), **{**ARGUMENTS, **options}),
        processing_class=word_tokenizer(),
        **{"train_dataset": dataset(), "loss": loss_cases()["detached"].loss, **given},
    )


def test_it_trains_as_our_own_trainer_does(tmp_path: Path) -> None:
    ours = make_trainer(tmp_path / "ours", loss_cases()["detached"].loss, max_tokens=60)
    ours.train()
    theirs = trl_trainer(tmp_path / "theirs", max_tokens=60, eval_dataset=dataset())
    theirs.train()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6, msg=name)
    assert theirs.model.config._attn_implementation == "sdpa", "the model's own attention was not put back"
    assert theirs.evaluate()["eval_effect_placebo"] != 0


def test_a_step_that_is_not_finite_stops_it(tmp_path: Path) -> None:
    trainer = trl_trainer(tmp_path)
    weight = trainer.model.get_output_embeddings().weight
    weight.register_hook(lambda gradient: gradient * math.nan if trainer.state.global_step == 1 else gradient)
    with pytest.raises(NonFiniteError, match="step 2: the gradient's norm is not finite, with example"):
        trainer.train()
    assert weight.isfinite().all()


@pytest.mark.parametrize("known", [True, False], ids=["encoder", "no encoder"])
def test_the_folder_has_the_card_and_what_is_known_of_the_prompts(tmp_path: Path, known: bool) -> None:
    encoder = ExampleEncoder(word_tokenizer(), TEMPLATE, max_length=64) if known else None
    trainer = trl_trainer(tmp_path, encoder=encoder)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == model_card(trainer)
    assert "| training | 2 steps of 4 examples" in card
    assert ("nq.Writer.load" in card) == known
    settings = load_prompt_settings(tmp_path)
    assert settings == (PromptSettings(TEMPLATE, 64).with_chat(False) if known else None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_type": "dft"}, ArgumentError, r"args\.loss_type: 'dft' would be ignored"),
        ({"completion_only_loss": True}, ArgumentError, r"args\.completion_only_loss: True would be ignored"),
        (
            {"max_length": 4},
            ArgumentError,
            r"args\.max_length: expected at least the \d+ tokens .* got 4",
        ),
        ({"train_dataset": make_records()}, ArgumentTypeError, "train_dataset: expected an EncodedDataset, got list"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trl_trainer(tmp_path, **options)
