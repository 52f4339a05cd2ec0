"""Objectives as integers: an operator's schema has no room for a Python object.

An objective is kept alive by whoever registered it, and forgotten with it.
"""

from __future__ import annotations

import itertools
import weakref

from nextquill.errors import ArgumentError
from nextquill.ops.objective import PairObjective

_objectives: weakref.WeakValueDictionary[int, PairObjective] = weakref.WeakValueDictionary()
_next_handle = itertools.count(1)


def register(objective: PairObjective) -> int:
    """A handle for `objective`, valid in this process while the objective lives."""
    handle = next(_next_handle)
    _objectives[handle] = objective
    return handle


def lookup(handle: int) -> PairObjective:
    """The objective of a handle.

    Raises:
        ArgumentError: none has it, or it is gone.
    """
    try:
        return _objectives[handle]
    except KeyError:
        raise ArgumentError(f"objective: expected the handle of a living loss in this process, got {handle}") from None
