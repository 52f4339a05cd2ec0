"""The text of `nextquill COMMAND --help`: a short usage line, then the flags under the subject they belong to."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Collection
from typing import Any

_HEADINGS = {
    "TrainModelOptions": "model",
    "ModelOptions": "model",
    "TrainFiles": "data",
    "ScoreFiles": "data",
    "ConvertInput": "data",
    "ConvertFormat": "options of single formats",
    "ConvertRows": "bad rows",
    "ConvertOutput": "output",
    "InspectFiles": "data",
    "InspectOptions": "output",
    "ReportOptions": "runs and output",
    "PrepareOptions": "output",
    "PromptOptions": "prompt",
    "LossOptions": "loss",
    "LoraOptions": "LoRA",
    "EvaluateOptions": "measures and output",
    "ScoreOptions": "output",
    "CompareFiles": "data",
    "CompareOptions": "comparison",
    "CompareEvaluation": "evaluation",
    "DemoOptions": "options",
    "PopiModelOptions": "models",
    "PopiRunOptions": "models",
    "PopiFiles": "data",
    "PopiFormat": "rows",
    "POPIConfig": "POPI",
    "PopiPromptOptions": "prompts",
    "PopiLoraOptions": "LoRA",
    "PopiSignalFiles": "data",
    "PopiSignals": "signals",
    "PopiSummarizeOptions": "summaries",
    "PopiSummariesOptions": "options",
    "PopiPairs": "data",
    "PopiEvaluateOptions": "measures and output",
    "PopiExportOptions": "options",
    "TrainingArguments": "transformers' TrainingArguments",
}
#: Flags of TrainingArguments shown, and explained, where a reader looks for them.
_MOVED = {
    "TrainFiles": {"output_dir": "Where the run is written; must be empty, or hold the run that is resumed."},
    "PopiFiles": {"output_dir": "Where the run is written; must be empty, or hold the run that is resumed."},
    "CompareFiles": {"output_dir": "Where the comparison is written; new, empty, or its own."},
}
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}
_WIDTH = 110
#: A longer list of choices goes below its flag instead of beside it.
_MOST_CHOICES_BESIDE = 4


def help_text(parser: Any, required: Collection[str]) -> str:
    """The help of an `HfArgumentParser`.

    Args:
        parser: the parser; its `dataclass_types` are the subjects.
        required: destinations of the flags that must be given.
    """
    formatter = _Formatter(parser.prog, width=min(_WIDTH, shutil.get_terminal_size().columns))
    actions = {action.dest: action for action in reversed(parser._actions)}  # a flag before its `--no_` twin
    needed = [name for name in actions if name in required][::-1]
    usage = " ".join(f"--{name} {formatter.value_name(actions[name])}" for name in needed)
    formatter.add_usage(f"{parser.prog} {usage} [options]", [], [])
    formatter.add_text(parser.description)
    for kind in parser.dataclass_types:
        for name, text in _MOVED.get(kind.__name__, {}).items():
            actions[name].help = text
        names = [*(field.name for field in dataclasses.fields(kind) if field.init), *_MOVED.get(kind.__name__, {})]
        formatter.start_section(_HEADINGS.get(kind.__name__, kind.__name__))
        formatter.add_arguments([actions.pop(name) for name in names if name in actions])
        formatter.end_section()
    formatter.start_section("general")
    formatter.add_arguments([actions["config"], actions["help"]])
    formatter.end_section()
    formatter.add_text(
        "Flags may be spelled with hyphens. A flag that is true or false may stand alone for true. "
        "--debug, anywhere on the command line, shows the traceback of an error."
    )
    return formatter.format_help()


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str, width: int) -> None:
        super().__init__(prog, max_help_position=30, width=width)

    def value_name(self, action: argparse.Action) -> str:
        """What stands for a flag's value."""
        if action.metavar is not None:
            return str(action.metavar)
        if action.dest == "output_dir":
            return "DIR"
        if action.const is True:
            return "[true|false]"
        if action.choices is not None:
            choices = list(map(str, action.choices))
            return f"{{{','.join(choices)}}}" if len(choices) <= _MOST_CHOICES_BESIDE else "NAME"
        kind = action.type if isinstance(action.type, type) else str
        return f"{_METAVARS.get(kind, 'TEXT')}{' ...' if action.nargs == '+' else ''}"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self.value_name(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        if action.choices is not None and len(list(action.choices)) > _MOST_CHOICES_BESIDE:
            text += f" One of: {', '.join(map(str, action.choices))}."
        default = getattr(action.default, "value", action.default)
        shown = default is not None and default is not False and default not in ("", [], argparse.SUPPRESS)
        return f"{text} (default: {default})" if shown and "default" not in text.lower() else text
