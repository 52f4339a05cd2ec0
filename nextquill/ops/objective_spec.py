"""Objectives as text: an operator's schema has no room for a Python object.

A published objective is written out in full: `torch.compile` sees that two equal losses are equal, and a compiled or
exported graph works in another process. An objective with a caller's own weighting gets a name that is unique to this
process; `decode` finds it as long as the objective exists.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import uuid
import weakref
from typing import Any

from nextquill.errors import ArgumentError
from nextquill.ops.objective import PairObjective
from nextquill.weighting import PUBLISHED_WEIGHTINGS

_BY_NAME = {weighting.__name__: weighting for weighting in PUBLISHED_WEIGHTINGS}
_own: weakref.WeakValueDictionary[str, PairObjective] = weakref.WeakValueDictionary()


def encode(objective: PairObjective) -> str:
    """Return `objective` as text, for `decode`."""
    fields: dict[str, Any] = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    weighting = fields.pop("weighting")
    # Exact types: a subclass may compute something else.
    if type(weighting) in PUBLISHED_WEIGHTINGS:
        return json.dumps([type(weighting).__name__, dataclasses.asdict(weighting), fields])
    name = f"own-{uuid.uuid4()}"
    _own[name] = objective
    return name


def decode(spec: str) -> PairObjective:
    """Return the objective that `encode` wrote.

    Raises:
        ArgumentError: it has a caller's own weighting, and comes from another process or no longer exists.
    """
    if not spec.startswith("own-"):
        return _published(spec)
    try:
        return _own[spec]
    except KeyError:
        raise ArgumentError(
            f"objective: expected one of a living loss in this process, got {spec}: a weighting of your own cannot be "
            "exported or outlive its loss"
        ) from None


@functools.lru_cache(maxsize=256)
def _published(spec: str) -> PairObjective:
    name, parameters, fields = json.loads(spec)
    return PairObjective(weighting=_BY_NAME[name](**parameters), **fields)
