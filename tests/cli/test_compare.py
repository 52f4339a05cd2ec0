"""`nextquill compare`: its files, its resume after a stop, and refusals before any work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextquill.comparison import arms as registry
from nextquill.comparison.measuring import RunMeter
from nextquill.evaluation.results import read_evaluation, read_examples
from nextquill.models.loading import load_prompt_settings

ARMS = ("sft", "perce")


def words(data, folder, *more, seeds=(0,), arms=ARMS):
    files = ["--train_file", data / "train.jsonl", "--eval_file", data / "eval.jsonl", "--output_dir", folder]
    sizes = ["--max_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--resamples", 50]
    model = ["--model_name_or_path", "tiny", "--generate", "false"]
    return ["compare", *files, *model, *sizes, "--arms", *arms, "--seeds", *seeds, *more]


@pytest.fixture(scope="module")
def compared(nextquill, data, tmp_path_factory):
    """A finished comparison with its models, which tests only read or copy."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    generating = ("--generate", "true", "--generate_limit", 2, "--max_new_tokens", 2, "--save_models")
    result = nextquill(*words(data, folder, *generating, seeds=(0, 1)))
    assert result.code == 0, result.err
    return folder, result, generating


def test_what_a_comparison_leaves_and_prints(compared):
    folder, result, _ = compared
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    files = {"comparison.json", "comparison.md", "report.html", "nextquill_comparison.json"}
    assert names == {"base", *ARMS, *files}
    for title in ("What they reach", "Difference from SFT", "What they cost", "How far it reaches"):
        assert title in result.out
    for meaning in ("nats per token", "*: a clear difference, better or worse", "Warning: Only 4 people."):
        assert meaning in result.out.replace("\n", " ")
    lines = result.err.splitlines()
    assert lines[0] == "nextquill: run 1 of 6: the model before training, seed 0"
    assert any(line.startswith("nextquill: run 5 of 6: SFT, seed 1 (about ") for line in lines)
    assert lines[-1] == "nextquill: wrote " + ", ".join(
        str(folder / name) for name in ("comparison.json", "comparison.md", "report.html")
    )
    page = (folder / "report.html").read_text()
    for part in ("PerCE", "The runs of seed 0.", "Texts and tokens", "How to read this"):
        assert part in page
    assert load_prompt_settings(folder / "sft" / "seed-0").max_length == 1024


def test_figures_are_those_of_the_evaluations(compared):
    folder, _, _ = compared
    comparison = json.loads((folder / "comparison.json").read_text())
    assert (comparison["seeds"], comparison["baseline"], comparison["num_train_examples"]) == ([0, 1], "sft", 8)
    assert [arm["name"] for arm in comparison["arms"]] == ["base", *ARMS]
    evaluations = [read_evaluation(folder / name / f"seed-{seed}" / "evaluation") for name in ARMS for seed in (0, 1)]
    assert len({evaluation.records for evaluation in evaluations}) == 1
    sft = comparison["arms"][1]
    assert sft["estimates"]["nll_factual"]["by_seed"] == [each.metrics["nll_factual"].value for each in evaluations[:2]]
    assert sft["cost"]["steps"] == 2
    assert {"rouge_l", "effect_placebo"} <= comparison["measures"].keys()


def test_an_arm_is_trained_as_nextquill_train_would(compared, nextquill, data, train, tmp_path):
    folder, _, _ = compared
    for name, seed in (("sft", 0), ("perce", 1)):
        assert train(tmp_path / name, "--loss", name, "--seed", seed).code == 0
        own, theirs = (
            load_file(place / "model.safetensors") for place in (folder / name / f"seed-{seed}", tmp_path / name)
        )
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) for key in own)


def test_a_finished_comparison_is_not_repeated(compared, nextquill, data, tmp_path):
    folder, first, generating = compared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("run.json")}
    figures = (folder / "comparison.json").read_bytes()
    again = nextquill(*words(data, folder, *generating, seeds=(0, 1)))
    assert again.code == 0, again.err
    assert again.err.splitlines()[0] == f"nextquill: 6 of 6 runs are finished in {folder}"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "comparison.json").read_bytes() == figures
    assert again.out == first.out


