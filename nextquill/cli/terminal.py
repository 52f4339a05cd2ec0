"""Progress bars; apart from `progress`, so that a command that trains nothing needs no torch for them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def bar(iterable: Any = None, **options: Any) -> Any:
    """A progress bar on stderr, as stdout holds a command's result; hidden where stderr is not a terminal."""
    return tqdm(iterable, file=sys.stderr, disable=options.pop("disable", False) or None, dynamic_ncols=True, **options)
