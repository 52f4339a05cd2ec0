"""`nextquill chat`: queries from the terminal, answered one after another as a user would."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nextquill.cli.generate import (
    OWN,
    HistoryOptions,
    WritingOptions,
    compared,
    contrast,
    load_writer,
    print_side_by_side,
    print_stream,
    say_history,
)
from nextquill.cli.main import OK
from nextquill.cli.options import ModelOptions, PromptOptions
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import say
from nextquill.data import HistoryItem
from nextquill.errors import ArgumentError, BudgetError
from nextquill.report.text import plain

DESCRIPTION = (
    "Write responses to queries that you type, as a user would; each query is answered from the user's history alone, "
    "not from the queries before it. /history shows the texts, /guidance NUMBER changes the guidance, /compare also "
    "writes without history and with another user's, /quit or Ctrl-D ends."
)
OPTIONS = (ModelOptions, HistoryOptions, WritingOptions, PromptOptions)
_SHOWN_CHARACTERS = 100


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    model_options, history, writing, prompt_options = parse("chat", DESCRIPTION, OPTIONS, arguments)
    chosen = writing.options()
    history.check()
    if history.history_file == "-":
        raise ArgumentError("history_file: expected a file, as the queries come from standard input")
    histories = history.read()
    against = contrast(writing, histories)
    writer = load_writer(model_options, prompt_options)
    _print_history(histories[OWN])
    say_history(writer, "", histories[OWN], chosen)
    compare = False
    while (line := _asked()) is not None:
        word, _, value = line.partition(" ")
        if word == "/quit":
            break
        if word == "/history":
            _print_history(histories[OWN])
        elif word == "/compare":
            compare = not compare
            say("compares histories" if compare else "writes with the own history alone")
        elif word == "/guidance":
            chosen = _with_guidance(chosen, value)
        elif word.startswith("/"):
            say(f"unknown command {word}; expected /history, /guidance NUMBER, /compare or /quit")
        elif line:
            try:
                stream = writer.stream(line, histories[OWN], against=against, **chosen)
                if compare:
                    print_side_by_side([line], compared(writer, stream, [line], histories, chosen))
                else:
                    print_stream(stream)
            except BudgetError as error:
                say(str(error))
    return OK


def _asked() -> str | None:
    """The next line without white space around it; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _with_guidance(chosen: Mapping[str, Any], value: str) -> dict[str, Any]:
    try:
        changed = WritingOptions(**{**chosen, "guidance": float(value)}).options()
    except ValueError:
        say(f"guidance: expected a number of at least 0, got {value!r}")
        return dict(chosen)
    say(f"guidance is {changed['guidance']:g}")
    return changed


def _print_history(texts: Sequence[HistoryItem]) -> None:
    """A line for each text, the newest last."""
    for item in texts:
        line = " ".join(f"{item.title or ''}  {item.text}".split())
        print(f"  · {plain(line[:_SHOWN_CHARACTERS])}{'…' if len(line) > _SHOWN_CHARACTERS else ''}")
