"""A mutation: a defect that a user would notice, written as a replacement of text in one file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


class DoesNotApply(Exception):  # noqa: N818 - a verdict, not an error of this program
    """The text to replace does not occur exactly once."""


@dataclass(frozen=True)
class Mutation:
    """A defect to plant.

    Attributes:
        name: unique, and begins with the part of the project.
        file: the path from the checkout's root.
        old: a text that occurs exactly once in the file.
        new: its replacement.
        why: the effect that a user would see.
        tests: beginnings of test ids, to be run besides the tests that execute the line, if coverage cannot see them.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A digest that identifies the defect, whatever its name and explanation."""
        return hashlib.sha256(repr((self.file, self.old, self.new, self.tests)).encode()).hexdigest()[:12]

    def source(self, root: Path) -> str:
        """The text of the file in a checkout.

        Raises:
            DoesNotApply: it does not hold the text exactly once.
        """
        path = root / self.file
        if not path.is_file():
            raise DoesNotApply(f"{self.file}: no such file")
        source = path.read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            raise DoesNotApply(f"{self.file}: has the text {count} times, expected once")
        return source

    def lines(self, source: str) -> range:
        """The numbers of the lines that change; if lines are only added, the line before them."""
        old, new = self.old.split("\n"), self.new.split("\n")
        shorter = min(len(old), len(new))
        before = next((i for i in range(shorter) if old[i] != new[i]), shorter)
        after = next((i for i in range(shorter - before) if old[-1 - i] != new[-1 - i]), shorter - before)
        first = source[: source.index(self.old)].count("\n") + 1
        start, stop = first + before, first + len(old) - after
        return range(start, stop) if start < stop else range(max(first, start - 1), max(first, start - 1) + 1)
