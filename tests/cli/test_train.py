"""`nextquill train`: its files, repeatable results, and refusals before any work."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nextquill.cli import training_checks
from nextquill.cli.train import final_metrics
from nextquill.models.loading import load_prompt_settings
from nextquill.storage.checkpoints import STAGING, found_checkpoints
from nextquill.storage.manifests import damage

FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "nextquill_prompt.json",
    "nextquill_run.json",
    "metrics.json",
}


def weights(folder):
    return load_file(folder / "model.safetensors")


def is_untouched(folder):
    """Whether a folder is missing or empty."""
    return not folder.exists() or not any(folder.iterdir())


def assert_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_a_model_its_prompt_and_its_metrics(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= FILES | {"checkpoint-2"}
    assert not [name for name in names if name.startswith(".")]
    settings = load_prompt_settings(trained)
    assert settings.max_length == 1024
    assert settings.template.chat is False, "the tokenizer has no chat template"
    assert load_prompt_settings(trained / "checkpoint-2") == settings
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"eval_loss", "eval_nll_factual", "eval_effect_placebo"} <= metrics["eval"].keys()
    assert any("loss_factual" in entry for entry in metrics["log_history"])


def test_what_a_run_prints(train, data, tmp_path):
    result = train(tmp_path / "run", "--eval_file", data / "eval.jsonl")
    assert result.out == ""
    lines = result.err.splitlines()
    assert lines[0].startswith("8 examples, ")
    assert lines[1].endswith("trainable parameters, loss perce")
    assert lines[2].startswith("step 1/2  loss ")
    assert lines[3].startswith("step 2/2  loss "), "of the last step, although no log was due"
    assert lines[4].startswith("step 2/2  evaluation: loss ")
    assert "another user's" in lines[4]
    assert lines[5].startswith("Trained 2 steps in ")
    assert lines[6] == f"Saved the model to {tmp_path / 'run'} (log and evaluation: metrics.json, checkpoint-2)"


def test_the_commands_that_a_run_recommends_work(nextquill, train, data, tmp_path):
    result = train(tmp_path / "a run", "--eval_file", data / "eval.jsonl")
    *_, heading, evaluate, generate = result.err.splitlines()
    assert heading == "Next:"
    for command, more in ((evaluate, ("--generate", "false")), (generate, ("--max_new_tokens", 2))):
        done = nextquill(*shlex.split(command)[1:], *more)
        assert done.code == 0, done.err


def test_the_same_seed_gives_the_same_weights(train, trained, data, tmp_path):
    assert train(tmp_path / "again", "--eval_file", data / "eval.jsonl").code == 0
    assert_same_weights(tmp_path / "again", trained)


def test_another_seed_gives_others(train, trained, tmp_path):
    assert train(tmp_path / "other", "--seed", 7).code == 0
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights(tmp_path / "other")[name], weights(trained)[name])


@pytest.mark.parametrize(
    "words",
    [("sft",), ("perce",), ("longce",), ("nextquill", "--detach_counterfactual", "true", "--reduction", "token")],
    ids=lambda words: words[0],
)
def test_every_loss_trains(train, tmp_path, words):
    result = train(tmp_path / "run", "--max_steps", 1, "--loss", *words)
    assert result.code == 0, result.err
    assert f"loss {words[0]}" in result.err


def test_a_config_file_trains_as_its_flags_do(nextquill, trained, data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"train_file: {data / 'train.jsonl'}\neval_file: {data / 'eval.jsonl'}\n"
        "model_name_or_path: tiny\nmax_steps: 2\n"
        f"per_device_train_batch_size: 4\nlearning_rate: 1e-3\neval_strategy: no\noutput_dir: {tmp_path / 'other'}\n"
    )
    result = nextquill("train", "--config", config, "--output_dir", tmp_path / "run")
    assert result.code == 0, result.err
    assert not (tmp_path / "other").exists()
    assert_same_weights(tmp_path / "run", trained)


def test_resuming_gives_the_weights_of_an_uninterrupted_run(train, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    schedule = ("--max_steps", 4, "--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", 2)
    assert train(whole, *schedule).code == 0
    assert train(halves, *schedule, "--max_steps", 2).code == 0
    result = train(halves, *schedule, "--resume_from_checkpoint")
    assert result.code == 0, result.err
    assert_same_weights(halves, whole)


# ---- a full disk -------------------------------------------------------------------------------------

#: A checkpoint after each step.
STEPWISE = ("--max_steps", 3, "--save_steps", 1, "--save_total_limit", 9)
#: Trains with a limit on the size of a file, which the system treats as it treats a full disk.
LIMITED = """
import resource, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
from nextquill.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
MAIN = "import sys; from nextquill.cli.main import main; sys.exit(main(sys.argv[1:]))"
#: Trains on a disk of $1 bytes; then, with room again, resumes and copies the results away.
ON_A_SMALL_DISK = """
set -u
size=$1 disk=$2 kept=$3; shift 3
mount -t tmpfs -o size=$size none "$disk" || exit 99
"$@" 2>"$kept/err"; echo $? >"$kept/code"
cp -r "$disk" "$kept/stopped"
mount -o remount,size=64m "$disk"
if [ -e "$disk"/run/checkpoint-1 ]; then again="--resume_from_checkpoint true"; else again=--overwrite; fi
"$@" $again 2>"$kept/err_again" && cp -r "$disk/run" "$kept/run"
"""


