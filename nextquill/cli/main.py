"""The `nextquill` command: chooses a subcommand, and turns a user's mistake into one line and an exit code.

Exit codes: 0 done; 1 the run failed for a reason the message names; 2 a flag, a config key or a value is wrong;
130 interrupted. `--debug` shows the traceback of an error. An error that no user can fix always shows it.

A command's module has `run(arguments)`, and `OPTIONS`, the dataclasses whose fields are its flags. An error names an
argument, and the user reads the flag of that name. `FLAGS` maps arguments to flags with other names.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from nextquill.cli.flags import UsageError
from nextquill.cli.known_flags import refused
from nextquill.errors import ArgumentError, ArgumentTypeError, NextQuillError
from nextquill.ranks import apart, joined, launch, started
from nextquill.report.text import plain
from nextquill.storage.locks import release_claims

COMMANDS = {
    "demo": "Train a small model on synthetic users, and see what each loss does (CPU, minutes; in a checkout).",
    "convert": "Turn a public data set, a chat log, a table or an event log into training records.",
    "inspect": "Show an example's prompts as tokens: what is shared, supervised and cut.",
    "prepare": "Tokenise records once, into a folder that training reads from disk.",
    "train": "Fine-tune a model on users' histories with a causal loss.",
    "evaluate": "Measure a model: nll with, without and with another user's history; effects; generated texts.",
    "score": "Write the effect of the history on every response token, and show some responses in colour.",
    "generate": "Write responses as a user would, from the user's texts and one or many queries.",
    "chat": "Write responses as a user would, to queries that you type.",
    "popi": "Summarise users' preferences in words: train, summarize, evaluate, export.",
    "report": "Put runs on one HTML page: curves, measures with intervals, texts, tokens coloured by effect.",
    "compare": "Train several losses from the same start and report how they differ.",
    "completion": "Print a script that completes commands and flags in bash or zsh.",
    "bench": "Check and time the losses against plain PyTorch and other fused losses (in a checkout).",
}
DESCRIPTION = "Causal personalisation training of language models."
#: Characters of a message.
_MOST_SHOWN = 2000
#: Commands whose processes train together, and those whose processes share the batches of one run.
_TRAINING, _SHARED = ("train", "popi train"), ("score", "evaluate", "popi summarize", "popi evaluate")
#: Commands whose processes each make runs of their own.
_APART = ("compare",)
#: Seconds that a process of a shared run waits for the others.
_TIMEOUT = 1800.0
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
#: Python's way to give an argument, where a message recommends one: " overwrite=True", " attention='padded'".
_GIVEN = re.compile(r"(?<!\S)(?:args\.)?(\w+)=(?:True|'(\w+)')(?=[\s,;:)]|$)")
#: What torch, numpy, CUDA and the loader of libraries say when memory is short.
_OUT_OF_MEMORY = re.compile(r"out of memory|(can't|cannot|unable to) allocate memory|bad_alloc", re.IGNORECASE)
#: What torch raises, or says, when another process of a group has gone or has not answered within --ddp_timeout.
_GROUP_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_GROUP_ENDED = re.compile(r"\bgloo\b|connection (closed|reset) by peer|timed out waiting \d+ms", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    program, description, commands = "nextquill", DESCRIPTION, COMMANDS
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["popi"]:
        from nextquill.cli import popi

        program, description, commands, arguments = "nextquill popi", popi.DESCRIPTION, popi.SUBCOMMANDS, arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(program, description, commands), file=sys.stdout if arguments else sys.stderr)
        return OK if arguments else USAGE
    if arguments[0] == "--version":
        from nextquill import __version__

        print(f"nextquill {__version__}")
        return OK
    name, rest = arguments[0], arguments[1:]
    command = f"{program} {name}".removeprefix("nextquill ")
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(commands)}"
        return _fail(f"unknown command {command!r}; {hint}", USAGE)
    arguments, debug = _take_debug(rest)
    try:
        with _interrupted_by_all_signals():
            return _run(command, arguments, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except SystemExit as stop:  # after --help
        return int(stop.code or OK)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        message, code = _explain(command, error)
        if debug or message is None:
            raise
        return _fail(message, code)


def _run(command: str, arguments: list[str], debug: bool) -> int:
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")  # users cannot fix deprecations in other packages
            warnings.filterwarnings("always", "attention: ", RuntimeWarning)  # but may want to know what costs time
            warnings.showwarning = _shown_once(command)
        try:
            with _processes(command):
                if wrong := refused(_module(command), arguments):  # before anything large is imported
                    raise UsageError(wrong)
                code: int = importlib.import_module(_module(command)).run(arguments)
        finally:
            release_claims()
    return code


def _shown_once(command: str) -> Callable[..., None]:
    """What shows warnings: one line on stderr, each text once."""
    seen = set[str]()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = _in_flags(command, str(message))
        if text not in seen:
            seen.add(text)
            _fail(text, OK)

    return show


def _processes(command: str) -> AbstractContextManager[None]:
    """Let the processes that a launcher has started work on one command in a block; only the first one prints."""
    if command in _APART:
        return apart(_TIMEOUT)
    if command not in _SHARED and command not in _TRAINING and started() > 1 and "LOCAL_RANK" in os.environ:
        raise UsageError(f"{command} runs in one process, and a launcher started {started()}")
    if started() == 1 or command not in _SHARED:  # a cluster may set WORLD_SIZE in every shell
        return nullcontext()
    return joined(_TIMEOUT)


@contextmanager
def _interrupted_by_all_signals() -> Iterator[None]:
    """Let the signals that end a process do what Ctrl-C does, so that work is saved and named.

    A signal that is ignored, as after `nohup`, stays ignored. Only the main thread may set handlers.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _module(command: str) -> str:
    return f"nextquill.cli.{command.replace(' ', '_')}"


