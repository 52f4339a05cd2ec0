"""Responses whose tokens are coloured by effect, and the items of the history that they depend on.

A page may hold a hundred thousand tokens, so a token is one element with a class for its colour and one attribute of
numbers. Without script the style shows these numbers on hover. The page's script puts them into words, on hover, on
focus (one tab stop for each response, arrow keys inside it) and for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nextquill.report.data import GeneratedText, LeftOutItem, ResponseVariant, ResponseView, TokenEffect
from nextquill.report.text import html, marked_html

#: Steps of colour, each a tenth; an effect below half a step is left plain, as it is neither visible nor reliable.
STEPS = 10
#: Characters shown of a query, an item or a generated text.
LONGEST_CONTEXT, LONGEST_ITEM, LONGEST_TEXT = 1500, 400, 4000
#: The least nats at which a token, and the bar of a whole response, are full, so that small effects look small.
LEAST_FULL, LEAST_FULL_TOTAL = 0.5, 1.0
#: Columns of the table of items and tokens.
TABLE_TOKENS = 12


def responses_html(responses: Sequence[ResponseView]) -> str:
    """A legend, if there are tokens or copied phrases, and a card for each response."""
    tokens = [token for view in responses for variant in view.variants for token in variant.tokens]
    has_truth = any(token.personal is not None for token in tokens)
    truth = '<span><span class="personal">underlined</span> truly personal</span>' if has_truth else ""
    legend = (
        '<p class="legend"><span class="scale">history lowered p(token) by 1 '
        f"<svg viewBox='0 0 {20 * STEPS} 12' aria-hidden='true'>{_scale()}</svg> raised it by 1</span>"
        f"<span>plain: less than {0.5 / STEPS:g} either way</span>{truth}</p>"
    )
    has_copies = any(text.copied for view in responses for text in view.texts)
    copies = '<p class="legend"><span><mark>marked</mark> three or more words in a row of the history</span></p>'
    return (legend if tokens else "") + (copies if has_copies else "") + "".join(map(_card, responses))


def effect_class(effect: float, full: float = 1.0) -> str:
    """The class of an effect's colour, `p1` to `p10` or `n1` to `n10` from `full` on; empty if small, and for NaN."""
    if not math.isfinite(effect) or full <= 0:
        return ""
    step = math.floor(min(1.0, abs(effect) / full) * STEPS + 0.5)
    return f"{'p' if effect > 0 else 'n'}{step}" if step else ""


def _scale() -> str:
    steps = [*(f"n{step}" for step in range(STEPS, 0, -1)), *(f"p{step}" for step in range(1, STEPS + 1))]
    return "".join(f'<rect class="{name}" x="{10 * at}" width="10" height="12"/>' for at, name in enumerate(steps))


def _card(view: ResponseView) -> str:
    context = "".join(
        f'<div><dt>{html(name)}</dt><dd dir="auto">{html(text, LONGEST_CONTEXT)}</dd></div>'
        for name, text in view.context
    )
    variants = "".join(_variant(variant) for variant in view.variants)
    texts = "".join(_text(text) for text in view.texts)
    side_by_side = f'<div class="texts">{texts}</div>' if texts else ""
    return f'<article class="card"><h3>{html(view.title)}</h3><dl>{context}</dl>{variants}{side_by_side}</article>'


def _text(text: GeneratedText) -> str:
    detail = f" <small>{html(text.detail)}</small>" if text.detail else ""
    nothing = f'<i class="empty">{"white space only" if text.text else "an empty text"}</i>'
    shown = marked_html(text.text, text.copied, LONGEST_TEXT) if text.text.strip() else nothing
    return f'<div><b>{html(text.label)}</b>{detail}<p dir="auto">{shown}</p></div>'


def _variant(variant: ResponseVariant) -> str:
    label = html(variant.label)
    other = variant.against_other
    tokens = variant.separator.join(_token(token, other, first=not at) for at, token in enumerate(variant.tokens))
    against = ' data-against="other"' if other else ""
    items = _items(variant) if variant.items else ""
    return (
        f'<div class="variant"><b>{label}</b>'
        f'<p class="tokens" dir="auto" role="group" aria-label="{label}"{against}>{tokens}</p>{items}</div>'
    )


