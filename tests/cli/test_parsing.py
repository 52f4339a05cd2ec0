"""Flags and YAML files become dataclasses, and errors name the wrong value."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

from nextquill.cli.flags import UsageError, option
from nextquill.cli.parsing import WIDE_REFUSALS, parse, refusals
from nextquill.errors import ArgumentError


@dataclass
class Renamed:
    records_file: str = option("Records.", aliases=["train_file"])


@dataclass
class Options:
    name: str = option("A name.")
    batch_size: int = option("A number.", 8)
    rate: float = option("A rate.", 0.5)
    strategy: str = option("When.", "no", choices=["no", "yes", "steps"])
    quick: bool = option("A switch.", False)
    chat: bool | None = option("A switch of three states.", None)
    parts: list[str] | None = field(default=None, metadata={"help": "Some words."})
    extra: dict | str | None = field(default=None, metadata={"help": "A mapping."})


def parsed(*words, config=None, tmp_path=None, **options):
    if config is not None:
        path = tmp_path / "config.yaml"
        path.write_text(config, encoding="utf-8")
        words = ("--config", str(path), *words)
    return parse("test", "A test.", (Options,), words, **options)[0]


@pytest.mark.parametrize(
    "words", [("--batch_size", "4"), ("--batch_size=4",), ("--batch-size", "4"), ("--batch-size=4",)]
)
def test_spellings_of_a_flag(words):
    assert parsed("--name", "a", *words).batch_size == 4


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb", "a\ud800"])
def test_text_that_no_file_can_hold_is_refused_by_flag(text):
    for words in (("--name", text), ("--name", "a", "--parts", "b", text)):
        flag = words[-2] if len(words) == 2 else "--parts"
        with pytest.raises(UsageError, match=f"argument {flag}: expected UTF-8 without null bytes, got 'a"):
            parsed(*words)


def test_a_mapping_in_a_config_file_may_use_aliases(tmp_path):
    assert parsed(config="name: a\nextra: {x: &x [1], y: *x}", tmp_path=tmp_path).extra == '{"x": [1], "y": [1]}'


@pytest.mark.parametrize("config", ["extra: &a {b: *a}", "extra: " + "[" * 3000, "name: a\nname: b"])
def test_a_config_file_that_cannot_be_read_is_one_line(tmp_path, config):
    with pytest.raises(UsageError, match=r"--config: .*config\.yaml is not YAML: ") as caught:
        parsed(config=config, tmp_path=tmp_path)
    assert len(str(caught.value)) < 500


def test_a_config_file_is_a_small_regular_file(tmp_path):
    for path, said in (("/dev/zero", "expected a regular file"), (tmp_path / "big", "expected at most 256 KiB")):
        (tmp_path / "big").write_bytes(b"#" * 2**19)
        with pytest.raises(UsageError, match=f"--config: cannot read {path}: {said}"):
            parsed("--config", str(path))


def test_a_mapping_that_nests_too_deeply_is_not_json():
    with pytest.raises(UsageError, match="argument --extra: not JSON: its objects or lists are nested too deeply"):
        parsed("--name", "a", "--extra", '{"a":' * 10_000)


@pytest.mark.parametrize(
    ("words", "quick", "chat"),
    [
        ((), False, None),
        (("--quick", "--chat"), True, True),
        (("--quick", "true", "--chat", "false"), True, False),
        (("--quick=false", "--chat=true"), False, True),
    ],
)
def test_booleans_stand_alone_or_take_a_value(words, quick, chat):
    options = parsed("--name", "a", *words)
    assert (options.quick, options.chat) == (quick, chat)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected --name"),
        (("--name", "a", "--batchsize", "4"), "unknown flag --batchsize; did you mean --batch_size?"),
        (("--name", "a", "--batch-sise", "4"), "unknown flag --batch-sise; did you mean --batch_size?"),
        (("--name", "a", "--xyzzy=4"), "unknown flag --xyzzy"),
        (("--name", "a", "b"), "unexpected argument 'b'"),
        (("--name", "a", "--batch_size", "x"), "argument --batch_size: invalid int value: 'x'"),
        (("--name", "a", "--rate", "fast"), "argument --rate: invalid float value: 'fast'"),
        (("--name", "a", "--strategy", "never"), "argument --strategy: invalid choice: 'never'"),
        (("--name", "a", "--quick", "perhaps"), "argument --quick: Truthy value expected"),
        (("--name",), "argument --name: expected one argument"),
        (("--name", "a", "--extra", "{a"), "argument --extra: not JSON"),
        (("--name", "a", "--batch", "4"), "unknown flag --batch"),
    ],
)
def test_a_wrong_command_line_is_named(words, message):
    with pytest.raises(UsageError) as caught:
        parsed(*words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_defaults_and_required_flags_of_the_command():
    assert parsed("--name", "a", defaults={"rate": 0.25}).rate == 0.25
    with pytest.raises(UsageError, match=r"^expected --chat$"):
        parsed("--name", "a", required=["chat"])


def test_a_config_file_holds_the_flags(tmp_path):
    config = """
    name: "- dashed: text"
    batch_size: 2
    rate: 1e-3
    strategy: no
    quick: yes
    chat: null
    parts: [a, b]
    extra: {a: 1}
    """
    options = parsed(config=config, tmp_path=tmp_path)
    assert options == Options("- dashed: text", 2, 1e-3, "no", True, None, ["a", "b"], '{"a": 1}')


def test_hyphens_and_single_item_lists_in_a_config_file(tmp_path):
    assert parsed(config="name: [a]\nbatch-size: 3\n", tmp_path=tmp_path).batch_size == 3


def test_the_command_line_wins_over_the_config_file(tmp_path):
    config = "name: a\nbatch_size: 2\nparts: [a, b]\nquick: true\n"
    options = parsed("--batch_size", "3", "--parts", "c", "--quick=false", config=config, tmp_path=tmp_path)
    assert (options.name, options.batch_size, options.parts, options.quick) == ("a", 3, ["c"], False)


def test_an_empty_config_file_says_nothing(tmp_path):
    assert parsed("--name", "a", config="# nothing\n", tmp_path=tmp_path) == Options("a")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("nmae: a", "unknown flag --nmae; did you mean --name?"),
        ("config: b.yaml", "unknown flag --config"),
        ("batch_size: x", "argument --batch_size: invalid int value: 'x'"),
        ("batch_size: true", "argument --batch_size: invalid int value: 'true'"),
        ("batch_size: [1, 2]", "argument --batch_size: expected one value, got a list of 2"),
        ("batch_size: {a: 1}", "argument --batch_size: expected one value, got a mapping"),
        ("parts: [[a]]", "argument --parts: expected a list of plain values"),
        ("quick: 3.5", "argument --quick: Truthy value expected"),
        ("- a", "expected a mapping of flags in"),
        ("just words", "expected a mapping of flags in"),
        ("a: [1", "is not YAML"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path, config, message):
    with pytest.raises(UsageError) as caught:
        parsed("--name", "a", config=config, tmp_path=tmp_path)
    assert "--config: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config: expected a file name"),
        (["--config=no.yaml"], "--config: cannot read no.yaml: No such"),
    ],
)
def test_a_missing_config_file_is_named(words, message):
    with pytest.raises(UsageError, match=message):
        parsed(*words)


def test_config_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(UsageError, match="cannot read"):
        parsed("--config", str(path))


def test_help_is_short_and_complete(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: nextquill test --name TEXT [options]\n\nA test.")
    for words in ("--batch_size INT", "(default: 8)", "--quick [true|false]", "--parts TEXT ...", "{no,yes,steps}"):
        assert words in text
    assert "--batch-size" not in text
    assert "None" not in text


def test_help_writes_lists_as_they_are_given_and_no_class_name(nextquill):
    text = nextquill("evaluate", "--help").out
    assert "(default: factual)" in " ".join(text.split())
    for command in ("train", "compare", "evaluate"):
        assert re.findall(r"^[A-Z]\w+(?:Options|Files):$", nextquill(command, "--help").out, re.MULTILINE) == [], (
            command
        )


def test_other_names_of_a_flag_are_taken_and_not_shown(nextquill, tmp_path):
    for words in (["--records-file", "a"], ["--train_file", "a"], ["--train-file=a"]):
        assert parse("test", "A test.", (Renamed,), words)[0].records_file == "a"
    (tmp_path / "c.yaml").write_text("train_file: a\n")
    assert parse("test", "A test.", (Renamed,), ["--config", str(tmp_path / "c.yaml")])[0].records_file == "a"
    assert "--model_name_or_path" not in nextquill("train", "--help").out


def test_train_help_puts_our_flags_before_those_of_transformers(nextquill):
    text = nextquill("train", "--help").out
    headings = ["model:", "data:", "prompt:", "loss:", "LoRA:", "transformers' TrainingArguments:", "general:"]
    positions = [text.index(f"\n{heading}\n") for heading in headings]
    assert positions == sorted(positions)
    usage = text[: text.index("\n\n")]
    assert usage == "usage: nextquill train --model MODEL --train_file FILE --output_dir DIR [options]"
    assert max(map(len, text.splitlines())) <= 110
    for flag in ("--loss", "--lora_r", "--output_dir", "--learning_rate", "--resume_from_checkpoint", "--config"):
        assert text.count(f"\n  {flag} ") == 1


# ---- what other packages refuse ----------------------------------------------------------------------


def test_a_refusal_of_another_package_becomes_a_usage_error_with_its_flag():
    with pytest.raises(UsageError) as caught, refusals("optim"):
        raise ValueError("no such\n  optimiser")
    assert (str(caught.value), caught.value.argument) == ("no such optimiser", "optim")


def test_our_own_errors_and_bugs_are_not_taken_for_refusals():
    memory = type("OutOfMemoryError", (RuntimeError,), {})
    for error in (ArgumentError("alpha: is wrong"), KeyError("x"), memory("full")):
        with pytest.raises(type(error)), refusals():
            raise error
    with pytest.raises(UsageError), refusals(kinds=WIDE_REFUSALS):
        raise KeyError("x")
