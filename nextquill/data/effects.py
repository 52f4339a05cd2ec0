"""Effects that a model has measured once, stored with the examples they belong to.

`nextquill score` writes one line per record. Training takes its token weights from these lines, and so needs no
counterfactual pass for the weights alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nextquill.data.examples import EncodedExample
from nextquill.data.lines import json_lines
from nextquill.data.records import required
from nextquill.data.skipped import PlacedError, unexpected
from nextquill.errors import ArgumentError, RecordError
from nextquill.storage.manifests import is_changed

_FIELDS = ("nll_factual", "nll_counterfactual")
#: Of numbers with six decimals, relative to 1 nat or to the NLLs, which are float32.
_ROUNDING = 2e-6


def load_effects(path: str | os.PathLike[str], examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """The examples, with the effects from a file written by `nextquill score`.

    Every example needs a line with its index, user and response tokens. Lines may stand in any order, and lines with
    other indices are skipped. Prompts are not compared, as another model may have seen more history.

    Args:
        path: JSONL with `index`, `user_id`, `token_ids`, `nll_factual` and `nll_counterfactual`, in nats. Their
            difference must be `effect_logprob`, if a line has it. A line must agree with its `digest`, if it has one.
        examples: encoded examples whose indices differ.

    Returns:
        Copies of the examples, in their order, with their `effects`.

    Raises:
        RecordError: the file cannot be read, a line is malformed or belongs to another example, or an example has no
            line; the message names file, line and field.
        ArgumentError: two examples have the same index.
    """
    wanted = {example.index: example for example in examples}
    if len(wanted) < len(examples):
        raise ArgumentError("examples: expected a different index for each, got some index twice")
    found: dict[int, Tensor] = {}
    for where, raw in json_lines(path):
        if not isinstance(raw, Mapping):
            raise PlacedError(where, f"expected an object with named fields, got {type(raw).__name__}")
        index = _field(raw, "index", where, int)
        if index in wanted:
            if index in found:
                raise PlacedError(where, f"expected each index once, got {index} again", "index")
            found[index] = _effects(raw, wanted[index], where)
    missing = next((example for example in examples if example.index not in found), None)
    if missing is not None:
        raise RecordError(
            f"{os.fspath(path)}: expected a line for every example, got none with index {missing.index} "
            f"(user {missing.user_id!r}); score the whole training file"
        )
    return [dataclasses.replace(example, effects=found[example.index]) for example in examples]


def _effects(raw: Mapping[str, Any], example: EncodedExample, where: str) -> Tensor:
    user, ids = _field(raw, "user_id", where, str), _field(raw, "token_ids", where, list)
    if user != example.user_id:
        expected = f"{example.user_id!r}, whose example has index {example.index}"
        raise PlacedError(where, f"expected {expected}, got {user!r}; the file was made from other records", "user_id")
    if ids != example.factual.response_ids:
        raise PlacedError(
            where,
            f"expected the response of example {example.index}, which begins {example.factual.response_ids[:5]} and "
            f"has {example.factual.response_length} tokens, got {ids[:5]} and {len(ids)} tokens; the file was made "
            "from other records or with another tokenizer",
            "token_ids",
        )
    found = torch.stack([_numbers(raw, name, where, len(ids)) for name in _FIELDS])
    if "effect_logprob" in raw:
        effect = _numbers(raw, "effect_logprob", where, len(ids))
        wrong = (effect - (found[1] - found[0])).abs() > _ROUNDING * (1 + found.abs().sum(0))
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise PlacedError(
                where,
                f"expected nll_counterfactual - nll_factual, which is {float(found[1, place] - found[0, place]):.6f} "
                f"for token {place}, got {float(effect[place]):.6f}; the line is damaged",
                "effect_logprob",
            )
    if is_changed(raw):
        raise PlacedError(where, "expected that of the line, which is damaged or was changed; score again", "digest")
    return found


def _numbers(raw: Mapping[str, Any], name: str, where: str, count: int) -> Tensor:
    values = _field(raw, name, where, list)
    if len(values) != count:
        raise PlacedError(where, f"expected {count} numbers, one per token, got {len(values)}", name)
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise PlacedError(where, "expected numbers only", name)
    numbers = torch.tensor(values, dtype=torch.float32)
    if not numbers.isfinite().all():
        raise PlacedError(where, "expected finite numbers", name)
    return numbers


def _field(raw: Mapping[str, Any], name: str, where: str, kind: type) -> Any:
    value = required(raw, name, where)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise unexpected(where, name, kind.__name__, value)
    return value