def _token(token: TokenEffect, against_other: bool, *, first: bool) -> str:
    effect = token.p_with - (token.p_placebo or 0.0) if against_other else token.effect_prob
    names = " ".join(filter(None, (effect_class(effect), "personal" if token.personal else "")))
    css_class = f' class="{names}"' if names else ""
    stop = ' tabindex="0"' if first else ""
    # A leading space stays outside: at the end of a line its colour would trail the previous word.
    word = token.text.lstrip(" ") or token.text
    space = token.text[: len(token.text) - len(word)]
    return f'{space}<span{css_class}{stop} data-p="{_probabilities(token)}">{html(word)}</span>'


def _probabilities(token: TokenEffect) -> str:
    """Percentages with, without and under another's history; the last one only if it was measured."""
    measured = (token.p_with, token.p_without) + (() if token.p_placebo is None else (token.p_placebo,))
    return " ".join(f"{100 * p:.3g}" if math.isfinite(p) else "–" for p in measured)


def _items(variant: ResponseVariant) -> str:
    """The items, with bars for what the response or the chosen token loses without each, and a table."""
    items = variant.items
    totals = [sum(item.effects) for item in items]
    longest = max(LEAST_FULL_TOTAL, *map(abs, totals))
    full = max((LEAST_FULL, *(abs(effect) for item in items for effect in item.effects)))
    rows = "".join(_item(at, item, total, longest) for at, (item, total) in enumerate(zip(items, totals, strict=True)))
    return (
        f'<div class="items" data-full="{full:.4g}" data-longest="{longest:.4g}"><h4>Which past item it depends on</h4>'
        '<p class="note">What leaving one item out adds to the nll of the whole response, in nats. '
        '<span class="scripted">Point at a token to see its own figures; choose an item to colour the tokens by what '
        f'they lose without it.</span></p><ol>{rows}</ol><p class="note coloured" role="status"></p>'
        f"{_item_table(variant, full)}</div>"
    )


def _item(at: int, item: LeftOutItem, total: float, longest: float) -> str:
    width = 50 * abs(total) / longest
    start = 50 if total >= 0 else 50 - width
    title = html(item.title, LONGEST_ITEM) if item.title else f"Item {at + 1}"
    text = f'<p dir="auto">{html(item.text, LONGEST_ITEM)}</p>' if item.text else ""
    effects = " ".join(f"{effect:.3f}" for effect in item.effects)
    return (
        f'<li data-e="{effects}"><button type="button" aria-pressed="false" dir="auto">{title}</button>'
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{"p10" if total >= 0 else "n10"}" x="{start:.1f}" width="{width:.1f}" height="10"/>'
        f'<path d="M50 0V10"/></svg><span class="nats">{_signed(total)}</span>{text}</li>'
    )


def _item_table(variant: ResponseVariant, full: float) -> str:
    """A table of items and the tokens that depend most on a single one, for print and for pages without script."""
    strength = [max(map(abs, effects)) for effects in zip(*(item.effects for item in variant.items), strict=True)]
    chosen = sorted(sorted(range(len(strength)), key=lambda at: -strength[at])[:TABLE_TOKENS])
    if not chosen:
        return ""
    head = "".join(f'<th scope="col">{html(variant.tokens[at].text.strip(), 24) or "␣"}</th>' for at in chosen)
    rows = "".join(
        f'<tr><th scope="row" dir="auto">{number}. {html(item.title.strip() or item.text.strip(), 40)}</th>'
        + "".join(
            f'<td class="{effect_class(item.effects[at], full)}">{_signed(item.effects[at])}</td>' for at in chosen
        )
        + "</tr>"
        for number, item in enumerate(variant.items, start=1)
    )
    caption = f"The {len(chosen)} of {len(strength)} tokens that depend most on a single item, in nats"
    return (
        f'<p class="note">{caption}</p><div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f'<table class="heat"><thead><tr><th scope="col" class="name">item</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _signed(nats: float) -> str:
    return f"{round(nats, 2) + 0.0:+.2f}"  # never -0.00