@pytest.fixture(scope="session")
def stepwise(train, tmp_path_factory):
    """An uninterrupted run with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("runs") / "stepwise"
    result = train(folder, *STEPWISE)
    assert result.code == 0, result.err
    return folder


def separately(data, folder, *words):
    """The words of the command that trains as `stepwise` does, for a process of its own."""
    files = ("--train_file", data / "train.jsonl", "--model", "tiny", "--output_dir", folder)
    sizes = ("--per_device_train_batch_size", 4, "--learning_rate", 1e-3, *STEPWISE)
    return list(map(str, ("train", *files, *sizes, *words)))


def assert_no_room(code, err, folder, reason, kept):
    """The training has ended with one line, which says what is left."""
    assert int(code) == 1, err
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert re.fullmatch(rf"nextquill: {re.escape(str(folder))} cannot be written: {reason}; {kept}", said)


WHOLE = "checkpoint-1 is whole, so resume when there is room"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
@pytest.mark.parametrize(("size", "reason"), [(100_000, "File too large"), (600_000, r"is the disk full\?")])
def test_a_full_disk_costs_no_checkpoint(train, stepwise, data, tmp_path, size, reason):
    """The model does not fit in the first case; in the second the optimizer's state does not."""
    stopped = tmp_path / "stopped"
    for name in ("checkpoint-1", "nextquill_run.json", "nextquill_prompt.json"):
        copy = shutil.copytree if (stepwise / name).is_dir() else shutil.copy
        stopped.mkdir(exist_ok=True)
        copy(stepwise / name, stopped / name)
    words = separately(data, stopped, "--resume_from_checkpoint", "true")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), *words], capture_output=True, text=True, timeout=150, check=False
    )
    assert_no_room(done.returncode, done.stderr, stopped, reason, WHOLE)
    assert not (stopped / STAGING).exists()
    assert train(stopped, *STEPWISE, "--resume_from_checkpoint", "true").code == 0
    assert_same_weights(stopped, stepwise)


def _namespace():
    """The words before a command that may mount file systems which nobody else sees; None where that is not allowed."""
    for words in (["unshare", "-rm"], ["unshare", "-m"]):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            mounts = [*words, "mount", "-t", "tmpfs", "none", "/mnt"]
            if subprocess.run(mounts, capture_output=True, timeout=20, check=False).returncode == 0:
                return words
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "reason", "kept"),
    [
        (0.3, "No space left on device", "it holds no checkpoint yet"),
        (0.9, r"(No space left on device|is the disk full\?)", "it holds no checkpoint yet"),
        (1.2, "No space left on device", WHOLE),
        (1.7, r"(No space left on device|is the disk full\?)", WHOLE),
    ],
    ids=["no model", "no state", "no second model", "no second state"],
)
def test_a_disk_that_is_really_full(stepwise, data, tmp_path, share, reason, kept):
    """A file system in memory, whose size is this share of a checkpoint's."""
    namespace = _namespace()
    if namespace is None:
        pytest.skip("this machine does not let a test mount a file system")
    size = int(share * sum(path.stat().st_size for path in (stepwise / "checkpoint-1").iterdir()))
    disk, results = tmp_path / "disk", tmp_path / "results"
    disk.mkdir()
    results.mkdir()
    command = [sys.executable, "-c", MAIN, *separately(data, disk / "run")]
    script = [*namespace, "bash", "-c", ON_A_SMALL_DISK, "bash", str(size), str(disk), str(results), *command]
    subprocess.run(script, capture_output=True, timeout=170, check=True)
    assert_no_room((results / "code").read_text(), (results / "err").read_text(), disk / "run", reason, kept)
    stopped = results / "stopped" / "run"
    assert [path.name for path in found_checkpoints(stopped)] == (["checkpoint-1"] if kept == WHOLE else [])
    assert not (stopped / STAGING).exists()
    for path in found_checkpoints(stopped):
        assert damage(path) is None
        assert_same_weights(path, stepwise / path.name)
    assert_same_weights(results / "run", stepwise)


