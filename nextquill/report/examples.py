"""Chosen examples of some runs, as a page shows them: tokens by effect, texts side by side, history items."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.measures import PROMPTS
from nextquill.evaluation.results import EFFECTS_FILE, ITEM_EFFECTS_FILE, EvaluatedExample, ItemEffects, finite
from nextquill.evaluation.text_measures import REFERENCE
from nextquill.report.data import GeneratedText, LeftOutItem, ResponseVariant, ResponseView, TokenEffect
from nextquill.report.numbers import rounded
from nextquill.report.run_tables import scores_text
from nextquill.report.runs import Run, read_items, read_tokens

LARGEST, MIDDLE, SMALLEST = "one of the largest effects", "an effect near the median", "one of the smallest effects"
ITEMS = "its single items, whose effects were measured"
MIX = "a third the largest, a third near the median, a third the smallest"


def choose(effects: Mapping[int, float], count: int, with_items: Collection[int] = ()) -> dict[int, str]:
    """A mix that does not flatter: a third with the largest effects, a third near the median, a third the smallest.

    A quarter of the places, and at least one, goes to the largest effects among `with_items`, the examples whose items
    were measured, if there are any and the mix does not have as many already. The same effects give the same choice.

    Returns:
        The chosen indices and why each was chosen, from the largest effect to the smallest.
    """
    order = sorted(effects, key=lambda index: (-effects[index], index))
    measured = [index for index in order if index in with_items]
    wanted = min(len(measured), max(1, count // 4)) if count else 0
    chosen = _mix(order, count)
    if sum(index in with_items for index in chosen) < wanted:
        reserved = measured[:wanted]
        rest = [index for index in order if index not in reserved]
        chosen = {**_mix(rest, count - wanted), **dict.fromkeys(reserved, ITEMS)}
    return {index: chosen[index] for index in order if index in chosen}


def _mix(order: list[int], count: int) -> dict[int, str]:
    count = min(count, len(order))
    top, bottom = -(-count // 3), count // 3
    middle = count - top - bottom
    between = order[top : len(order) - bottom]
    start = (len(between) - middle) // 2
    return {
        **dict.fromkeys(order[:top], LARGEST),
        **dict.fromkeys(between[start : start + middle], MIDDLE),
        **dict.fromkeys(order[len(order) - bottom :], SMALLEST),
    }


def example_views(runs: Sequence[Run], count: int, indices: Sequence[int] | None = None) -> list[ResponseView]:
    """Some examples of each set of records that runs were evaluated on, as every such run sees them.

    `choose` picks `count` examples of each set by the effects of its first run, unless `indices` names them, in order.

    Raises:
        ArgumentError: no run has an example of one of `indices`.
        RecordError: a file of an evaluation is damaged.
    """
    groups = _by_records(run for run in runs if run.examples)
    _check_indices(groups, indices)
    views = []
    for group in groups:
        items = [read_items(run) for run in group]
        chosen = _chosen(group, count, indices, set[int]().union(*items))
        parts: dict[int, list[_Part]] = {index: [] for index in chosen}
        for run, its_items in zip(group, items, strict=True):
            its_tokens = read_tokens(run, chosen)
            for example in run.examples:
                if (index := example.index) in parts:
                    parts[index].append((run, example, its_tokens.get(index), its_items.get(index)))
        where = f" of {', '.join(run.label for run in group)}" if len(groups) > 1 else ""
        views += [
            _view(f"Example {index}{where}", why, parts[index], alone=len(group) == 1)
            for index, why in chosen.items()
            if parts[index]
        ]
    return views


_Part = tuple[Run, EvaluatedExample, list[TokenEffect] | None, ItemEffects | None]


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
        GeneratedText(
            f"{'' if alone else f'{run.label}: '}generated {prompt}",
            own.generated[branch],
            scores_text(own, branch),
            own.copied.get(branch, ()),
        )
        for run, own, _, _ in parts
        for branch, prompt in PROMPTS.items()
        if branch in own.generated
    ]
    if texts or not variants:  # the coloured tokens are the response already, but other texts are to be read beside it
        texts.insert(
            0, GeneratedText("the user's own response", example.response, copied=example.copied.get(REFERENCE, ()))
        )
    return ResponseView(title, context, variants, texts)


def _variant(run: Run, tokens: list[TokenEffect] | None, items: ItemEffects | None) -> ResponseVariant:
    texts, history = ([], []) if items is None else (items.tokens, _left_out(items))
    if tokens is None:
        tokens = [TokenEffect(text, math.nan, math.nan) for text in texts]
    elif items is not None and texts != [token.text for token in tokens]:
        assert run.evaluation_folder is not None
        path = run.evaluation_folder / ITEM_EFFECTS_FILE
        raise RecordError(f"{path}: field 'tokens': expected those of {EFFECTS_FILE} beside it")
    return ResponseVariant(run.label, tokens, separator="", items=history)


def _left_out(items: ItemEffects) -> list[LeftOutItem]:
    return [
        LeftOutItem(str(item.get("title") or ""), str(item.get("text") or ""), effects)
        for item, effects in zip(items.items, items.effects, strict=True)
    ]


def _by_records(runs: Iterable[Run]) -> list[list[Run]]:
    groups: dict[str | None, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.evaluation.records if run.evaluation else None, []).append(run)
    return list(groups.values())


def _chosen(
    group: Sequence[Run], count: int, indices: Sequence[int] | None, with_items: Collection[int]
) -> dict[int, str]:
    """Indices of examples and why they are shown."""
    if indices is not None:
        return dict.fromkeys(indices, "")
    first = group[0]
    effects = {example.index: finite(example.scores.get("effect_logprob")) or 0.0 for example in first.examples}
    where = f" in {first.label}" if len(group) > 1 else ""
    return {
        index: f"{why} (whole history {rounded(effects[index], sign='+')[0]} nats per token{where})"
        for index, why in choose(effects, count, with_items).items()
    }


def _check_indices(groups: Sequence[Sequence[Run]], indices: Sequence[int] | None) -> None:
    known = {example.index for group in groups for run in group for example in run.examples}
    for index in indices or ():
        if index not in known:
            there = f"{len(known)} examples, {min(known)} to {max(known)}" if known else "no examples"
            raise ArgumentError(f"index: no example {index}; the runs have {there}")
