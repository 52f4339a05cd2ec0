"""Progress bars; apart from `progress`, so that a command that trains nothing needs no torch for them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def bar(iterable: Any = None, **options: Any) -> Any:
    """A progress bar on stderr, so that stdout stays a command's result; none where stderr is no terminal."""
    return tqdm(iterable, file=sys.stderr, disable=options.pop("disable", False) or None, dynamic_ncols=True, **options)