def test_resuming_a_finished_run_changes_nothing(train, trained, tmp_path):
    assert train(tmp_path / "run").code == 0
    assert train(tmp_path / "run", "--resume_from_checkpoint", "true").code == 0
    assert_same_weights(tmp_path / "run", trained)


def test_the_best_model_is_the_one_saved(train, data, tmp_path):
    words = ("--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--learning_rate", 10.0)
    folder = tmp_path / "run"
    result = train(folder, "--eval_file", data / "eval.jsonl", *words, "--load_best_model_at_end",
                   "--metric_for_best_model", "nll_factual")  # fmt: skip
    assert result.code == 0, result.err
    metrics = json.loads((folder / "metrics.json").read_text())
    nlls = {log["step"]: log["eval_nll_factual"] for log in metrics["log_history"] if "eval_nll_factual" in log}
    best = min(nlls, key=nlls.get)
    assert_same_weights(folder, folder / f"checkpoint-{best}")


def test_budget_and_histories_that_were_dropped_are_told(train, nextquill, data, make_records, tmp_path):
    result = train(tmp_path / "a", "--max_length", 100, "--max_steps", 1)
    assert "history items dropped to fit 100 tokens" in result.err
    file = make_records(tmp_path / "bare.jsonl", 4, history=[])
    words = ("--model_name_or_path", "tiny", "--max_steps", 1, "--output_dir", tmp_path / "b")
    assert "4 examples have no history" in nextquill("train", "--train_file", file, *words).err


