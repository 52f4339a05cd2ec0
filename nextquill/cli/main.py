"""The `nextquill` command: chooses a subcommand, and turns a user's mistake into one line and an exit code.

Exit codes: 0 done; 1 the run failed for a reason the message names; 2 a flag, a config key or a value is wrong;
130 interrupted. `--debug` shows the traceback of an error. What is nobody's mistake but ours always shows it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

COMMANDS = {
    "demo": "Personalise a small model of synthetic users, and see what each loss does (CPU, minutes; in a checkout).",
    "convert": "Turn a public data set, a chat log, a table or an event log into training records.",
    "inspect": "Show an example's prompts as tokens: what is shared, supervised and cut.",
    "prepare": "Tokenise records once, into a folder that training reads from disk.",
    "train": "Fine-tune a model on users' histories with a causal loss.",
    "evaluate": "Measure a model: generated text, nll with, without and under another user's history, effects.",
    "score": "Write every response token's effect, and show some in colour.",
    "popi": "Summarise users' preferences in words: train, summarize, evaluate, export.",
    "report": "Put runs on one HTML page: curves, measures with intervals, texts, tokens by effect.",
    "compare": "Train several losses from the same start and report what sets them apart.",
    "bench": "Check and time the losses against plain PyTorch and other fused losses (in a checkout).",
}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_PACKAGES = "pip install 'nextquill[cli]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return OK if arguments else USAGE
    if arguments[0] == "--version":
        from nextquill import __version__

        print(f"nextquill {__version__}")
        return OK
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        return _fail(f"unknown command {command!r}; {hint}", USAGE)
    arguments, debug = _take_debug(rest)
    try:
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
            warnings.simplefilter("ignore")  # third-party deprecations are not the user's to mend
        code: int = importlib.import_module(f"nextquill.cli.{command}").run(arguments)
    return code


def _explain(command: str, error: Exception) -> tuple[str | None, int]:
    """One line for an error that a user can do something about, and the exit code; None for any other error."""
    from nextquill.errors import ArgumentError, ArgumentTypeError, NextQuillError

    text = " ".join(str(error).split())
    if isinstance(error, NextQuillError):
        if type(error).__name__ == "UsageError":
            return f"{text}; see nextquill {command} --help", USAGE
        return text, USAGE if isinstance(error, (ArgumentError, ArgumentTypeError)) else FAILED
    if isinstance(error, ImportError):
        return f"{command} needs a package that is not installed: {text}; {_PACKAGES}", FAILED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return f"out of memory; use a smaller batch, --max_length or --chunk_bytes ({text[:120]})", FAILED
    if isinstance(error, (OSError, MemoryError, ValueError)) or _is_connection_error(error):
        return f"{type(error).__name__}: {text} (--debug shows where)", FAILED
    return None, FAILED


def _is_connection_error(error: Exception) -> bool:
    return type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub", "requests"))


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
    print(f"nextquill: {message}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nextquill COMMAND [options]",
            "",
            "Causal personalisation training of language models.",
            "",
            *lines,
            "",
            "nextquill COMMAND --help lists a command's options; --config FILE.yaml gives them from a file.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
