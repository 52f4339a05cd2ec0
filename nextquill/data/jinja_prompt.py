"""Words prompts with a Jinja template.

The template gets

    query            the request
    history          the past texts, each with `text`, `title` (or None) and `timestamp` (as 2024-03-31, or None)
    counterfactual   true if there is no history to show

and gives the prompt without system message and chat markers. Labels belong outside of `{{ }}`. The whole value of an
expression or a macro counts as a user's text: its control tokens are broken, and its lines are quoted if they begin
like the template's (see `user_text`). Labels inside would not be known as the template's own.

The template is stored in a model's folder, so it may come from someone else. It runs in Jinja's sandbox, where it sees
only these values and cannot change them.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from nextquill.data._checks import needed_package
from nextquill.data.records import HistoryItem
from nextquill.errors import ArgumentError, RecordError

# Lower-case letters, which most filters leave alone.
_QUERY, _TITLE, _TEXT, _OTHER_TEXT = "nqprobequery", "nqprobetitle", "nqprobetext", "nqprobeother"
_SPOKEN = {_QUERY: "the query", _TITLE: "a title", _TEXT: "a text", _OTHER_TEXT: "a text"}
_TOUCHING = re.compile("({0})({0})".format("|".join(_SPOKEN)))
_PROBE_HISTORY = (HistoryItem(_TEXT, title=_TITLE, timestamp=0.0), HistoryItem(_OTHER_TEXT))
_FILE_NAME = "<template>"  # Jinja's name, in tracebacks, for a template made from a string


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
        ArgumentError: the template is malformed, or fails on these values; the message names the line.
        RecordError: it shows a timestamp that `day` refuses.
    """
    items = tuple(_PastText(item, day) for item in history)
    template = _compiled(source)
    try:
        return str(template.render(query=query, history=items, counterfactual=not items, _clean=clean))
    except RecordError:  # from a timestamp without a day
        raise
    except Exception as error:  # a template is a program that can raise any error
        message = f"{_line(error)}{' '.join(str(error).split()) or type(error).__name__}"
        raise ArgumentError(f"prompt_jinja: {message}") from error


def check_jinja(source: str, day: Callable[[float], str]) -> None:
    """Render a template with probes, and refuse one without the necessary parts of a prompt.

    Raises:
        ArgumentError: it is malformed or fails, does not show the query, does not change with the history, or puts two
            texts next to each other.
    """
    bare, one, two = (
        render_jinja(source, _QUERY, items, day, str) for items in ((), _PROBE_HISTORY[:1], _PROBE_HISTORY)
    )
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


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    with needed_package("prompt_jinja: needs jinja2", "cli"):
        from jinja2 import StrictUndefined, TemplateSyntaxError, pass_context
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    @pass_context
    def cleaned(context: Any, value: object) -> str:
        return str(context["_clean"](str(value)))

    # White space as in the chat templates of tokenizers: a line with only a tag leaves no empty line.
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=cleaned
    )
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ArgumentError(f"prompt_jinja: line {error.lineno}: {error.message}") from error


def _line(error: Exception) -> str:
    """The innermost line of the template that an error passed through."""
    calls = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in calls if frame.f_code.co_filename == _FILE_NAME]
    return f"line {lines[-1]}: " if lines else ""