def test_a_shell_of_a_cluster_that_names_several_processes_runs_one(compared, nextquill, data, monkeypatch):
    folder, _, generating = compared
    monkeypatch.setenv("WORLD_SIZE", "2")
    again = nextquill(*words(data, folder, *generating, seeds=(0, 1)))
    assert again.code == 0, again.err
    assert again.err.splitlines()[0] == f"nextquill: 6 of 6 runs are finished in {folder}"


def test_an_arm_that_is_added_is_the_only_one_run_and_equals_what_it_copies(
    compared, nextquill, data, tmp_path, monkeypatch
):
    folder, _, generating = compared
    shutil.copytree(folder, tmp_path / "out")
    twin = registry.Arm("twin", "SFT again", registry.SFTLoss)
    monkeypatch.setattr(registry, "ARMS", {**registry.ARMS, "twin": twin})
    result = nextquill(*words(data, tmp_path / "out", *generating, seeds=(0, 1), arms=(*ARMS, "twin")))
    assert result.code == 0, result.err
    assert all("SFT again, seed" in line for line in result.err.splitlines() if ": run " in line)
    assert sum(": run " in line for line in result.err.splitlines()) == 2
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    against = next(arm for arm in comparison["arms"] if arm["name"] == "twin")["against"]["sft"]
    for name in ("nll_factual", "effect_placebo", "rouge_l"):
        assert (against[name]["value"], against[name]["p_value"]) == (0.0, 1.0), name


def test_settings_that_differ_are_named(compared, nextquill, data):
    folder, _, generating = compared
    for more, name in (
        (("--learning_rate", 0.1), "learning_rate: there 0.001, here 0.1"),
        (("--max_length", 500), "prompt max_length: there 1024, here 500"),
        (("--generate_limit", 1), "evaluation generate_limit: there"),
        (("--lora_dropout", 0.5), "lora lora_dropout: there"),
        (("--train_file", data / "eval.jsonl"), "train_file: there"),
        (("--reduction", "token"), "loss reduction: there None, here 'token'"),
    ):
        result = nextquill(*words(data, folder, *generating, *more))
        assert result.code == 1, result.err
        assert f"--output_dir: {folder} holds a comparison with another {name}" in result.err


def test_another_baseline_or_level_needs_no_new_run(compared, nextquill, data, tmp_path):
    folder, _, generating = compared
    shutil.copytree(folder, tmp_path / "out")
    result = nextquill(*words(data, tmp_path / "out", *generating, "--baseline", "perce", "--level", 0.8, seeds=(0, 1)))
    assert result.code == 0, result.err
    assert "Difference from PerCE" in result.out
    assert ": run " not in result.err


@pytest.fixture(scope="module")
def uninterrupted(nextquill, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    result = nextquill(*words(data, folder, "--max_steps", 3))
    assert result.code == 0, result.err
    return folder


def assert_same_results(folder, other):
    for name in ARMS:
        one, two = (place / name / "seed-0" / "evaluation" for place in (folder, other))
        assert (one / "examples.jsonl").read_bytes() == (two / "examples.jsonl").read_bytes()
        assert read_evaluation(one) == read_evaluation(two)
    records = [json.loads((place / "sft" / "seed-0" / "run.json").read_text()) for place in (folder, other)]
    assert records[0]["order"] == records[1]["order"]


def test_ctrl_c_saves_and_the_same_command_goes_on(uninterrupted, nextquill, data, tmp_path, monkeypatch):
    step_end = RunMeter.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 1 and "perce" in args.output_dir:
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RunMeter, "on_step_end", on_step_end)
        stopped = nextquill(*words(data, folder, "--max_steps", 3))
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == "nextquill: stopped; the same command resumes"
    assert not (folder / "comparison.json").exists()
    assert list((folder / "perce" / "seed-0").glob("checkpoint-*"))
    resumed = nextquill(*words(data, folder, "--max_steps", 3))
    assert resumed.code == 0, resumed.err
    assert resumed.err.startswith(f"nextquill: 2 of 3 runs are finished in {folder}\n")
    assert "These runs were interrupted and resumed" in (folder / "comparison.md").read_text()
    assert_same_results(folder, uninterrupted)


