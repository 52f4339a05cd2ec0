"""Whether the model prefers the response that the user chose to the rejected one, and whether the history decides it.

    margin = log p(chosen | prompt) - log p(rejected | prompt)                     (nats)

A longer response has a smaller probability whatever it says. So the margin is reported twice: as it is, as in DPO's
loss, and per token, from log p / tokens of each response. It is measured under every prompt: with the user's history,
without, and with another user's. Both responses under all prompts share their common parts in one forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nextquill.data import Branch, ExampleEncoder, Record
from nextquill.data.templates import BRANCHES
from nextquill.errors import RecordError
from nextquill.evaluation.measures import measure_name
from nextquill.evaluation.scoring import BranchScorer

PAIR = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """Two responses to one record under the same prompts.

    Args:
        index: the record's position.
        branches: by name of the prompt ("factual", "counterfactual" and, where there is one, "placebo"), the branch of
            the chosen response and that of the rejected one.
    """

    index: int
    branches: dict[str, tuple[Branch, Branch]]


def has_pair(record: Record, index: int) -> bool:
    """Whether a record holds two responses to compare; RecordError if it holds one, or something that is not a text."""
    given = [name for name in PAIR if record.extra.get(name) is not None]
    for name in given:
        value = record.extra[name]
        if not isinstance(value, str) or not value.strip():
            what = "a blank string" if isinstance(value, str) else type(value).__name__
            raise RecordError(f"record {index}: field '{name}': expected some text, got {what}", argument="records")
    if len(given) == 1:
        missing = next(name for name in PAIR if name not in given)
        problem = f"expected it beside '{given[0]}', got none"
        raise RecordError(f"record {index}: field '{missing}': {problem}", argument="records")
    return bool(given)


def encode_pairs(encoder: ExampleEncoder, records: Sequence[Record], seed: int) -> list[PreferencePair]:
    """Both responses of every record that `has_pair`, under prompts that leave room for the longer one.

    Args:
        encoder: makes the prompts.
        records: all records, also those without a pair: the other users whose histories are the placebos.
        seed: decides whose history that is, as in `ExampleEncoder.encode_all`.

    Raises:
        RecordError: a record holds half a pair.
        BudgetError: the longer response of a record does not fit, with the query, into the budget.
    """
    responses = {
        index: [encoder.renderer.response_ids(str(record.extra[name])) for name in PAIR]
        for index, record in enumerate(records)
        if has_pair(record, index)
    }
    if not responses:
        return []
    examples = encoder.encode_all(
        [_with_longer(record, responses.get(i)) for i, record in enumerate(records)], True, seed
    )
    return [
        PreferencePair(
            index,
            {
                name: (Branch(branch.prompt_ids, chosen), Branch(branch.prompt_ids, rejected))
                for name in BRANCHES
                if (branch := getattr(examples[index], name)) is not None
            },
        )
        for index, (chosen, rejected) in responses.items()
    ]


def _with_longer(record: Record, responses: list[list[int]] | None) -> Record:
    """The record with the longer of its two responses for its own."""
    if responses is None:
        return record
    name = PAIR[0] if len(responses[0]) >= len(responses[1]) else PAIR[1]
    return dataclasses.replace(record, response=str(record.extra[name]))


def preference_scores(scorer: BranchScorer, pair: PreferencePair) -> dict[str, float]:
    """The margins of a pair under every prompt, and whether each is on the user's side.

    Returns:
        For each prompt, with its name as suffix but for "factual": `preference_margin` in nats,
        `preference_margin_per_token` in nats per token, and `preference_accuracy` and `preference_accuracy_per_token`:
        1 where the margin is above 0, 0 where it is below, and a half where it is 0.

    Raises:
        BudgetError: a prompt with its response takes more than the scorer's `max_tokens`.
    """
    branches = [branch for both in pair.branches.values() for branch in both]
    nll = iter(scorer(branches))
    result = dict[str, float]()
    for name in pair.branches:
        chosen, rejected = next(nll).double(), next(nll).double()
        for kind, margin in (("", rejected.sum() - chosen.sum()), ("_per_token", rejected.mean() - chosen.mean())):
            value = round(float(margin), 6) + 0.0
            result[measure_name(f"preference_margin{kind}", name)] = value
            result[measure_name(f"preference_accuracy{kind}", name)] = 0.5 if value == 0 else float(value > 0)
    return result
