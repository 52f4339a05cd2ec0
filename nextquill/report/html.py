"""One self-contained HTML page: findings, a picture, tables, and responses whose tokens are coloured by effect.

No network, no script that the page needs, light and dark by the reader's preference, printable. A token shows its
probabilities on hover, on focus (each can be reached by keyboard or a tap) and to screen readers. Without script every
token is a tab stop; the few lines of script make each response one stop, with the arrow keys moving inside.

Everything that is passed in is text and is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from itertools import groupby

from nextquill.report.data import Cell, Column, Page, Picture, ResponseVariant, ResponseView, Table, TokenEffect

# Effects smaller than this are left without colour: one can neither see them nor rely on them.
_SMALLEST_SHOWN = 0.005

_SCRIPT = """
for (const line of document.querySelectorAll('.tokens')) {
  const tokens = [...line.querySelectorAll('.tok')];
  tokens.forEach((token, index) => { token.tabIndex = index ? -1 : 0; });
  line.addEventListener('keydown', event => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length };
    const here = tokens.indexOf(document.activeElement);
    if (here < 0 || !(event.key in moves)) return;
    event.preventDefault();
    tokens[Math.min(tokens.length - 1, Math.max(0, here + moves[event.key]))].focus();
  });
  line.addEventListener('focusin', event => {
    for (const token of tokens) token.tabIndex = token === event.target ? 0 : -1;
  });
}
"""


def render_page(page: Page) -> str:
    """The whole page as one string."""
    style = resources.files("nextquill.report").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="{escape(page.language)}">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            # An empty icon, or a browser asks the server for one.
            f'<link rel="icon" href="data:,"><title>{escape(page.title)}</title>',
            f"<style>\n{style}</style></head>",
            "<body><main>",
            f"<header><h1>{escape(page.title)}</h1>{_paragraph(page.lead, 'lead')}</header>",
            _findings(page.findings),
            _picture(page.picture) if page.picture else "",
            _tables(page.tables, page.table_notes),
            _responses(page.responses, page.responses_lead),
            f"<footer>{_paragraph(page.footer)}</footer>" if page.footer else "",
            "</main>",
            f"<script>{_SCRIPT}</script>" if page.responses else "",
            "</body></html>",
            "",
        ]
    )


def _paragraph(text: str, css_class: str = "") -> str:
    if not text:
        return ""
    return f'<p class="{css_class}">{escape(text)}</p>' if css_class else f"<p>{escape(text)}</p>"


def _findings(findings: Sequence[tuple[str, str]]) -> str:
    if not findings:
        return ""
    items = "".join(f"<li><h3>{escape(heading)}</h3><p>{escape(text)}</p></li>" for heading, text in findings)
    return f'<ul class="findings">{items}</ul>'


def _picture(picture: Picture) -> str:
    light, dark = _data_uri(picture.png), picture.dark_png
    # Printing prefers light whatever the screen does.
    source = f'<source srcset="{_data_uri(dark)}" media="screen and (prefers-color-scheme: dark)">' if dark else ""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<picture>{source}<img src="{light}" alt="{escape(picture.alt)}"></picture>'
    return (
        f'<figure><div class="scroll" role="region" tabindex="0" aria-label="Picture">{image}</div>{caption}</figure>'
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _tables(tables: Sequence[Table], notes: Sequence[str]) -> str:
    if not tables:
        return ""
    body = "".join(_table(table) for table in tables)
    return f"<section><h2>Results</h2>{body}{''.join(_paragraph(note, 'note') for note in notes)}</section>"


def _table(table: Table) -> str:
    head = _table_head(table.columns)
    rows = "".join(f"<tr>{''.join(_cells(row))}</tr>" for row in table.rows)
    caption = f"<caption>{escape(table.title)}</caption>"
    # A scrolling box has to be reachable by keyboard, and then needs a name.
    label = escape(table.title)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table>{caption}<thead>{head}</thead><tbody>{rows}</tbody></table></div>"
    )


def _table_head(columns: Sequence[Column]) -> str:
    groups = ""
    for group, members in groupby(columns, key=lambda column: column.group):
        span = len(list(members))
        groups += (
            f'<th scope="colgroup" colspan="{span}">{escape(group)}</th>' if group else f'<td colspan="{span}"></td>'
        )
    names = "".join(_column_heading(column, first=index == 0) for index, column in enumerate(columns))
    return (f"<tr>{groups}</tr>" if any(column.group for column in columns) else "") + f"<tr>{names}</tr>"


def _column_heading(column: Column, *, first: bool) -> str:
    title = f' title="{escape(column.explanation)}"' if column.explanation else ""
    css_class = ' class="name"' if first else ""
    return f'<th scope="col"{css_class}{title}>{escape(column.heading)}</th>'


def _cells(row: Sequence[Cell]) -> Iterable[str]:
    for index, cell in enumerate(row):
        detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
        content = escape(cell.text) + detail
        yield f'<th scope="row">{content}</th>' if index == 0 else f"<td>{content}</td>"


def _responses(responses: Sequence[ResponseView], lead: str) -> str:
    if not responses:
        return ""
    tokens = [token for view in responses for variant in view.variants for token in variant.tokens]
    truth = '<span><span class="personal">underlined</span> truly personal</span>'
    legend = (
        '<p class="legend"><span class="scale">history lowered p(token) by 1 <i></i> raised it by 1</span>'
        f"{truth if any(token.personal is not None for token in tokens) else ''}</p>"
    )
    cards = "".join(_response(view) for view in responses)
    return f"<section><h2>Tokens by effect</h2>{_paragraph(lead)}{legend}{cards}</section>"


def _response(view: ResponseView) -> str:
    context = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in view.context)
    variants = "".join(_variant(variant) for variant in view.variants)
    return f'<article class="card"><h3>{escape(view.title)}</h3><dl>{context}</dl>{variants}</article>'


def _variant(variant: ResponseVariant) -> str:
    # Adjacent words keep a real space between their spans, so that copied text reads as written.
    tokens = " ".join(_token(token) for token in variant.tokens)
    label = escape(variant.label)
    return f'<div class="variant"><b>{label}</b><p class="tokens" role="group" aria-label="{label}">{tokens}</p></div>'


def _token(token: TokenEffect) -> str:
    effect = token.effect_prob
    classes = ["tok"]
    style = ""
    if math.isfinite(effect) and abs(effect) >= _SMALLEST_SHOWN:
        classes.append("helps" if effect > 0 else "hurts")
        style = f' style="--e:{min(1.0, abs(effect)):.2f}"'
    if token.personal:
        classes.append("personal")
    tip = escape(_describe(token))
    return (
        f'<span class="{" ".join(classes)}"{style} tabindex="0" role="img" title="{tip}" aria-label="{tip}" '
        f'data-tip="{tip}">{escape(token.text)}</span>'
    )


def _describe(token: TokenEffect) -> str:
    parts = [f"p with history {_percent(token.p_with)}", f"without {_percent(token.p_without)}"]
    if token.p_placebo is not None:
        parts.append(f"with another user's {_percent(token.p_placebo)}")
    return f"“{token.text}”: {', '.join(parts)}"


def _percent(probability: float) -> str:
    if not math.isfinite(probability):
        return "not measured"
    return "< 0.1%" if 0 < probability < 0.001 else f"{100 * probability:.1f}%"
