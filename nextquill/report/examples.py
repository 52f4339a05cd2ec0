"""The chosen examples of some runs, as a page shows them: tokens by effect, texts side by side, history items."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.results import EFFECTS_FILE, ITEM_EFFECTS_FILE, EvaluatedExample, json_objects
from nextquill.report.data import GeneratedText, LeftOutItem, ResponseVariant, ResponseView, TokenEffect
from nextquill.report.measures import same_records, scores_text
from nextquill.report.runs import Run, read_items, read_tokens
from nextquill.report.select_examples import choose

_BRANCHES = {
    "factual": "generated with history",
    "counterfactual": "generated without history",
    "placebo": "generated with another user's history",
}


def example_views(runs: Sequence[Run], count: int, indices: Sequence[int] | None = None) -> list[ResponseView]:
    """Some examples of each set of records that runs were evaluated on, with what every such run made of them.

    Args:
        runs: with or without an evaluation.
        count: how many examples of each set of records; `choose` says which, by the effects of its first run.
        indices: these examples instead, in this order.

    Raises:
        ArgumentError: no run has an example of one of `indices`.
        RecordError: a file of an evaluation is damaged.
    """
    groups = _by_records(run for run in runs if run.examples)
    _check_indices(groups, indices)
    views = []
    for group in groups:
        several = len(groups) > 1
        chosen = _chosen(group, count, indices)
        tokens = [read_tokens(run, chosen) for run in group]
        items = [read_items(run, chosen) for run in group]
        for index, why in chosen.items():
            parts = [
                (run, example, own.get(index), with_items.get(index))
                for run, own, with_items in zip(group, tokens, items, strict=True)
                if (example := _by_index(run).get(index)) is not None
            ]
            where = f" of {', '.join(run.label for run in group)}" if several else ""
            views.append(_view(f"Example {index}{where}", why, parts, alone=len(group) == 1))
    return views


_Part = tuple[Run, EvaluatedExample, list[TokenEffect] | None, tuple[list[str], list[LeftOutItem]] | None]


def _view(title: str, why: str, parts: Sequence[_Part], *, alone: bool) -> ResponseView:
    example = parts[0][1]
    context = [
        ("User", f"{example.user_id}, {example.history_kept} of {example.history_total} history items in the prompt"),
        ("Query", example.query),
        *([("Shown for", why)] if why else []),
    ]
    variants = [
        _variant(run, tokens, items) for run, _, tokens, items in parts if tokens is not None or items is not None
    ]
    texts = [
        GeneratedText(name if alone else f"{run.label}: {name}", own.generated[branch], scores_text(own, branch))
        for run, own, _, _ in parts
        for branch, name in _BRANCHES.items()
        if branch in own.generated
    ]
    if texts or not variants:  # the coloured tokens are the response already, but beside other texts it is wanted too
        texts.insert(0, GeneratedText("the user's own response", example.response))
    return ResponseView(title, context, variants, texts)


def _variant(
    run: Run, tokens: list[TokenEffect] | None, items: tuple[list[str], list[LeftOutItem]] | None
) -> ResponseVariant:
    texts, history = items or ([], [])
    if tokens is None:
        tokens = [TokenEffect(text, math.nan, math.nan) for text in texts]
    elif items is not None and texts != [token.text for token in tokens]:
        assert run.evaluation_folder is not None
        path = run.evaluation_folder / ITEM_EFFECTS_FILE
        raise RecordError(f"{path}: field 'tokens': expected those of {EFFECTS_FILE} beside it")
    return ResponseVariant(run.label, tokens, separator="", items=history)


def _by_records(runs: Iterable[Run]) -> list[list[Run]]:
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if same_records(group[0], run)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def _by_index(run: Run) -> Mapping[int, EvaluatedExample]:
    return {example.index: example for example in run.examples}


def _chosen(group: Sequence[Run], count: int, indices: Sequence[int] | None) -> dict[int, str]:
    """Indices of examples and why they are shown."""
    if indices is not None:
        known = {example.index for run in group for example in run.examples}
        return {index: "" for index in dict.fromkeys(indices) if index in known}
    first = group[0]
    effects = {example.index: _effect(example) for example in first.examples}
    measured = {
        raw["index"]
        for run in group
        if run.evaluation_folder is not None and (run.evaluation_folder / ITEM_EFFECTS_FILE).is_file()
        for _, raw in json_objects(run.evaluation_folder / ITEM_EFFECTS_FILE)
        if isinstance(raw.get("index"), int)
    }
    of = f" in {first.label}" if len(group) > 1 else ""
    return {
        index: f"{why} (whole history {effects[index]:+.4f} nats per token{of})"
        for index, why in choose(effects, count, measured).items()
    }


def _effect(example: EvaluatedExample) -> float:
    """The mean effect of its history, as far as it was measured."""
    value = example.scores.get("effect_logprob", math.nan)
    return value if value is not None and math.isfinite(value) else 0.0


def _check_indices(groups: Sequence[Sequence[Run]], indices: Sequence[int] | None) -> None:
    known = {example.index for group in groups for run in group for example in run.examples}
    for index in indices or ():
        if index not in known:
            there = f"{len(known)} examples, {min(known)} to {max(known)}" if known else "no examples"
            raise ArgumentError(f"index: no example {index}; the runs have {there}")
