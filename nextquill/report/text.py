"""Any text, for a terminal or as HTML, so that it shows its characters and does nothing else.

Users' texts may be hostile: markup, control characters, bidirectional overrides that would turn the rest of a line
around, and halves of surrogate pairs, which no file can hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

# C0 and C1 controls but tab and line feed, the bidirectional embeddings, overrides and isolates, lone surrogates.
# Left-to-right and right-to-left marks stay, because ordinary Hebrew and Arabic text has them.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` with control characters, bidirectional overrides and lone surrogates as in Python: `\\x1b`, `\\u202e`."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def plain_json(text: str) -> str:
    """JSON with the same characters escaped as JSON does it, where its strings hold them."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def html(text: str, most: int | None = None) -> str:
    """`text` escaped for an element or a quoted attribute; one longer than `most` characters is cut and says so."""
    if most is not None and len(text) > most:
        return f"{escape(plain(text[:most]))} … [{len(text) - most:,} more characters]"
    return escape(plain(text))


def marked_html(text: str, spans: Sequence[Sequence[int]], most: int | None = None) -> str:
    """`text` as `html` writes it, with the characters of each span, in order and apart, in a `<mark>`."""
    end = len(text) if most is None else most
    parts, at = list[str](), 0
    for first, last in ((first, min(last, end)) for first, last in spans if first < end):
        parts.append(f"{html(text[at:first])}<mark>{html(text[first:last])}</mark>")
        at = last
    return "".join(parts) + html(text[at:], None if most is None else most - at)
