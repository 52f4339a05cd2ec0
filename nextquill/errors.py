"""The errors nextquill raises for a caller's mistake.

A message reads "argument: what is wrong, what came and what was expected", and `error.argument` is the argument's name,
so that the command line can say which flag to change. All errors derive from `NextQuillError`, and each also derives
from the built-in error a Python user would expect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

#: The argument that begins a message: "alpha: ", or "args.seed: " for a training argument.
_ARGUMENT = re.compile(r"(?:args\.)?([a-z_]\w*): ")


class NextQuillError(Exception):
    """Base class of every error that the caller can fix.

    Args:
        args: the message.
        argument: the argument at fault, where the message does not begin with it.
    """

    def __init__(self, *args: object, argument: str | None = None) -> None:
        super().__init__(*args)
        self._argument = argument

    @property
    def argument(self) -> str | None:
        """The name of the argument at fault; None where the message begins with none."""
        found = _ARGUMENT.match(str(self))
        return self._argument or (found and found[1])

    @property
    def message(self) -> str:
        """The text without the argument's name in front."""
        found = _ARGUMENT.match(str(self))
        return str(self)[found.end() :] if found and found[1] == self.argument else str(self)


class ArgumentError(NextQuillError, ValueError):
    """An argument has the right type and an unusable value, shape or range."""


class ArgumentTypeError(NextQuillError, TypeError):
    """An argument has the wrong type or dtype."""


class BackendUnavailableError(NextQuillError, RuntimeError):
    """The requested `impl` cannot run here."""


class GradientError(NextQuillError, RuntimeError):
    """The requested derivative is one that nextquill does not compute."""


class RecordError(NextQuillError, ValueError):
    """A training record is malformed; the message names the source, the line and the field."""


class BudgetError(NextQuillError, ValueError):
    """A query or a response does not fit the token budget; nothing is cut silently."""


class OutputExistsError(NextQuillError, FileExistsError):
    """An output folder or file holds something that would be overwritten."""


class CheckpointError(NextQuillError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another model or run."""


class NonFiniteError(NextQuillError, FloatingPointError):
    """A model gives NaN or infinity, in a loss, a gradient, a weight or an NLL; nothing is computed from it."""


class UnsupportedModelError(NextQuillError, RuntimeError):
    """A model's head cannot be handled exactly, so it is refused."""


@contextmanager
def naming(argument: str, *inner: str) -> Iterator[None]:
    """Put an argument's name before the message of an error that is raised inside.

    Args:
        argument: the name that the caller knows.
        inner: names that it replaces, of arguments that the caller did not give.
    """
    try:
        yield
    except NextQuillError as error:
        kind = RecordError if isinstance(error, RecordError) else type(error)  # a PlacedError takes other arguments
        raise kind(f"{argument}: {error.message if error.argument in inner else error}") from error
