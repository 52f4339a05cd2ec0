"""The name of transformers' cache of keys, values and states, in what takes one and in what returns one.

It is `cache` since transformers 5.24. Before, it is `past_key_values`, and `cache_params` in some layers with a state.
Code of models outside transformers may keep those names, so they are read from signatures, not from a version.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

from transformers import GenerationMixin

from nextquill.models.configs import base_model

_NAMES = ("cache", "past_key_values", "cache_params")


@functools.cache
def cache_argument(function: Callable[..., Any]) -> str | None:
    """The name of the cache among a function's parameters; None if it takes none."""
    return _first_of(inspect.signature(function).parameters)


def for_forward(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument of a model, also of one inside an adapter."""
    name = cache_argument(type(base_model(model)).forward)
    return for_generate(cache) if name is None else {name: cache}


def for_generate(cache: Any) -> dict[str, Any]:
    """A cache as an argument of transformers' `generate`."""
    return {str(cache_argument(GenerationMixin.prepare_inputs_for_generation)): cache}


def cache_of(outputs: Any) -> Any:
    """The cache in what a model or its `generate` returned; None if there is none."""
    name = _first_of(outputs.keys() if hasattr(outputs, "keys") else ())
    return None if name is None else outputs[name]


def _first_of(names: Collection[str]) -> str | None:
    return next((name for name in _NAMES if name in names), None)
