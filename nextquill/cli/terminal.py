"""Notes and progress bars on stderr, as stdout holds a command's result; needs no torch."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

from nextquill.data.skipped import SkippedRecords
from nextquill.ranks import launch
from nextquill.report.text import plain


def say(text: str) -> None:
    """Print a note that begins with the program's name, and the rank where several processes print."""
    print(f"nextquill: {launch().label}{plain(text)}", file=sys.stderr)


def say_skipped(skipped: SkippedRecords, more: str = "") -> None:
    """Count the bad records by kind, and show the first; `more` says where the others are."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.counts.most_common())
    say(f"skipped {skipped.total:,} bad records{f' ({kinds})' if kinds else ''}")
    for message in skipped.messages:
        print(f"  {plain(message)}", file=sys.stderr)
    if skipped.total > len(skipped.messages):
        print(f"  and {skipped.total - len(skipped.messages):,} more{more}", file=sys.stderr)


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, in a few characters."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def draws_bars() -> bool:
    """Whether stderr is a terminal or a notebook's cell, and this process alone writes there."""
    if launch().size > 1:
        return False
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")


def bar(iterable: Any = None, **options: Any) -> Any:
    """A progress bar, hidden where stderr is neither a terminal nor a notebook."""
    hidden = options.pop("disable", False) or not draws_bars()
    return tqdm(iterable, file=sys.stderr, disable=hidden, dynamic_ncols=True, **options)