def test_ctrl_c_while_evaluating(uninterrupted, nextquill, data, tmp_path, monkeypatch):
    from nextquill.evaluation import evaluate

    scored, calls = evaluate.effect_line, []

    def effect_line(*args):
        calls.append(args)
        if len(calls) == 8:  # three lines into the second run's five
            raise KeyboardInterrupt
        return scored(*args)

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "effect_line", effect_line)
        stopped = nextquill(*words(data, folder, "--max_steps", 3))
    assert stopped.code == 130
    assert len((folder / "sft" / "seed-0" / "evaluation" / "effects.jsonl.partial").read_text().splitlines()) == 3
    assert nextquill(*words(data, folder, "--max_steps", 3)).code == 0
    assert_same_results(folder, uninterrupted)


def test_adapters_of_a_model_that_is_there(trained, nextquill, data, tmp_path):
    """One base for both seeds, adapters that begin alike for the arms of a seed, and a placebo that is everyone's."""
    model = shutil.copytree(trained, tmp_path / "model")
    words_ = words(data, tmp_path / "out", "--lora_r", 2, seeds=(0, 1))
    words_[words_.index("tiny")] = model
    result = nextquill(*words_)
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "out" / "base").iterdir()] == ["seed-0"]
    starts = {
        (name, seed): json.loads((tmp_path / "out" / name / f"seed-{seed}" / "run.json").read_text())["start"]
        for name in ARMS
        for seed in (0, 1)
    }
    assert starts["sft", 0] == starts["perce", 0] != starts["sft", 1] == starts["perce", 1]
    weights = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused = nextquill(*words_)
    assert "holds a comparison with another model: there" in refused.err


def test_what_a_trainer_refuses_is_refused_before_the_first_run(trained, nextquill, data, tmp_path):
    words_ = words(data, tmp_path / "out", "--lora_r", 2, "--lora_dropout", 0.1, "--attention", "pieces")
    words_[words_.index("tiny")] = trained
    result = nextquill(*words_)
    assert result.code == 1
    assert result.err.startswith("nextquill: dropout: ")
    assert not (tmp_path / "out").exists()


