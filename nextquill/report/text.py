"""Any text as HTML that shows its characters and does nothing else.

Users' texts may be hostile: markup, control characters, bidirectional overrides that would turn the rest of a line
around, and halves of surrogate pairs, which no file can hold.
"""

from __future__ import annotations

import re
from html import escape

# C0 and C1 controls but tab and line feed, the bidirectional embeddings, overrides and isolates, lone surrogates.
# Left-to-right and right-to-left marks stay, because ordinary Hebrew and Arabic text has them.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` with control characters, bidirectional overrides and lone surrogates named, as `[U+202E]`."""
    return _INVISIBLE.sub(lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n"))


def html(text: str, most: int | None = None) -> str:
    """`text` escaped for an element or a quoted attribute; one longer than `most` characters is cut and says so."""
    if most is not None and len(text) > most:
        return f"{escape(plain(text[:most]))} … [{len(text) - most:,} more characters]"
    return escape(plain(text))
