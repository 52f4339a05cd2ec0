"""Notes and progress bars on stderr, as stdout holds a command's result; needs no torch."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def say(text: str) -> None:
    """Print a note that begins with the program's name."""
    print(f"nextquill: {text}", file=sys.stderr)


def bar(iterable: Any = None, **options: Any) -> Any:
    """A progress bar, hidden where stderr is not a terminal."""
    return tqdm(iterable, file=sys.stderr, disable=options.pop("disable", False) or None, dynamic_ncols=True, **options)
