"""Words prompts with a Jinja template.

The template gets

    query            the request
    history          the past texts, each with `text`, `title` (or None) and `timestamp` (as 2024-03-31, or None)
    counterfactual   true if there is no history to show

and gives the prompt without system message and chat markers. Labels belong outside of `{{ }}`. The whole value of an
expression or a macro counts as a user's text: its control tokens are broken, and its lines are quoted if they begin
like the template's (see `user_text`). Labels inside would not be known as the template's own.

The template is stored in a model's folder, so it may come from someone else. It runs in Jinja's sandbox, where it sees
only these values and cannot change them. A new template is tried out with a budget first (see `template_budget`). After
that, each prompt has a budget of loops and output.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nextquill.data._checks import needed_package
from nextquill.data.records import HistoryItem
from nextquill.data.template_budget import CHARACTERS, beyond_budget
from nextquill.errors import ArgumentError, RecordError

# Lower-case letters, which most filters leave alone.
_QUERY, _TITLE, _TEXT, _OTHER_TEXT = "nqprobequery", "nqprobetitle", "nqprobetext", "nqprobeother"
_SPOKEN = {_QUERY: "the query", _TITLE: "a title", _TEXT: "a text", _OTHER_TEXT: "a text"}
_TOUCHING = re.compile("({0})({0})".format("|".join(_SPOKEN)))
_PROBE_HISTORY = (HistoryItem(_TEXT, title=_TITLE, timestamp=0.0), HistoryItem(_OTHER_TEXT))
_FILE_NAME = "<template>"  # Jinja's name, in tracebacks, for a template made from a string
#: Steps of loops and calls of macros in one prompt, which take less than a second.
_STEPS = 100_000
# Names that a template can neither read nor set.
_CLEAN, _SPENT = "-clean", "-spent"


class _Spent:
    """What the rendering of one prompt has cost so far."""

    def __init__(self) -> None:
        self.steps, self.characters = 0, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > _STEPS:
            raise ArgumentError(f"more than {_STEPS:,} steps of loops and macros")

    def write(self, text: str) -> str:
        self.characters += len(text)
        if self.characters > CHARACTERS:
            raise ArgumentError(f"more than {CHARACTERS:,} characters")
        return text


class _PastText:
    """A past text as the template sees it; its day is computed only if the template asks for it."""

    def __init__(self, item: HistoryItem, day: Callable[[float], str]) -> None:
        self.text, self.title = item.text, item.title
        self._seconds, self._day = item.timestamp, day

    @property
    def timestamp(self) -> str | None:
        return None if self._seconds is None else self._day(self._seconds)


def render_jinja(
    source: str,
    query: str,
    history: Sequence[HistoryItem],
    day: Callable[[float], str],
    clean: Callable[[str], str],
) -> str:
    """Render a template; `day` writes timestamps, and `clean` is applied to all that is inserted, after filters.

    Raises:
        ArgumentError: the template is malformed, or fails on these values, or goes beyond its budget; the message names
            the line.
        RecordError: it shows a timestamp that `day` refuses.
    """
    items = tuple(_PastText(item, day) for item in history)
    template, spent = _compiled(source), _Spent()
    values = {"query": query, "history": items, "counterfactual": not items, _CLEAN: clean, _SPENT: spent}
    try:
        return "".join(map(spent.write, template.generate(values)))
    except RecordError:  # from a timestamp without a day
        raise
    except Exception as error:  # a template is a program that can raise any error
        message = f"{_line(error)}{' '.join(str(error).split()) or type(error).__name__}"
        raise ArgumentError(f"prompt_jinja: {message}") from error


def check_jinja(source: str, day: Callable[[float], str]) -> None:
    """Render a template with probes, and refuse one without the necessary parts of a prompt.

    Raises:
        ArgumentError: it is malformed or fails, goes beyond its budget, does not show the query, does not change with
            the history, or puts two texts next to each other.
    """
    _check_budget(source, day)
    bare, one, two = _probes(source, day)
    for name, rendered in (("with a history", two), ("without history", bare)):
        if _QUERY not in rendered:
            raise ArgumentError(f"prompt_jinja: expected a template that shows the query, got none {name}")
    if len({bare, one, two}) < 3:
        raise ArgumentError("prompt_jinja: expected a template that shows the history, got one prompt for all")
    # Two texts together could form a control token that neither of them holds.
    if touching := _TOUCHING.search(f"{two}\0{one}"):
        raise ArgumentError(
            "prompt_jinja: expected a space, a line break or words between the texts, got "
            f"{_SPOKEN[touching[1]]} followed by {_SPOKEN[touching[2]]} at once"
        )


def _probes(source: str, day: Callable[[float], str]) -> Iterator[str]:
    return (render_jinja(source, _QUERY, items, day, str) for items in ((), _PROBE_HISTORY[:1], _PROBE_HISTORY))


@functools.lru_cache(maxsize=16)
def _check_budget(source: str, day: Callable[[float], str]) -> None:
    """Raise ArgumentError if compiling the template, or rendering the probes, goes beyond its budget."""
    _environment()  # so that a missing package is said here
    if beyond := beyond_budget(lambda: _probes(source, day)):
        raise ArgumentError(f"prompt_jinja: expected a template that renders small prompts at once, it takes {beyond}")


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    environment = _environment()
    from jinja2 import TemplateSyntaxError

    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ArgumentError(f"prompt_jinja: line {error.lineno}: {error.message}") from error
    # Jinja writes a program in Python, whose compiler has limits of its own.
    except (SyntaxError, RecursionError, MemoryError) as error:
        what = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise ArgumentError(f"prompt_jinja: the template is nested too deep to be compiled: {what}") from error


def _environment() -> Any:
    with needed_package("prompt_jinja: needs jinja2", "cli"):
        from jinja2 import StrictUndefined, nodes, pass_context
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    @pass_context
    def cleaned(context: Any, value: object) -> str:
        return str(context[_CLEAN](context[_SPENT].write(str(value))))

    @pass_context
    def step(context: Any) -> bool:
        context[_SPENT].step()
        return True

    class Environment(ImmutableSandboxedEnvironment):
        """Counts what can repeat: every step of a loop, also one that its condition leaves out, and every call."""

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree: Any = super()._parse(source, name, filename)
            count: Any = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
                if isinstance(node, nodes.For) and node.test is not None:
                    node.test = nodes.And(count, node.test)
                node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
            return tree

    # White space as in the chat templates of tokenizers: a line with only a tag leaves no empty line.
    environment: Any = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=cleaned)
    environment.step = step
    return environment


def _line(error: Exception) -> str:
    """The innermost line of the template that an error passed through."""
    calls = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in calls if frame.f_code.co_filename == _FILE_NAME]
    return f"line {lines[-1]}: " if lines else ""
