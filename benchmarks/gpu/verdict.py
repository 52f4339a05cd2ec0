"""What a phase says at its end."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """A phase's name, whether all is well, and one line about it."""

    phase: str
    passed: bool
    summary: str

    def __str__(self) -> str:
        return f"{self.phase}: {'ok' if self.passed else 'NOT OK'}, {self.summary}"
