"""Checks of arguments and of optional packages, shared by the files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nextquill.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError


@contextmanager
def needed_package(need: str, extra: str) -> Iterator[None]:
    """Say what to install if a package cannot be imported; `need` says which argument needs which package."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{need}, which is not installed ({error}); pip install 'nextquill[{extra}]'"
        ) from error


def check_integer(name: str, value: object, least: int, *, or_none: bool = False) -> None:
    """Raise unless `value` is an integer, not a bool, and at least `least`, or None if `or_none`."""
    if value is None and or_none:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ArgumentError(f"{name}: expected at least {least}, got {value}")


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_instance(name: str, value: object, kind: type, expected: str) -> None:
    """Raise unless `value` is an instance of `kind`, which `expected` names in words."""
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{name}: expected {expected}, got {value!r}")
