"""Notes and progress bars on stderr, as stdout holds a command's result; needs no torch."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

from nextquill.data.skipped import SkippedRecords


def say(text: str) -> None:
    """Print a note that begins with the program's name."""
    print(f"nextquill: {text}", file=sys.stderr)


def say_skipped(skipped: SkippedRecords, more: str = "") -> None:
    """Count the bad records by kind, and show the first; `more` says where the others are."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.counts.most_common())
    say(f"skipped {skipped.total:,} bad records{f' ({kinds})' if kinds else ''}")
    for message in skipped.messages:
        print(f"  {message}", file=sys.stderr)
    if skipped.total > len(skipped.messages):
        print(f"  and {skipped.total - len(skipped.messages):,} more{more}", file=sys.stderr)


def bar(iterable: Any = None, **options: Any) -> Any:
    """A progress bar, hidden where stderr is not a terminal."""
    return tqdm(iterable, file=sys.stderr, disable=options.pop("disable", False) or None, dynamic_ncols=True, **options)
