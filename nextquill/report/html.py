"""One self-contained HTML page: the verdict, a forest plot, responses with tokens coloured by effect, curves, tables.

It loads nothing from a network, works without its script, follows the reader's preference for light or dark, and can
be printed. Its policy forbids all loading and every style and script but its own, which it names by digest, so a text
that got past the escaping still could not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from itertools import groupby

from nextquill.report.data import Cell, Column, Page, Picture, Table
from nextquill.report.svg import charts_html, forest_html
from nextquill.report.text import html
from nextquill.report.tokens import responses_html


def render_page(page: Page) -> str:
    """The whole page as one string."""
    own = resources.files("nextquill.report")
    style, script = ("\n" + own.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    is_scripted = bool(page.responses or page.charts or page.folded)
    sections = list(_sections(page))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # An empty icon, because a browser would ask the server for one.
            f'<link rel="icon" href="data:,"><title>{html(page.title)}</title>',
            f"<style>{style}</style></head>",
            "<body><main>",
            f"<header><h1>{html(page.title)}</h1>",
            *(_paragraph(sentence, "verdict") for sentence in page.verdict),
            _paragraph(page.lead, "lead"),
            # A page that is long enough to explain itself has links to its sections.
            f"{_contents(sections) if page.reading else ''}</header>",
            "" if page.measures else _findings(page.findings),
            "".join(_paragraph(notice, "notice") for notice in page.notices),
            _picture(page.picture) if page.picture else "",
            *(f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>' for anchor, heading, content in sections),
            f"<footer>{_paragraph(page.footer)}</footer>" if page.footer else "",
            "</main>",
            f"<script>{script}</script>" if is_scripted else "",
            "</body></html>",
            "",
        ]
    )


def _policy(style: str, script: str) -> str:
    """The page's content security policy: its own pictures, this style and this script."""
    style_digest, script_digest = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_digest}'; script-src 'sha256-{script_digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _paragraph(text: str, css_class: str = "") -> str:
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<p{attribute}>{html(text)}</p>" if text else ""


def _sections(page: Page) -> Iterator[tuple[str, str, str]]:
    """The anchor, the heading and the content of each section."""
    notes = "".join(_paragraph(note, "note") for note in page.table_notes)
    if page.measures:
        plot = _paragraph(page.measures_lead, "note") + forest_html(page.measures)
        yield "measures", "The measures that matter", plot + _findings(page.findings)
    if page.tables:
        yield "results", "Results", "".join(map(_table, page.tables)) + ("" if page.folded else notes)
    if page.responses:
        yield "examples", "Texts and tokens", _paragraph(page.responses_lead) + responses_html(page.responses)
    if page.charts:
        yield "curves", "Curves", _paragraph(page.charts.lead) + charts_html(page.charts)
    if page.folded:
        tables = "".join(map(_table, page.folded))
        yield "all", "All figures", _folded(f"{len(page.folded)} tables", tables + notes)
    if page.reading:
        parts = "".join(f"<dt>{html(heading)}</dt><dd>{html(text)}</dd>" for heading, text in page.reading)
        yield "reading", "How to read this", _folded("The terms and tests", f'<dl class="reading">{parts}</dl>')


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _contents(sections: Iterable[tuple[str, str, str]]) -> str:
    links = (f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in sections)
    return f'<nav aria-label="Sections">{"".join(links)}</nav>'


def _findings(findings: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><h3>{html(heading)}</h3><p>{html(text)}</p></li>" for heading, text in findings)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _picture(picture: Picture) -> str:
    light, dark = _data_uri(picture.png), picture.dark_png
    # Print is always light.
    source = f'<source srcset="{_data_uri(dark)}" media="screen and (prefers-color-scheme: dark)">' if dark else ""
    caption = f"<figcaption>{html(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<picture>{source}<img src="{light}" alt="{html(picture.alt)}"></picture>'
    return (
        f'<figure><div class="scroll" role="region" tabindex="0" aria-label="Picture">{image}</div>{caption}</figure>'
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(table: Table) -> str:
    title, head = html(table.title), _table_head(table.columns)
    rows = "".join(f"<tr>{''.join(_cells(row))}</tr>" for row in table.rows)
    # A scrolling box must be reachable by keyboard, and therefore needs a name.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f"<table><caption><span>{title}</span></caption><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
    )


def _table_head(columns: Sequence[Column]) -> str:
    groups = ""
    for group, members in groupby(columns, key=lambda column: column.group):
        span = len(list(members))
        groups += (
            f'<th scope="colgroup" colspan="{span}">{html(group)}</th>' if group else f'<td colspan="{span}"></td>'
        )
    names = "".join(_column_heading(column, first=index == 0) for index, column in enumerate(columns))
    return (f"<tr>{groups}</tr>" if any(column.group for column in columns) else "") + f"<tr>{names}</tr>"


def _column_heading(column: Column, *, first: bool) -> str:
    title = f' title="{html(column.explanation)}"' if column.explanation else ""
    css_class = ' class="name"' if first else ""
    return f'<th scope="col"{css_class}{title}>{html(column.heading)}</th>'


def _cells(row: Sequence[Cell]) -> Iterator[str]:
    for index, cell in enumerate(row):
        detail = f"<small>{html(cell.detail)}</small>" if cell.detail else ""
        content = (f"<strong>{html(cell.text)}</strong>" if cell.marked else html(cell.text)) + detail
        yield f'<th scope="row">{content}</th>' if index == 0 else f"<td>{content}</td>"