def test_half_precision_weights_are_warned_of(train, trained, tmp_path):
    result = train(tmp_path / "run", "--model_name_or_path", trained, "--dtype", "bfloat16", "--max_steps", 1)
    assert result.code == 0, result.err
    assert "half precision" in result.err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_says_what_to_install(train, tmp_path, monkeypatch, name):
    monkeypatch.setattr(training_checks, "find_spec", lambda package: None)
    result = train(tmp_path / "run", "--report_to", name)
    assert result.code == 1
    assert result.err == f"nextquill: --report_to: {name} is not installed; pip install 'nextquill[{name}]'\n"
    assert is_untouched(tmp_path / "run")


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr_scheduler_type slow", "argument --lr_scheduler_type: invalid choice: 'slow'"),
        ("--lr_scheduler_kwargs slow", "--lr_scheduler_kwargs: expected a JSON mapping, got 'slow'"),
        ('--lr_scheduler_kwargs {"slow":1}', "--lr_scheduler_kwargs: "),
        ("--optim adamw_bnb_8bit", "--optim: "),
        ("--optim_args fast", "--optim_args: "),
        ("--eval_strategy steps", "--eval_strategy: expected --eval_file with it"),
        ("--save_strategy best --metric_for_best_model loss", "--save_strategy: expected --eval_file with it"),
        ("--eval_file EVAL --load_best_model_at_end", "--load_best_model_at_end requires the save and eval strategy"),
        ("--eval_file EVAL --metric_for_best_model bleu", "--metric_for_best_model: expected one of loss, nll_factual"),
        ("--report_to nothing", "nothing is not supported, only"),
        ("--accelerator_config no.json", "--accelerator_config: [Errno 2] No such file or directory: 'no.json'"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size: expected a positive number, got 0"),
        ("--max_skipped_steps -1", "--max_skipped_steps: expected at least 0, got -1"),
        ("--learning_rate -1", "--learning_rate: expected a number of at least 0, got -1.0"),
        ("--max_steps 0 --num_train_epochs 0", "--num_train_epochs: expected a positive number, got 0.0"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor: 0.1 is not supported"),
        ("--loss sft --alpha 0.1", "--alpha: --loss sft has no such option"),
        ("--max_length 100000", "--max_length: expected at most the model's context of 4096 tokens"),
        ("--chat true", "chat: expected a tokenizer with a chat template"),
        ("--lora_r 4", "--lora_r: a new 'tiny' model has no trained weights to adapt"),
        ("--max_stps 3", "unknown flag --max_stps; did you mean --max_steps?"),
    ],
)
def test_a_wrong_value_is_named_before_any_work(train, data, tmp_path, words, message):
    result = train(tmp_path / "run", *words.replace("EVAL", str(data / "eval.jsonl")).split())
    assert result.code == 2, result.err
    assert result.err.startswith("nextquill: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert is_untouched(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no records, the file is empty"),
        ("{", "line 1: not valid JSON"),
        (
            '{"user_id": "a", "query": "q", "response": "", "history": []}',
            "line 1: field 'response': expected some text",
        ),
        (
            '{"user_id": "a", "query": "q", "response": 3, "history": []}',
            "line 1: field 'response': expected a string, got int",
        ),
        ('\n{"user_id": "a", "query": "q", "response": "r"}', "line 2: field 'history': required, but missing"),
    ],
)
@pytest.mark.parametrize("flag", ["train_file", "eval_file"])
def test_a_bad_record_is_named_by_flag_line_and_field(train, tmp_path, text, message, flag):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    result = train(tmp_path / "run", f"--{flag}", file)
    assert result.code == 1
    assert result.err.startswith(f"nextquill: --{flag}: {file}")
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_a_query_that_alone_exceeds_the_context(train, make_records, tmp_path):
    file = make_records(tmp_path / "long.jsonl", 2, query="salty soup " * 3000)
    result = train(tmp_path / "run", "--eval_file", file)
    assert result.code == 1
    assert result.err.startswith("nextquill: --eval_file: record 0 (user 'u0'): the prompt without any history takes")
    assert not (tmp_path / "run").exists()


def test_missing_files(train, tmp_path):
    result = train(tmp_path / "run", "--train_file", tmp_path / "no.jsonl")
    assert result.code == 1
    assert result.err == f"nextquill: --train_file: {tmp_path}/no.jsonl: cannot be read: No such file or directory\n"


def test_an_output_folder_that_holds_another_run(train, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    result = train(trained)
    assert result.code == 1
    assert "holds another run" in result.err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_a_mistake_does_not_cost_the_run_that_was_to_be_replaced(train, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "--max_steps", 1).code == 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    assert train(folder, "--overwrite_output_dir", "--train_file", bad).code == 1
    assert (folder / "checkpoint-1").is_dir()
    assert train(folder, "--overwrite_output_dir").code == 0
    assert not (folder / "checkpoint-1").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--learning_rate", 0.5), "another --learning_rate: there 0.001, here 0.5"),
        (("--per_device_train_batch_size", 2), "--per_device_train_batch_size x --gradient_accumulation_steps x"),
        (("--max_length", 300), "another --max_length: there 1024, here 300"),
    ],
)
def test_a_resume_with_another_setting_is_refused(train, trained, tmp_path, words, said):
    result = train(tmp_path / "run", "--resume_from_checkpoint", trained / "checkpoint-2", *words)
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert said in result.err
    assert is_untouched(tmp_path / "run")


def test_a_step_that_is_not_finite_ends_the_run(train, tmp_path):
    """A step of 1e15 is finite; the next loss is not."""
    folder = tmp_path / "run"
    result = train(folder, "--learning_rate", 1e15, "--max_steps", 3, "--logging_steps", 1)
    assert result.code == 1
    assert re.search(r"nextquill: step \d: the (loss|gradient's norm) is not finite, with example \d", result.err)
    assert "loss 0.000" not in result.err
    assert not (folder / "model.safetensors").exists()
    wrong = train(folder, "--overwrite", "--max_skipped_steps", -1)
    assert (wrong.code, wrong.err) == (2, "nextquill: --max_skipped_steps: expected at least 0, got -1\n")


def test_no_checkpoint_to_resume_from(train, tmp_path):
    result = train(tmp_path / "run", "--resume_from_checkpoint", "true")
    assert result.code == 1
    assert f"resume_from_checkpoint: expected a checkpoint in {tmp_path / 'run'}, found none" in result.err


