"""Adds to the site's pages: the commands' flags, the metrics, the tasks' metrics, and links that stay inside the site.

mkdocs calls `on_page_markdown` for each page before it is rendered.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import inspect
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from mkdocs.exceptions import PluginError

from nextquill.cli.main import COMMANDS, main
from nextquill.cli.popi import SUBCOMMANDS
from nextquill.evaluation.metrics import METRICS
from nextquill.evaluation.tasks import TASKS

_COMMANDS_MARK, _TASKS_MARK, _METRICS_MARK = "<!-- commands -->", "<!-- tasks -->", "<!-- metrics -->"
#: The programs are on a page of their own; on GitHub the same links open the files.
_EXAMPLE_LINK = re.compile(r"\]\((?:\.\./)+examples/(\w+)\.py\)")
_TRAINING_ARGUMENTS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
_KINDS = {int: "INT", float: "NUMBER"}
_ON_EVERY_COMMAND = ("help", "config")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A page's Markdown with tables in place of their marks, and links that stay inside the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = _EXAMPLE_LINK.sub(lambda found: f"]({up}examples.md#{found[1]}py)", markdown)
    if _COMMANDS_MARK in markdown:
        markdown = markdown.replace(_COMMANDS_MARK, "\n\n".join("\n".join(_command(name)) for name in commands()))
    return markdown.replace(_TASKS_MARK, "\n".join(_tasks())).replace(_METRICS_MARK, "\n".join(_metrics()))


def _metrics() -> Iterator[str]:
    """Every metric of texts with its label, its unit and its direction."""
    yield from ("| name | label | unit | better |", "|---|---|---|---|")
    ways = {True: "higher", False: "lower", None: "neither"}
    for metric in METRICS.values():
        yield f"| `{metric.name}` | {metric.label} | {metric.unit or '0 to 1'} | {ways[metric.higher_is_better]} |"


def _tasks() -> Iterator[str]:
    """Every task with its measures."""
    yield from ("| task | what it is | measures |", "|---|---|---|")
    for task in TASKS.values():
        yield f"| `{task.name}` | {task.label} | {', '.join(METRICS[name].label for name in task.metrics)} |"


def commands() -> dict[str, str]:
    """Each command with a line on what it does; `popi` is replaced by its subcommands."""
    found = dict[str, str]()
    for name, text in COMMANDS.items():
        found |= {f"{name} {each}": does for each, does in SUBCOMMANDS.items()} if name == "popi" else {name: text}
    return found


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that `nextquill COMMAND --help` prints.

    Raises:
        PluginError: the command printed no help.
    """
    with mock.patch.object(argparse.ArgumentParser, "print_help", autospec=True) as print_help:
        code = main([*command.split(), "--help"])
    if not print_help.called:
        raise PluginError(f"nextquill {command} --help: no help was printed, and the exit code was {code}")
    parser: argparse.ArgumentParser = print_help.call_args.args[0]
    return parser


def _command(name: str) -> Iterator[str]:
    """The lines of a command's section."""
    parser = parser_of(name)
    about = commands()[name]
    yield from (f"## nextquill {name}", "", about, "")
    if parser.description and parser.description != about:
        yield from (_text(parser.description), "")
    required = getattr(parser, "required", ())
    actions = {action.dest: action for action in reversed(parser._actions)}  # a flag before its `--no_` twin
    for common in _ON_EVERY_COMMAND:
        actions.pop(common, None)
    for kind in getattr(parser, "dataclass_types", ()):
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        own = {name: actions.pop(name) for name in names if name in actions}
        if kind.__name__ == "TrainingArguments":
            own = {name: action for name, action in own.items() if name in required}
            about = f"Every field of [TrainingArguments]({_TRAINING_ARGUMENTS}) is a flag. Required:"
        else:
            about = f"**{_text((inspect.getdoc(kind) or '').split(chr(10) * 2)[0])}**"
        yield from (about, "", *_flags(own, required), "")
    yield from _flags(actions, required)


def _flags(actions: dict[str, argparse.Action], required: Any) -> Iterator[str]:
    """A definition list: each flag with its value and its help."""
    for name, action in actions.items():
        default = getattr(action.default, "value", action.default)
        text = _text(action.help or "")
        if action.choices is not None:
            text += " One of " + ", ".join(f"`{choice}`" for choice in action.choices) + "."
        if name in required:
            text = f"**Required.** {text}"
        elif default not in (None, False, "", [], argparse.SUPPRESS) and "default" not in text:
            text += f" Default: `{default}`."
        spelling = action.option_strings[0] if action.option_strings else name
        yield from (f"`{' '.join([spelling, *_value(action)])}`", f":   {text}", "")


def _value(action: argparse.Action) -> list[str]:
    """The placeholder for a flag's value, if it takes one."""
    if action.nargs == 0:
        return []
    if action.const is True:
        return ["[true|false]"]
    kind = action.type if isinstance(action.type, type) else str
    name = "NAME" if action.choices is not None and action.metavar is None else action.metavar
    return [str(name or _KINDS.get(kind, "TEXT")) + (" ..." if action.nargs in ("+", "*") else "")]


def _text(text: str) -> str:
    """Plain text as Markdown on one line."""
    return re.sub(r"([*_`\[\\])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
