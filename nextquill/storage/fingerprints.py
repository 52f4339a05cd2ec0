"""Digests that are the same in every process and on every machine.

    fingerprint    tells inputs apart: equal fingerprints are taken for equal inputs
    fast_digest    the same for large contents, such as weights, ten times as fast
    digest_of      a few bytes of a text, for keys and names
    seed_of        a number, for draws that depend on the given parts and on nothing else

Files on disk hold their results, so a change of one of them makes old files unreadable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any


def fingerprint(parts: Iterable[str | bytes], digits: int = 16) -> str:
    """The first hexadecimal digits of SHA-256 over all parts, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode(errors="surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()[:digits]


def fast_digest(parts: Iterable[Any]) -> str:
    """XXH3 (128 bits) over bytes, arrays and other buffers, one after another, in hexadecimal digits.

    It finds damage and other contents; it is not made to withstand somebody who looks for equal digests.
    """
    from xxhash import xxh3_128

    digest = xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def digest_of(text: str, size: int = 8) -> bytes:
    """The BLAKE2b digest of a text, `size` bytes."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).digest()


def seed_of(*parts: object) -> int:
    """A number of 63 bits that follows from the parts as strings, in their order."""
    return int.from_bytes(digest_of("\x1f".join(map(str, parts))), "big") >> 1
