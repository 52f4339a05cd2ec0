"""The errors nextquill raises for a caller's mistake.

Each names the argument, what came and what was expected. All derive from `NextQuillError`, so the command line can turn
any of them into one line and an exit code, and each also derives from the built-in error a Python user would expect.
"""

from __future__ import annotations


class NextQuillError(Exception):
    """Base class of every error that is the caller's to mend."""


class ArgumentError(NextQuillError, ValueError):
    """An argument has the right type and an unusable value, shape or range."""


class ArgumentTypeError(NextQuillError, TypeError):
    """An argument has the wrong type or dtype."""


class BackendUnavailableError(NextQuillError, RuntimeError):
    """The requested `impl` cannot run here."""


class GradientError(NextQuillError, RuntimeError):
    """A derivative was asked for that nextquill does not compute."""


class RecordError(NextQuillError, ValueError):
    """A training record is malformed; the message names the source, the line and the field."""


class BudgetError(NextQuillError, ValueError):
    """A query or a response does not fit the token budget; nothing is cut silently."""


class OutputExistsError(NextQuillError, FileExistsError):
    """An output folder or file holds something that would be overwritten."""


class CheckpointError(NextQuillError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another model or run."""


class UnsupportedModelError(NextQuillError, RuntimeError):
    """A model's head cannot be handled exactly, so it is refused."""
