"""Flags of the command line build the right objects or are refused."""

from types import SimpleNamespace

import pytest

from nextquill.cli.flags import check_positive
from nextquill.cli.options import LOSSES, LoraOptions, LossOptions, PromptOptions
from nextquill.cli.popi_train import PopiLoraOptions
from nextquill.comparison.arms import ARMS, own_pace
from nextquill.data import PromptTemplate
from nextquill.errors import ArgumentError
from nextquill.losses import LongCELoss, NextQuillLoss, PerCELoss, SFTLoss
from nextquill.models.loading import PromptSettings
from tests.models.model_helpers import tiny_model

STORED = PromptSettings(PromptTemplate(order="history_first", counterfactual="removal"), 700, 50)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LossOptions(), PerCELoss()),
        (LossOptions(loss="nextquill_detached"), NextQuillLoss(detach_counterfactual=True)),
        (LossOptions(loss="nextquill", threshold=0.0, alpha=0.0), NextQuillLoss(threshold=0.0, alpha=0.0)),
        (LossOptions(loss="nextquill", detach_counterfactual=True), NextQuillLoss(detach_counterfactual=True)),
        (
            LossOptions(loss="nextquill_detached", weighted_effect=True),
            NextQuillLoss(detach_counterfactual=True, weighted_effect=True),
        ),
        (LossOptions(loss="nextquill_paper", anchor=0.1), NextQuillLoss(weighted_effect=True, anchor=0.1)),
        (LossOptions(loss="perce", min_weight=0.5, max_weight=2.0), PerCELoss(0.5, 2.0)),
        (LossOptions(loss="longce", max_weight=3.0, reduction="token"), LongCELoss(3.0, reduction="token")),
        (LossOptions(loss="sft", chunk_bytes=1024), SFTLoss(chunk_bytes=1024)),
        (LossOptions(loss="perce", impl="torch"), PerCELoss(impl="torch")),
    ],
    ids=repr,
)
def test_loss_flags_build_the_loss(options, expected):
    assert repr(options.build()) == repr(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LossOptions(loss="sft", threshold=0.1), "threshold: --loss sft has no such option"),
        (
            LossOptions(loss="perce", detach_counterfactual=False),
            "detach_counterfactual: --loss perce has no such option",
        ),
        (LossOptions(loss="nextquill", alpha=-1.0), "alpha: "),
        (LossOptions(loss="nextquill", anchor=1.0, detach_counterfactual=True), "anchor: expected 0 with"),
        (
            LossOptions(loss="nextquill_detached", anchor=1.0),
            "anchor: --loss nextquill_detached has no gradient without history",
        ),
        (
            LossOptions(loss="nextquill_detached", detach_counterfactual=False),
            "detach_counterfactual: --loss nextquill_detached sets it to True",
        ),
        (LossOptions(loss="nextquill_paper", weighted_effect=False), "weighted_effect: --loss nextquill_paper sets it"),
        (LossOptions(chunk_bytes=0), "chunk_bytes: "),
    ],
)
def test_loss_flags_that_do_not_fit_are_named(options, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        options.build()


def test_losses_are_the_arms_of_compare_without_its_controls():
    assert set(LOSSES) == {name for name, arm in ARMS.items() if own_pace(arm) is arm and arm.learning_rate_factor == 1}
    for name in LOSSES:
        assert repr(LossOptions(loss=name).build()) == repr(ARMS[name].loss())


def test_a_loss_is_called_by_its_form():
    assert str(LossOptions()) == "perce"
    assert str(LossOptions(loss="nextquill", detach_counterfactual=True)) == "nextquill_detached"
    assert str(LossOptions(loss="nextquill", alpha=0.2, detach_counterfactual=False)) == "nextquill, alpha 0.2"
    assert str(LossOptions(loss="perce", max_weight=2.0)) == "perce, max_weight 2.0"


def test_prompts_of_another_folder(tmp_path):
    (tmp_path / "nextquill_prompt.json").write_text(STORED.to_json())
    assert PromptOptions(prompt_from=str(tmp_path)).stored("tiny") == STORED
    assert PromptOptions().stored(str(tmp_path)) == STORED
    with pytest.raises(ArgumentError, match=r"^prompt_from: expected the folder of a run, got .*nowhere without"):
        PromptOptions(prompt_from=str(tmp_path / "nowhere")).stored(str(tmp_path))


@pytest.mark.parametrize(("given", "rank", "rate"), [(None, None, 5e-5), (None, 4, 2e-4), (5e-5, 4, 5e-5)])
def test_adapters_have_a_learning_rate_of_their_own_which_is_said(given, rank, rate, capsys):
    args = SimpleNamespace(learning_rate=given, process_index=0)
    LoraOptions(lora_r=rank).set_learning_rate(args)
    assert args.learning_rate == rate
    said = "nextquill: learning rate 0.0002, the default for adapters; --learning_rate sets another\n"
    assert capsys.readouterr().err == (said if rate == 2e-4 else "")


@pytest.mark.parametrize(("given", "rate"), [(None, 2e-4), (5e-5, 5e-5)])
def test_an_adapter_as_the_model_has_it_too(given, rate, capsys):
    """Without --lora_r, as that is known only when the model is loaded."""
    args = SimpleNamespace(learning_rate=given, process_index=0)
    options = LoraOptions()
    options.set_learning_rate(args)
    assert args.learning_rate == 5e-5
    options.set_learning_rate(args, SimpleNamespace())
    assert args.learning_rate == 5e-5
    options.set_learning_rate(args, SimpleNamespace(peft_config={}))
    assert args.learning_rate == rate
    said = "nextquill: learning rate 0.0002, the default for adapters; --learning_rate sets another\n"
    assert capsys.readouterr().err == (said if given is None else "")


@pytest.mark.parametrize(("given", "rank", "rate"), [(None, 16, 2e-4), (None, 0, 5e-5), (1e-5, 16, 1e-5)])
def test_adapters_of_popi_have_the_same_learning_rate(given, rank, rate):
    args = SimpleNamespace(learning_rate=given, process_index=0)
    PopiLoraOptions(lora_r=rank).set_learning_rate(args)
    assert args.learning_rate == rate


@pytest.mark.parametrize("options", [LoraOptions(), PopiLoraOptions(lora_r=0)])
def test_quantised_weights_are_not_trained(options):
    with pytest.raises(ArgumentError, match=r"^lora_r: expected a rank, as a quantised model"):
        options.apply(SimpleNamespace(is_quantized=True))


@pytest.mark.parametrize("command", ["train", "inspect", "prepare", "evaluate"])
def test_a_models_folder_is_not_taken_for_a_new_model(nextquill, command, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    records = "--train_file" if command == "train" else "--records_file"
    output = () if command == "inspect" else ("--output_dir", "run")
    result = nextquill(command, "--model", "tiny", records, data / "train.jsonl", *output)
    assert result.code == 2
    assert "nextquill: --model: 'tiny' means a new model, and the folder tiny holds one; write ./tiny" in result.err
    assert not (tmp_path / "run").exists()


def test_prompt_settings_default():
    assert PromptOptions().settings(None, 512, None) == PromptSettings(PromptTemplate(), 512, None)


def test_prompt_settings_of_the_model_folder_are_kept():
    assert PromptOptions().settings(STORED, 512, None) == STORED


def test_prompt_flags_win_over_the_model_folder():
    options = PromptOptions(max_length=300, prompt_order="official", system_prompt="Be brief.", chat=False)
    settings = options.settings(STORED, 512, None)
    template = PromptTemplate(order="official", counterfactual="removal", system="Be brief.", chat=False)
    assert settings == PromptSettings(template, 300, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PromptOptions(max_length=0), "max_length: expected a positive number, got 0"),
        (PromptOptions(max_response_length=-1), "max_response_length: expected a positive number"),
        (PromptOptions(max_length=1025), "max_length: expected at most the model's context of 1024 tokens, got 1025"),
    ],
)
def test_prompt_lengths_that_cannot_be(options, message):
    with pytest.raises(ArgumentError, match=message):
        options.settings(None, 512, 1024)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        (LoraOptions(lora_r=0), "a", "lora_r: expected a positive number"),
        (LoraOptions(lora_r=2, lora_alpha=0), "a", "lora_alpha: expected a positive number"),
        (LoraOptions(lora_r=2, lora_dropout=1.0), "a", "lora_dropout: "),
        (LoraOptions(lora_alpha=2), "a", "lora_alpha: expected --lora_r with it"),
        (LoraOptions(lora_target_modules=["q_proj"]), "a", "lora_target_modules: expected --lora_r with it"),
        (LoraOptions(lora_r=2), "tiny", "lora_r: a new 'tiny' model has no trained weights to adapt"),
    ],
)
def test_lora_flags_that_do_not_fit(options, model, message):
    with pytest.raises(ArgumentError, match=message):
        options.check(model)


def test_lora_flags_left_out():
    LoraOptions().check("tiny")
    assert LoraOptions().apply("a model") == "a model"


def test_check_positive_skips_what_is_not_set():
    check_positive(PromptOptions(), ("max_length", "max_response_length"))


@pytest.mark.parametrize(("given", "alpha"), [(None, 8), (3, 3)])
def test_adapters_are_scaled_as_help_says(given, alpha):
    adapted = LoraOptions(lora_r=4, lora_alpha=given).apply(tiny_model())
    assert adapted.peft_config["default"].lora_alpha == alpha
