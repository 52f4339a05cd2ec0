"""The `nextquill` command itself: it runs the right command, prints errors, and returns exit codes."""

import dataclasses
import importlib
import os
import signal
import sys
import time
from dataclasses import make_dataclass
from functools import partial
from types import ModuleType

import pytest

from nextquill.cli import main as cli
from nextquill.cli.popi import SUBCOMMANDS
from nextquill.data.skipped import PlacedError
from nextquill.errors import ArgumentError, CheckpointError, RecordError


@pytest.fixture
def command(monkeypatch):
    """Make `nextquill score` call a function instead of the real command."""

    def replace(run, **attributes):
        module = ModuleType("nextquill.cli.score")
        module.run = run
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, "nextquill.cli.score", module)

    return replace


def raising(error):
    def run(arguments):
        raise error

    return run


def test_without_a_command_it_prints_the_help_and_fails(nextquill):
    result = nextquill()
    assert result.code == cli.USAGE
    assert result.out == ""
    assert all(name in result.err for name in cli.COMMANDS)


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_goes_to_stdout(nextquill, word):
    result = nextquill(word)
    assert result.code == cli.OK
    assert "usage: nextquill COMMAND" in result.out


def test_version(nextquill):
    import nextquill as package

    assert nextquill("--version") == (0, f"nextquill {package.__version__}\n", "")


def test_unknown_command_is_told_with_a_suggestion(nextquill):
    assert nextquill("trian") == (2, "", "nextquill: unknown command 'trian'; did you mean train?\n")
    assert "expected one of demo, convert, inspect, prepare, train, evaluate, score" in nextquill("xyzzy").err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(nextquill, name):
    result = nextquill(name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: nextquill {name}")
    assert result.err == ""


def test_the_command_gets_its_words_and_gives_the_exit_code(nextquill, command):
    seen = []
    command(lambda words: seen.append(words) or 7)
    assert nextquill("score", "--show", "b").code == 7
    assert seen == [["--show", "b"]]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ArgumentError("alpha: expected a number"), 2, "nextquill: alpha: expected a number\n"),
        (CheckpointError("no checkpoint"), 1, "nextquill: no checkpoint\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "FileNotFoundError: [Errno 2] No such file: 'a.txt'"),
        (ValueError("first\nsecond"), 1, "nextquill: ValueError: first second (--debug shows where)\n"),
        (ModuleNotFoundError("No module named 'peft'"), 1, "No module named 'peft'; pip install 'nextquill[cli]'"),
        (KeyboardInterrupt(), 130, "nextquill: interrupted\n"),
    ],
)
def test_a_mistake_is_one_line(nextquill, command, error, code, message):
    command(raising(error))
    result = nextquill("score")
    assert result.code == code
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ArgumentError("alpha: expected a number"), "--alpha: expected a number"),
        (ArgumentError("beta: expected\na number"), "beta: expected a number"),
        (ArgumentError("folder: is a file"), "--output_dir: is a file"),
        (ArgumentError("args.alpha: 2 is not supported"), "--alpha: 2 is not supported"),
        (RecordError("record 3: bad", argument="records"), "--eval_file: record 3: bad"),
        (PlacedError("a.jsonl line 3", "bad"), "a.jsonl line 3: bad"),
        (CheckpointError("folder: x exists; give overwrite=True"), "--output_dir: x exists; give --overwrite"),
        (ArgumentError("alpha: expected 0 with mode='fast', got 1"), "--alpha: expected 0 with --mode fast, got 1"),
        (ArgumentError("alpha: expected 0 with speed='fast'"), "--alpha: expected 0 with speed='fast'"),
        (RecordError("/runs/mode=True/x: bad"), "/runs/mode=True/x: bad"),
    ],
)
def test_an_argument_of_the_library_is_shown_as_its_flag(nextquill, command, error, message):
    fields = ["alpha", "mode", "output_dir", "eval_file", "overwrite"]
    flags = {"folder": "output_dir", "records": "eval_file"}
    command(raising(error), OPTIONS=[make_dataclass("Options", fields)], FLAGS=flags)
    assert nextquill("score").err == f"nextquill: {message}\n"


def test_every_flag_that_stands_for_an_argument_exists():
    for name in [*cli.COMMANDS, *(f"popi_{name}" for name in SUBCOMMANDS)]:
        module = importlib.import_module(f"nextquill.cli.{name}")
        flags = {field.name for kind in getattr(module, "OPTIONS", ()) for field in dataclasses.fields(kind)}
        assert set(getattr(module, "FLAGS", {}).values()) <= flags, name


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object: Cannot allocate memory"),
        MemoryError(),
        MemoryError("std::bad_alloc"),
    ],
)
def test_out_of_memory_names_what_to_turn_down(nextquill, command, error):
    command(raising(error))
    result = nextquill("score")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith("nextquill: out of memory; use a smaller batch, ")


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_every_signal_that_ends_a_process_interrupts_the_command(nextquill, command, name, request):
    if name != "SIGINT":  # tests under nohup ignore SIGHUP
        request.addfinalizer(partial(signal.signal, getattr(signal, name), signal.getsignal(getattr(signal, name))))
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    before, cleaned = signal.getsignal(getattr(signal, name)), []

    def run(arguments):
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(60)
        finally:
            cleaned.append(name)

    command(run)
    assert nextquill("score") == (130, "", "nextquill: interrupted\n")
    assert cleaned == [name]
    assert signal.getsignal(getattr(signal, name)) is before


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGHUP")
def test_a_hangup_that_is_ignored_stays_ignored(nextquill, command):
    def run(arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    command(run)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert nextquill("score").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_our_own_errors_keep_their_traceback(nextquill, command):
    command(raising(AttributeError("a bug")))
    with pytest.raises(AttributeError, match="a bug"):
        nextquill("score")


def test_debug_shows_the_traceback_of_a_mistake(nextquill, command):
    command(raising(CheckpointError("no checkpoint")))
    with pytest.raises(CheckpointError):
        nextquill("score", "--debug")


def test_debug_with_a_value_is_left_to_training_arguments():
    assert cli._take_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)
    assert cli._take_debug(["--a", "--debug", "--b"]) == (["--a", "--b"], True)


def test_a_closed_pipe_is_no_error_message(nextquill, command, monkeypatch):
    monkeypatch.setattr(cli.os, "open", lambda *_: -1)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    monkeypatch.setattr(cli.sys.stdout, "fileno", lambda: 1, raising=False)
    command(raising(BrokenPipeError()))
    code = cli.main(["score"])
    assert code == 1


def test_an_unreachable_hub_is_one_line(nextquill, command):
    error = type("ConnectError", (Exception,), {"__module__": "httpx"})
    command(raising(error("[Errno -2] Name or service not known")))
    result = nextquill("score")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "ConnectError: [Errno -2]" in result.err


def test_a_message_that_quotes_a_long_text_is_cut(nextquill):
    result = nextquill("convert", "--limit", "x" * 100_000)
    assert result.code == 2
    assert result.err.startswith("nextquill: argument --limit: invalid int value: 'xxx")
    assert " … " in result.err
    assert len(result.err) < 2100
