"""The `nextquill` command: chooses a subcommand, and turns a user's mistake into one line and an exit code.

Exit codes: 0 done; 1 the run failed for a reason the message names; 2 wrong usage, nothing was started; 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence

COMMANDS = {
    "demo": "Personalise a small model of synthetic users, and see what each loss does (CPU, about 3 minutes).",
    "train": "Fine-tune a model on users' histories with a causal loss.",
    "evaluate": "Measure a model: nll with, without and under another user's history, effects, ROUGE-L.",
    "score": "Write every response token's effect, and show some in colour.",
}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return OK if arguments else USAGE
    if arguments[0] == "--version":
        from nextquill import __version__

        print(f"nextquill {__version__}")
        return OK
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}", USAGE)
    return _run(command, rest)


def _run(command: str, arguments: list[str]) -> int:
    arguments, debug = _take_debug(arguments)
    try:
        module = importlib.import_module(f"nextquill.cli.{command}")
    except ImportError as error:
        if debug:
            raise
        return _fail(f"{command} needs packages that are not installed ({error}); pip install 'nextquill[cli]'", FAILED)
    from nextquill.cli.parsing import UsageError
    from nextquill.errors import ArgumentError, ArgumentTypeError, NextQuillError

    try:
        if not debug:
            warnings.simplefilter("ignore")  # third-party deprecations are not the user's to mend
        code: int = module.run(arguments)
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except NextQuillError as error:
        if debug:
            raise
        usage = isinstance(error, (UsageError, ArgumentError, ArgumentTypeError))
        hint = f"; see nextquill {command} --help" if isinstance(error, UsageError) else ""
        return _fail(f"{error}{hint}", USAGE if usage else FAILED)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error}", FAILED)


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
