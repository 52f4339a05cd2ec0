"""`nextquill popi` and `popi train`: from pairs to two models, refusals, and files that are never lost."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model

from nextquill.cli import popi as command
from nextquill.models.loading import load_model
from nextquill.popi import POPIConfig
from nextquill.popi.saved_run import SavedRun
from tests.cli.conftest import LENGTHS, SIZES
from tests.snippets import make_model

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)

# ---- the command itself ----------------------------------------------------------------------------


def test_without_a_command_it_prints_the_help_and_fails(popi):
    result = popi()
    assert (result.code, result.out) == (2, "")
    assert all(name in result.err for name in command.SUBCOMMANDS)


def test_unknown_command_is_told_with_a_suggestion(popi):
    assert popi("trian") == (2, "", "nextquill: unknown command 'popi trian'; did you mean train?\n")
    assert "expected one of train, summarize" in popi("xyzzy").err


@pytest.mark.parametrize("name", command.SUBCOMMANDS)
def test_every_command_has_help_under_headings(popi, name):
    result = popi(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: nextquill popi {name}")
    assert not any(line.startswith("Popi") for line in result.out.splitlines()), "a dataclass's name for a heading"


@pytest.mark.parametrize("name", command.SUBCOMMANDS)
def test_a_wrong_flag_is_one_line(popi, name):
    result = popi(name, "--sumaries", "x")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "unknown flag --sumaries" in result.err
    assert result.err.endswith(f"see nextquill popi {name} --help\n")


# ---- train -----------------------------------------------------------------------------------------


def test_a_run_has_a_model_card_in_place_of_pefts(popi_trained):
    folder, _ = popi_trained
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "18 pairs of 3 users" in card
    assert "ipo, β 0.5" in card
    assert "1 step of 2 users" in card
    assert "| tokens of a summary | " in card
    assert str(folder.parent) not in card


def test_a_run_leaves_both_models_and_its_settings(popi_trained):
    folder, result = popi_trained
    names = {path.name for path in folder.iterdir()}
    wanted = {"popi.json", "inference", "generator", "base", "metrics.json", "sampled_summaries.jsonl", "checkpoint-1"}
    assert names >= wanted
    assert not [name for name in names if name.startswith(".")]
    run = SavedRun(folder)
    assert run.config == POPIConfig(
        objective="ipo", beta=0.5, group_size=2, pairs_per_user=2, signals_per_user=3, max_summary_tokens=6,
        max_signal_tokens=512, max_length=512,
    )  # fmt: skip
    assert (run.templates.instruction, run.templates.opening) == ("What does this person like?", "They")
    sampled = [json.loads(line)["summary"] for line in (folder / "sampled_summaries.jsonl").read_text().splitlines()]
    assert all(text.startswith("They") for text in sampled if text)
    assert run.writer().startswith("run@")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"eval_accuracy", "eval_accuracy_none", "eval_margin", "eval_loss"} <= metrics["eval"].keys()
    assert result.out == ""
    assert "3 of 3 users can be drawn from" in result.err
    assert "ipo with rloo" in result.err
    assert f"Saved the model to {folder}" in result.err
    assert "pairs " in result.err


def test_every_setting_is_a_flag(popi):
    out = popi("train", "--help").out
    assert all(f"--{name} " in out for name in POPIConfig().to_dict())


def test_a_finished_run_is_trained_further(popi_train, pairs, tmp_path):
    folder = tmp_path / "run"
    assert popi_train(folder, "--lora_r", 4).code == 0
    result = popi_train(folder, "--lora_r", 4, "--max_steps", 2, "--resume_from_checkpoint", "true")
    assert result.code == 0, result.err
    assert (folder / "checkpoint-2").is_dir()
    other = popi_train(folder, "--lora_r", 4, "--max_steps", 3, "--beta", 0.7, "--resume_from_checkpoint", "true")
    assert other.code == 1
    assert "written with another" in other.err
    elsewhere = ("--resume_from_checkpoint", folder / "checkpoint-1", "--max_steps", 3, "--beta", 0.7)
    assert "written with another" in popi_train(tmp_path / "new", "--lora_r", 4, *elsewhere).err
    assert not any((tmp_path / "new").iterdir()), "found out too late"
    shutil.rmtree(folder / "checkpoint-2" / "generator")
    missing = popi_train(folder, "--lora_r", 4, "--max_steps", 3, "--resume_from_checkpoint", "true")
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert "the generator adapter is missing" in missing.err


def test_separate_whole_models_and_a_frozen_one(popi_train, popi, pairs, tmp_path):
    folder = tmp_path / "run"
    models = ("--inference_model", "tiny", "--generator_model", "tiny", "--lora_r", 0)
    settings = ("--freeze_inference", "--reference_sees_summary")
    result = popi_train(folder, *models, *settings)
    assert result.code == 0, result.err
    assert {"inference", "generator"} <= {path.name for path in folder.iterdir()}
    flags = ("evaluate", "--model", folder, "--test_file", pairs / "test.jsonl", "--output_file", tmp_path / "e.json")
    result = popi(*flags)
    assert result.code == 0, result.err
    assert "--reference_model gives the untrained one" in result.err
    found = [_margin(tmp_path / "e.json", "signals")]
    result = popi(*flags, "--overwrite", "--reference_model", folder / "inference")  # began alike, and is frozen
    assert "--reference_model" not in result.err
    found += [_margin(tmp_path / "e.json", name) for name in ("none", "signals")]
    assert found[0] == 0, "the reference is the model itself, and sees what it sees"
    assert 0 not in found[1:]


def _margin(path, context):
    return json.loads(path.read_text())["generator"]["contexts"][context]["margin"]["value"]


@pytest.mark.parametrize("rank", [4, 0])
def test_adapters_have_the_learning_rate_of_train(popi, pairs, tmp_path, rank):
    models = ("--model", "tiny") if rank else ("--inference_model", "tiny", "--generator_model", "tiny")
    data = ("--train_file", pairs / "train.jsonl", "--output_dir", tmp_path / "run", *SIZES, *LENGTHS)
    result = popi("train", *data, *models, "--lora_r", rank, "--dry_run")
    assert result.code == 0, result.err
    assert f"learning rate     {'0.0002' if rank else '5e-05'}, linear" in result.out
    assert ("learning rate 0.0002, the default for adapters" in result.err) == bool(rank)


def test_roles_that_are_adapters_already_have_the_learning_rate_of_adapters(popi, pairs, tmp_path):
    make_model(tmp_path / "base")
    model, tokenizer = load_model(str(tmp_path / "base"))
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    data = ("--train_file", pairs / "train.jsonl", "--output_dir", tmp_path / "run", *SIZES, *LENGTHS)
    for other, rate in (("adapter", "0.0002"), ("base", "5e-05")):
        models = ("--inference_model", tmp_path / "adapter", "--generator_model", tmp_path / other, "--lora_r", 0)
        result = popi("train", *data, *models, "--dry_run")
        assert result.code == 0, result.err
        assert f"learning rate     {rate}, linear" in result.out


@pytest.fixture
def loaded_with(monkeypatch):
    """The arguments of every load of a model by the commands of popi."""
    found = []

    def recorded(name, **options):
        found.append({key: options.get(key) for key in ("dtype", "attn_implementation", "load_in_4bit")})
        return load_model(name, **options)

    for module in ("cli.popi_train", "cli.popi_evaluate", "popi.roles"):
        monkeypatch.setattr(f"nextquill.{module}.load_model", recorded)
    return found


def test_models_are_loaded_as_the_flags_say(popi_train, popi, popi_model, pairs, tmp_path, loaded_with):
    flags = ("--attn_implementation", "eager", "--dtype", "float32")
    result = popi_train(tmp_path / "run", *flags, "--lora_r", 4)
    assert result.code == 0, result.err
    evaluation = ("--model", popi_model, "--eval_file", pairs / "test.jsonl", "--transfer_model", popi_model / "base")
    result = popi("evaluate", *evaluation, *flags)
    assert result.code == 0, result.err
    summaries = ("--records_file", pairs / "test.jsonl", "--output_file", tmp_path / "s.jsonl")
    result = popi("summarize", "--model", popi_model, *summaries, *flags)
    assert result.code == 0, result.err
    assert loaded_with == [{"dtype": "float32", "attn_implementation": "eager", "load_in_4bit": False}] * 4


@pytest.mark.parametrize("command", ["evaluate", "summarize"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--revision", "v2"), "nextquill: unknown flag --revision; see nextquill popi "),
        (("--load_in_4bit",), "--load_in_4bit: needs the package bitsandbytes"),
        (("--load_in_8bit",), "--load_in_8bit: needs the package bitsandbytes"),
        (
            ("--attn_implementation", "nosuch"),
            'attn_implementation: ValueError: Specified `attn_implementation="nosuch"`',
        ),
    ],
)
def test_a_run_that_cannot_be_loaded_so_is_one_line(
    popi, popi_model, pairs, tmp_path, monkeypatch, command, words, message
):
    monkeypatch.setattr("nextquill.models.loading.importlib.util.find_spec", lambda name: None)
    more = ("--output_file", tmp_path / "s.jsonl") if command == "summarize" else ()
    result = popi(command, "--model", popi_model, "--records_file", pairs / "test.jsonl", *words, *more)
    assert result.code == 2
    assert message in result.err


WRONG_TRAINING = {
    "revision": (("--revision", "v2"), "--revision: expected a model on the hub with it, got tiny"),
    "revisions": (
        ("--inference_model", "a", "--generator_model", "b", "--revision", "v2"),
        "--revision: expected one --model with it, as each model has revisions of its own",
    ),
    "bits": (("--load_in_4bit",), "--load_in_4bit: a new 'tiny' model has no trained weights to quantise"),
    "file of another kind": (("--model", "absent.gguf"), "--model: there is no file absent.gguf"),
    "no model": (("--inference_model", "x"), "expected --model, or --inference_model and"),
    "setting": (("--objective", "kto"), "--objective: expected one of dpo, ipo, got 'kto'"),
    "rank": (("--lora_r", 0), "--lora_r: expected at least 1"),
    "new": (("--inference_model", "tiny", "--generator_model", "tiny"), "--lora_r: expected 0 with a new 'tiny'"),
    "alpha": (("--lora_alpha", 0), "--lora_alpha: expected a positive number"),
    "evaluation": (("--eval_strategy", "steps"), "--eval_strategy: expected --eval_file with it"),
    "metric": (("--metric_for_best_model", "bleu"), "--metric_for_best_model: expected one of accuracy, margin, loss"),
    "type": (("--group_size", "many"), "argument --group_size"),
    "model": (("--model_name_or_path", "./nothing"), "--model: there is no folder ./nothing"),
    "file": (("--train_file", "nothing.jsonl"), "--train_file: nothing.jsonl"),
    "format": (("--format", "xml"), "argument --format"),
    "instruction": (("--instruction", " "), "--instruction: expected some text"),
    "tokens": (("--max_tokens", 0), "--max_tokens: expected a positive number"),
    "budget": (("--max_length", 20), "max_length"),
    "signals": (("--max_signal_tokens", 5), "max_"),
}


@pytest.mark.parametrize("what", WRONG_TRAINING)
def test_bad_input_is_one_line_and_touches_nothing(popi_train, tmp_path, what):
    words, message = WRONG_TRAINING[what]
    result = popi_train(tmp_path / "run", *words)
    assert result.code in (1, 2)
    assert message in result.err
    assert result.err.count("\n") == 1, result.err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_records_without_pairs_and_users_with_one_signal(popi_train, make_records, tmp_path, write_pairs):
    plain = make_records(tmp_path / "plain.jsonl", 4)
    result = popi_train(tmp_path / "run", "--train_file", plain)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "--train_file: records: expected some with 'chosen' and 'rejected'" in result.err
    few = write_pairs(tmp_path / "few.jsonl", pairs=2)
    result = popi_train(tmp_path / "run", "--train_file", few)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "--train_file: " in result.err
    assert "too few signals" in result.err


def test_another_runs_folder_is_not_replaced_without_asking(popi_train, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    result = popi_train(tmp_path)
    assert result.code == 1
    assert "files, but not a nextquill run" in result.err


def test_public_pairs_are_read_by_format(popi_train, tmp_path):
    path = tmp_path / "fspo.jsonl"
    rows = [
        {"prompt": f"q{u}{k}", "chosen": f"Yes {u}{k} sir.", "rejected": f"No {u}{k}, never.", "user_id": f"u{u}"}
        for u in range(2)
        for k in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = popi_train(tmp_path / "run", "--train_file", path, "--format", "preferences")
    assert result.code == 0, result.err
    assert "2 of 2 users" in result.err
    assert "; 10 pairs" in result.err
    forgotten = popi_train(tmp_path / "other", "--train_file", path)
    assert forgotten.code == 1
    assert "field 'history': required, but missing; --format preferences reads rows of prompt, chosen" in forgotten.err
    assert not (tmp_path / "other").exists()