def _explain(command: str, error: Exception) -> tuple[str | None, int]:
    """One line for an error that a user can do something about, and the exit code; None for any other error."""
    if isinstance(error, NextQuillError):
        text = _with_flags(command, error)
        if isinstance(error, UsageError):
            return f"{text}; see nextquill {command} --help", USAGE
        return text, USAGE if isinstance(error, (ArgumentError, ArgumentTypeError)) else FAILED
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return f"out of memory; use a smaller batch, --max_length, --max_tokens or --chunk_bytes ({text[:120]})", FAILED
    if type(error).__name__ in _GROUP_ERRORS or (isinstance(error, RuntimeError) and _GROUP_ENDED.search(text)):
        return f"another process of the group has ended or does not answer; its message says why ({text[:120]})", FAILED
    if type(error).__name__ == "BrokenProcessPool":
        return "a worker process has ended; memory may have been short, so use fewer of --num_workers", FAILED
    if isinstance(error, ImportError):
        return f"{command} needs a package that is not installed: {text}; pip install 'nextquill[cli]'", FAILED
    is_of_the_connection = type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub", "requests"))
    if isinstance(error, (OSError, ValueError)) or is_of_the_connection:
        return f"{type(error).__name__}: {text} (--debug shows where)", FAILED
    return None, FAILED


def _with_flags(command: str, error: NextQuillError) -> str:
    """The error's message in one line, with the command's flags in place of the library's arguments."""
    flags = _flags(command)
    text = f"--{flags[error.argument]}: {error.message}" if error.argument in flags else str(error)
    return _in_flags(command, text)


def _flags(command: str) -> dict[str, str]:
    """The command's flags by the library's arguments."""
    module = sys.modules.get(_module(command))
    fields = [field for kind in getattr(module, "OPTIONS", ()) for field in dataclasses.fields(kind)]
    flags = {alias.strip("-"): field.name for field in fields for alias in field.metadata.get("aliases", ())}
    flags |= {field.name: field.name for field in fields}
    return flags | getattr(module, "FLAGS", {})


def _in_flags(command: str, text: str) -> str:
    """The text in one line, with flags where it recommends arguments."""
    flags = _flags(command)

    def given(found: re.Match[str]) -> str:
        return found[0] if found[1] not in flags else " ".join(filter(None, (f"--{flags[found[1]]}", found[2])))

    return " ".join(_GIVEN.sub(given, text).split())


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove a bare `--debug`; TrainingArguments has a flag of that name, which takes a value and is left alone."""
    for position, word in enumerate(arguments):
        following = arguments[position + 1 : position + 2]
        if word == "--debug" and following not in (["underflow_overflow"], ["tpu_metrics_debug"]):
            return arguments[:position] + arguments[position + 1 :], True
    return arguments, False


def _fail(message: str, code: int) -> int:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)  # an unfinished progress bar's line
    rank = f"rank {os.environ.get('RANK', 0)}: " if started() > 1 else launch().label
    if len(message) > _MOST_SHOWN:  # it quotes what somebody wrote, without end
        message = f"{message[: _MOST_SHOWN // 2]} … {message[-_MOST_SHOWN // 2 :]}"
    print(f"nextquill: {rank}{plain(message)}", file=sys.stderr)
    return code


def _help(program: str, description: str, commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    more = f"{program} COMMAND --help lists a command's options; --config FILE.yaml gives them from a file."
    return f"usage: {program} COMMAND [options]\n\n{description}\n\n{listed}\n\n{more}"


if __name__ == "__main__":
    sys.exit(main())
