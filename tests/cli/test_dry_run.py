"""--dry_run: the table of what a command would do, and nothing written."""

import re

import pytest


def table(out):
    """The printed rows by name."""
    *lines, end = out.splitlines()
    assert end == "Nothing was written."
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


def numbers(text):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_train(train, data, tmp_path):
    folder = tmp_path / "run"
    flags = ("--eval_file", data / "eval.jsonl", "--eval_strategy", "steps", "--eval_on_start", "--max_steps", 7)
    result = train(folder, *flags, "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2, "--dry_run")
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == []
    rows = table(result.out)
    assert rows["steps"] == "7, each of 4 examples (2 a device × 2 accumulated × 1 processes)"
    assert rows["cut"] == "0 of 15 history items, in 0 examples"
    computed, steps, apart = numbers(rows["tokens computed"])
    assert steps == 2, "an epoch of eight examples"
    assert computed < apart
    assert re.fullmatch(r"about \S+ s: \S+ s a step; without evaluations", rows["time"])
    assert rows["learning rate"] == "0.001, linear"
    assert "evaluation: loss" not in result.err


def test_sharing_is_seen(train, tmp_path):
    """Examples of one user share the history, if it comes first."""
    flags = ("--prompt_order", "history_first", "--examples_per_user", 2, "--dry_run")
    factors = []
    for words in (flags, (*flags, "--attention", "padded")):
        result = train(tmp_path / "run", *words)
        assert result.code == 0, result.err
        factors.append(float(table(result.out)["saved by sharing"].split()[0]))
    assert factors[0] > factors[1]
    assert factors[1] <= 1.0, "padded rows share nothing"


def test_a_run_of_one_step_and_a_prepared_folder(train, nextquill, trained, data, tmp_path):
    words = ("--train_file", data / "train.jsonl", "--model_name_or_path", trained, "--output_dir", tmp_path / "p")
    assert nextquill("prepare", *words).code == 0
    flags = ("--train_file", tmp_path / "p", "--model_name_or_path", trained, "--max_steps", 1, "--dry_run")
    result = train(tmp_path / "run", *flags)
    assert result.code == 0, result.err
    assert table(result.out)["steps"].startswith("1, ")
    assert not (tmp_path / "run").exists()


def test_popi_train(popi_train, tmp_path):
    result = popi_train(tmp_path / "run", "--max_steps", 3, "--dry_run")
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == []
    rows = table(result.out)
    assert rows["steps"].startswith("3, each of 2 users ")
    assert "group_size=2" in rows["settings"]


def test_prepare(nextquill, trained, data, tmp_path, monkeypatch):
    words = ("--train_file", data / "train.jsonl", "--model_name_or_path", trained, "--output_dir", tmp_path / "p")
    whole = nextquill("prepare", *words, "--dry_run")
    assert whole.code == 0, whole.err
    assert list(tmp_path.iterdir()) == []
    rows = table(whole.out)
    assert rows["records"] == "8; the rows below are from the first 8"
    monkeypatch.setattr("nextquill.cli.dry_run.PREPARED", 4)
    some = table(nextquill("prepare", *words, "--dry_run").out)
    assert some["records"] == "8; the rows below are from the first 4"
    assert numbers(some["tokens written"])[0] == pytest.approx(numbers(rows["tokens written"])[0], rel=0.3)


def test_evaluate(nextquill, trained, data, tmp_path):
    words = ("--eval_file", data / "eval.jsonl", "--output_dir", tmp_path / "e", "--generate_limit", 3)
    result = nextquill("evaluate", "--model_name_or_path", trained, *words, "--max_new_tokens", 2, "--dry_run")
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == []
    rows = table(result.out)
    assert rows["texts"] == "3, at most 2 tokens each"
    assert re.search(r"from 4 records \(scoring 5: .*, generating 3: ", rows["time"])
    computed, apart, prompts = numbers(rows["tokens computed"])
    assert computed < apart
    assert prompts == 3


@pytest.mark.parametrize(("command", "flag"), [("train", "train_file"), ("prepare", "records_file")])
def test_what_is_wrong_is_refused_as_without_it(nextquill, trained, make_records, tmp_path, command, flag):
    file = make_records(tmp_path / "long.jsonl", 2, response="word " * 3000)
    words = (f"--{flag}", file, "--model", trained, "--output_dir", tmp_path / "out", "--dry_run")
    result = nextquill(command, *words)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith(f"nextquill: --{flag}: ")
    assert not (tmp_path / "out").exists()
