"""Anyone's text as HTML that shows what is there and does nothing.

What users wrote is hostile until shown otherwise: markup, control characters, bidirectional overrides that would turn
the rest of a line around, halves of surrogate pairs that no file can hold.
"""

from __future__ import annotations

import re
from html import escape

# C0 and C1 controls but tab and line feed, the bidirectional embeddings, overrides and isolates, lone surrogates.
# Left-to-right and right-to-left marks stay: ordinary Hebrew and Arabic text has them.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` with control characters, bidirectional overrides and lone surrogates named, as `[U+202E]`."""
    return _INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n"))


def html(text: str, most: int | None = None) -> str:
    """`text` escaped for an element or a quoted attribute.

    Args:
        text: anything.
        most: characters after which it is cut; the cut says how many are left out.
    """
    if most is not None and len(text) > most:
        return f"{escape(plain(text[:most]))} … [{len(text) - most:,} more characters]"
    return escape(plain(text))
