"""Small records, a runner that calls the command line in this process, and one trained run that tests may read."""

import contextlib
import io
import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest

WORDS = "the soup was salty but warm and service quick naïve café über 東京 ramen 🍜 friendly".split()


class Result(NamedTuple):
    code: int
    out: str
    err: str


def write_records(path: Path, count: int, seed: int = 0, **fixed) -> Path:
    """Write records of four users, whose texts are a few random words."""
    draw = random.Random(seed)

    def text(words):
        return " ".join(draw.choice(WORDS) for _ in range(words))

    with path.open("w", encoding="utf-8") as stream:
        for i in range(count):
            history = [{"title": text(2), "text": text(5)} for _ in range(1 + i % 3)]
            record = {"user_id": f"u{i % 4}", "query": text(4), "response": text(6), "history": history}
            stream.write(json.dumps(record | fixed, ensure_ascii=False) + "\n")
    return path


def run(*words) -> Result:
    """Run `nextquill WORDS` in this process."""
    from nextquill.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def nextquill():
    return run


@pytest.fixture(scope="session")
def make_records():
    return write_records


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "train.jsonl", 8)
    write_records(folder / "eval.jsonl", 5, seed=1)
    return folder


@pytest.fixture(scope="session")
def train(data):
    """Train a tiny model into a folder; further words are further flags."""

    def call(output_dir, *words):
        flags = ["--train_file", data / "train.jsonl", "--model_name_or_path", "tiny", "--output_dir", output_dir]
        sizes = ["--max_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3]
        return run("train", *flags, *sizes, *words)

    return call


@pytest.fixture(scope="session")
def trained(train, data, tmp_path_factory):
    """A finished run with an evaluation, which tests only read."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    result = train(folder, "--eval_file", data / "eval.jsonl")
    assert result.code == 0, result.err
    return folder


# ---- popi ------------------------------------------------------------------------------------------

NOUNS = "hat house boat lamp cup door shirt bike".split()
COLOURS = "red green blue".split()


def write_preference_pairs(path, users=3, pairs=6, first=0, **fixed):
    """Write preference pairs of users who each like one colour."""
    with path.open("w", encoding="utf-8") as stream:
        for user in range(first, first + users):
            for k in range(pairs):
                chosen, rejected = (
                    f"A {colour} {NOUNS[k]}, number {user}{k}." for colour in (COLOURS[user % 3], "grey")
                )
                record = {
                    "user_id": f"u{user}",
                    "query": f"Which {NOUNS[k]} for number {user}{k}?",
                    "response": chosen,
                    "history": [],
                    "chosen": chosen,
                    "rejected": rejected,
                }
                stream.write(json.dumps(record | fixed) + "\n")
    return path


@pytest.fixture(scope="session")
def write_pairs():
    return write_preference_pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_preference_pairs(folder / "train.jsonl")
    write_preference_pairs(folder / "test.jsonl", first=3)
    return folder


@pytest.fixture(scope="session")
def popi(nextquill):
    def call(*words):
        return nextquill("popi", *words)

    return call


SIZES = ("--max_steps", 1, "--per_device_train_batch_size", 2, "--group_size", 2, "--pairs_per_user", 2)
LENGTHS = ("--max_summary_tokens", 6, "--max_signal_tokens", 512, "--max_length", 512, "--signals_per_user", 3)


@pytest.fixture(scope="session")
def popi_train(popi, pairs):
    def call(folder, *words):
        flags = ("--train_file", pairs / "train.jsonl", "--output_dir", folder, "--learning_rate", 1e-2)
        name = () if "--inference_model" in words else ("--model_name_or_path", "tiny")
        return popi("train", *flags, *name, *SIZES, *LENGTHS, *words)

    return call


@pytest.fixture(scope="session")
def popi_trained(popi_train, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = folder.parent / "popi.yaml"
    wording = "instruction: What does this person like?\nopening: They\n"
    settings.write_text(f"lora_r: 4\nobjective: ipo\nbeta: 0.5\n{wording}")
    result = popi_train(folder, "--eval_file", pairs / "test.jsonl", "--config", settings)
    assert result.code == 0, result.err
    return folder, result


@pytest.fixture(scope="session")
def popi_model(popi_trained):
    return popi_trained[0]