def test_equal_time(nextquill, data, tmp_path):
    arms = ("sft", "sft_time", "perce")
    result = nextquill(*words(data, tmp_path / "out", "--time_reference", "perce", arms=arms))
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "out" / "sft_time" / "seed-0" / "run.json").read_text())
    perce = json.loads((tmp_path / "out" / "perce" / "seed-0" / "run.json").read_text())
    sft = json.loads((tmp_path / "out" / "sft" / "seed-0" / "run.json").read_text())
    assert record["matched"]["seconds"] == perce["seconds"]
    assert record["steps"] == -(-perce["seconds"] / sft["seconds"] * sft["steps"] // 1)
    assert "to match" in (tmp_path / "out" / "comparison.md").read_text()
    assert "One seed (0)" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--arms", "sft", "nexquill"], 2, "--arms: no arm 'nexquill'; did you mean nextquill?"),
        (["--arms", "perce"], 2, "--baseline: expected one of the arms (perce), got 'sft'"),
        (["--arms", "sft", "sft_time"], 2, "--arms: sft_time expects nextquill_detached among them"),
        (["--seeds", 0, 0], 2, "--seeds: 0 is given twice"),
        (["--seeds", -1], 2, "--seeds: expected whole numbers from 0"),
        (["--seeds", "x"], 2, "argument --seeds: invalid int value: 'x'"),
        (["--seed", 42], 2, "--seed: not for comparisons: each run has one of --seeds"),
        (["--data_seed", 1], 2, "--data_seed: not for comparisons"),
        (["--run_name", "x"], 2, "--run_name: not for comparisons"),
        (["--resume_from_checkpoint"], 2, "--resume_from_checkpoint: not for comparisons: the same command resumes"),
        (["--load_best_model_at_end", "true", "--eval_strategy", "steps"], 2, "--load_best_model_at_end: not for"),
        (
            ["--save_strategy", "best", "--metric_for_best_model", "loss"],
            2,
            "--save_strategy: not for comparisons: best would",
        ),
        (["--push_to_hub", "true"], 2, "--push_to_hub: not for comparisons"),
        (["--per_device_train_batch_size", 0], 2, "--per_device_train_batch_size: expected a positive number"),
        (["--reduction", "median"], 2, "argument --reduction: invalid choice: 'median'"),
        (["--chunk_bytes", 0], 2, "--chunk_bytes: expected"),
        (["--level", 1.5], 2, "--level: expected a share between 0 and 1, got 1.5"),
        (["--resamples", 0], 2, "--resamples: expected at least 1, got 0"),
        (["--eval_limit", 0], 2, "--eval_limit: expected a positive number, got 0"),
        (["--report_examples", -1], 2, "--report_examples: expected at least 0, got -1"),
        (["--task", "lamp_9"], 2, "argument --task: invalid choice: 'lamp_9' (choose from"),
        (["--task", "lamp_3", "--generate", "true"], 1, "--eval_file: "),
        (["--lora_r", 2], 2, "--lora_r: a new 'tiny' model has no trained weights to adapt"),
        (["--eval_file", "nowhere.jsonl"], 1, "--eval_file: nowhere.jsonl: cannot be read: No such file"),
        (["--max_length", 20], 1, "--train_file: record 0 (user 'u0'): the prompt without any history takes"),
        (["--max_lengthh", 20], 2, "unknown flag --max_lengthh; did you mean --max_length?"),
        (["--loss", "sft"], 2, "unknown flag --loss"),
    ],
)
def test_mistakes_are_named_before_any_work(nextquill, data, tmp_path, more, code, message):
    result = nextquill(*words(data, tmp_path / "out", *more))
    assert result.code == code, result.err
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train_file", "eval_file", "output_dir"])
def test_what_has_to_be_given(nextquill, data, tmp_path, name):
    given = words(data, tmp_path / "out")
    at = given.index(f"--{name}")
    result = nextquill(*given[:at], *given[at + 2 :])
    assert (result.code, f"expected --{name}" in result.err) == (2, True)


def test_overwriting_spares_what_the_runs_read(uninterrupted, nextquill, data, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(uninterrupted / "nextquill_comparison.json", folder)
    shutil.copy(data / "eval.jsonl", folder)
    more = ("--eval_file", folder / "eval.jsonl", "--overwrite_output_dir")
    result = nextquill(*words(data, folder, *more))
    assert result.code == 1
    assert "eval.jsonl, which this run reads" in result.err
    assert (folder / "eval.jsonl").exists()


def test_overwriting_begins_anew(uninterrupted, nextquill, data, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "out")
    result = nextquill(*words(data, tmp_path / "out", "--overwrite_output_dir", "--max_steps", 1, arms=("sft",)))
    assert result.code == 0, result.err
    assert "run 1 of 2" in result.err
    assert not (tmp_path / "out" / "perce").exists()
    assert read_examples(tmp_path / "out" / "sft" / "seed-0" / "evaluation")


def test_help_explains_the_flags(nextquill):
    result = nextquill("compare", "--help")
    assert result.code == 0
    for text in ("--arms ARM", "--baseline ARM", "--time_reference", "--learning_rate", "sft_2lr"):
        assert text in result.out


@pytest.mark.slow
def test_a_killed_process_goes_on(uninterrupted, nextquill, data, tmp_path):
    folder = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "nextquill.cli.main",
        *map(str, words(data, folder, "--max_steps", 3, "--save_steps", 1)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(folder.glob("perce/seed-0/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    result = nextquill(*words(data, folder, "--max_steps", 3, "--save_steps", 1))
    assert result.code == 0, result.err
    assert "2 of 3 runs are finished" in result.err
    assert_same_results(folder, uninterrupted)