def test_a_checkpoint_of_another_loss_or_model(train, nextquill, trained, data, tmp_path):
    words = ("--resume_from_checkpoint", trained / "checkpoint-2")
    result = train(tmp_path / "run", *words, "--loss", "sft")
    assert result.code == 1
    assert "another loss" in result.err
    small = train(tmp_path / "run2", *words, "--model_name_or_path", "small")
    assert small.code == 1
    assert "resume_from_checkpoint: " in small.err
    assert is_untouched(tmp_path / "run")
    assert is_untouched(tmp_path / "run2")


def test_a_checkpoint_of_another_vocabulary(train, trained, make_records, tmp_path):
    other = make_records(tmp_path / "other.jsonl", 8, seed=9, query="entirely different words here")
    result = train(tmp_path / "run", "--train_file", other, "--resume_from_checkpoint", trained / "checkpoint-2")
    assert result.code == 1
    assert "was trained with another vocabulary" in result.err


# ---- LoRA --------------------------------------------------------------------------------------


def test_adapters_train_and_are_measured_with_their_base(train, nextquill, trained, data, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)  # a base given by a relative path is found from elsewhere
    folder = tmp_path / "lora"
    result = train(folder, "--model_name_or_path", trained.name, "--lora_r", 2, "--max_length", 600)
    assert result.code == 0, result.err
    assert not (folder / "model.safetensors").exists()
    assert load_prompt_settings(folder).max_length == 600
    monkeypatch.chdir(tmp_path)
    again = train(tmp_path / "more", "--model_name_or_path", folder, "--max_steps", 1)
    assert again.code == 0, again.err
    for place in (folder, folder / "checkpoint-2", tmp_path / "more"):
        measured = nextquill("evaluate", "--model_name_or_path", place, "--eval_file", data / "eval.jsonl",
                             "--generate", "false")  # fmt: skip
        assert measured.code == 0, measured.err
    words = ("--train_file", data / "train.jsonl", "--model", folder, "--output_dir", tmp_path / "dry", "--dry_run")
    assert re.search("learning rate +0.0002, linear", nextquill("train", *words).out)
    nested = train(tmp_path / "nested", "--model_name_or_path", folder, "--lora_r", 2)
    assert nested.code == 2
    assert "the model already has an adapter" in nested.err


def test_adapters_on_modules_that_are_not_there(train, trained, tmp_path):
    words = ("--model_name_or_path", trained, "--lora_r", 2, "--lora_target_modules", "nowhere")
    result = train(tmp_path / "run", *words)
    assert result.code == 2
    assert result.err.startswith("nextquill: --lora_target_modules: Target modules")


def test_final_metrics_are_those_of_the_model_that_is_saved():
    log = {"eval_loss": 1.0, "step": 3}
    state = SimpleNamespace(log_history=[log], global_step=3)
    trainer = SimpleNamespace(state=state, evaluate=lambda: {"eval_loss": 2.0})
    for best, loss in ((False, 1.0), (True, 2.0)):
        trainer.args = SimpleNamespace(load_best_model_at_end=best)
        assert final_metrics(trainer) == {"eval_loss": loss}
        assert final_metrics(trainer, may_evaluate=False) == ({} if best else {"eval_loss": loss})


@pytest.mark.parametrize(("count", "said"), [(81920, "81,920"), (4_884_480, "4.9M")])
def test_the_number_of_trainable_parameters_is_never_nothing(count, said):
    from nextquill.cli.train import trainable

    assert trainable([SimpleNamespace(numel=lambda: count)]) == f"{said} trainable parameters"


def test_why_a_run_pads_its_rows_is_told_once(train, trained, tmp_path):
    words = ("--model_name_or_path", trained, "--lora_r", 2, "--lora_dropout", 0.1)
    result = train(tmp_path / "dropout", *words, "--max_steps", 1)
    assert result.code == 0, result.err
    assert (
        result.err.count("nextquill: attention: 'auto' computes every branch of a training batch in a padded row") == 1
    )
    assert "lora_dropout.default.p=0.1" in result.err
    assert "or use --attention padded" in result.err
    named = train(tmp_path / "named", *words, "--max_steps", 1, "--attention", "padded")
    assert "attention: " not in named.err
