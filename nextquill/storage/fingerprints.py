"""Short digests: two inputs with the same fingerprint are taken for the same input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

DIGITS = 16


def fingerprint(parts: Iterable[str | bytes], digits: int = DIGITS) -> str:
    """The first hexadecimal digits of SHA-256 over all parts, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode(errors="surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()[:digits]
