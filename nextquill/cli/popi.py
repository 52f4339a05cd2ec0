"""`nextquill popi`: users' preferences as short texts; chooses what is to be done with them."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from nextquill.cli.main import OK, USAGE
from nextquill.errors import ArgumentError

DESCRIPTION = (
    "Summarise users' preferences in words (POPI, arXiv 2510.17881): one model reads a user's signals and writes a "
    "short summary, another reads the summary and answers as the user would like."
)
SUBCOMMANDS = {
    "train": "Train the model that writes summaries, and the one that reads them, on preference pairs.",
    "summarize": "Write one summary for every user.",
    "summaries": "Show, edit or delete users' summaries.",
    "evaluate": "Does the generator side with its user: without context, with signals, with the summary?",
    "export": "Write prompts with summaries for a model behind an API.",
    "demo": "Train on synthetic users with hidden preferences, and see what summaries say (in a checkout).",
}


def run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return OK if arguments else USAGE
    name, rest = arguments[0], list(arguments[1:])
    if name not in SUBCOMMANDS:
        close = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(SUBCOMMANDS)}"
        raise ArgumentError(f"unknown command 'popi {name}'; {hint}")
    from nextquill.cli.parsing import UsageError

    command = importlib.import_module(f"nextquill.cli.popi_{name}")
    try:
        code: int = command.run(rest)
    except UsageError as error:  # main would name the help of popi
        raise ArgumentError(f"{error}; see nextquill popi {name} --help") from error
    return code


def _help() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: nextquill popi COMMAND [options]",
            "",
            DESCRIPTION,
            "",
            *lines,
            "",
            "nextquill popi COMMAND --help lists a command's options; --config FILE.yaml gives them from a file.",
        ]
    )
