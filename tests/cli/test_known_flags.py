"""Wrong flags are refused from the source alone, with the flag that does the same."""

from __future__ import annotations

import importlib

import pytest

from nextquill.cli import known_flags
from nextquill.cli.known_flags import refused, unknown_flag
from nextquill.cli.main import COMMANDS
from nextquill.cli.parsing import Parser
from nextquill.cli.popi import SUBCOMMANDS

#: bench has a parser of its own, and popi only subcommands.
MODULES = [f"nextquill.cli.{name}" for name in COMMANDS if name not in ("bench", "popi")]
MODULES += [f"nextquill.cli.popi_{name}" for name in SUBCOMMANDS]


@pytest.mark.parametrize("module", MODULES)
def test_the_flags_read_from_the_source_are_those_of_the_parser(module):
    found = Parser("x", "", importlib.import_module(module).OPTIONS, {}, ()).flags()
    expected = {flag[2:].replace("-", "_"): action.dest for flag, action in found.items() if "--no_" not in flag}
    read = known_flags.known_flags(module)
    assert {name: flag for name, flag in read.items() if name != "_n_gpu"} == {
        name: flag for name, flag in expected.items() if not (name.startswith("no_") and name != flag)
    }


def test_every_name_of_another_tool_leads_to_its_flag_in_some_command():
    every = {module: known_flags.known_flags(module) for module in MODULES}
    for flag, names in known_flags._ELSEWHERE.items():
        having = {module: known[flag] for module, known in every.items() if flag in known}
        for name in names.split():
            told = [str(refused(module, [f"--{name}"])).endswith(f"--{own}?") for module, own in having.items()]
            assert any(told), (flag, name)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["--no_such_flag"], "unknown flag --no_such_flag"),
        ("train", ["--lr", "1"], "unknown flag --lr; did you mean --learning_rate?"),
        ("train", ["--batch-size=4"], "unknown flag --batch-size; did you mean --per_device_train_batch_size?"),
        ("train", ["--output", "x"], "unknown flag --output; did you mean --output_dir?"),
        ("score", ["--output", "x"], "unknown flag --output; did you mean --output_file?"),
        ("score", ["--dataset", "x"], "unknown flag --dataset; did you mean --eval_file?"),
        ("inspect", ["--dataset", "x"], "unknown flag --dataset; did you mean --records_file?"),
        ("train", ["--model_name_or_pat", "x"], "unknown flag --model_name_or_pat; did you mean --model?"),
        ("train", ["-lr", "1"], "unknown flag -lr; did you mean --learning_rate?"),
        ("demo", ["--sed", "1"], "unknown flag --sed; did you mean --seed?"),
        ("popi_demo", ["--out", "x"], "unknown flag --out; did you mean --output_dir?"),
        ("popi_train", ["--epochs", "1"], "unknown flag --epochs; did you mean --num_train_epochs?"),
    ],
)
def test_the_flag_that_does_the_same_is_named(command, words, message):
    assert refused(f"nextquill.cli.{command}", words) == message


@pytest.mark.parametrize(
    "words",
    [
        ["--train_file", "x", "--model-name-or-path=y", "--no_bf16", "--max_steps", "-1", "word"],
        ["--system_prompt", "--not a flag", "--alpha", "-.5"],
        ["--no_such_flag", "--help"],
    ],
)
def test_the_rest_is_left_to_the_parser(words):
    assert refused("nextquill.cli.train", words) is None


@pytest.mark.parametrize("words", [("--config", "c.yaml"), ("--config=c.yaml", "--max_steps", "1")])
def test_an_unknown_key_of_a_config_file_is_refused_as_a_flag_is(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("max-steps: 3\nno_bf16: true\nepochs: 2\n")
    message = "--config: c.yaml: unknown flag --epochs; did you mean --num_train_epochs?"
    assert refused("nextquill.cli.train", words) == message
    assert refused("nextquill.cli.train", [*words, "--lr", "1"]) == "unknown flag --lr; did you mean --learning_rate?"
    (tmp_path / "c.yaml").write_text("max-steps: 3\nno_bf16: true\n")
    assert refused("nextquill.cli.train", words) is None


def test_a_command_without_readable_flags_is_left_to_its_parser():
    for module in ("nextquill.cli.bench", "nextquill.cli.no_such_module", "no_such_package.x"):
        assert refused(module, ["--no_such_flag"]) is None
    assert unknown_flag("--x", {}) == "unknown flag --x"
