"""Large buffers on huge pages, where Linux leaves that choice to the program ("madvise", the usual setting).

The first write to a buffer costs one page fault per page: 65 thousand for 256 MiB in pages of 4 KiB. Later accesses are
slow too, because the processor caches the addresses of only a few thousand pages.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

_PAGE = 2**21
_MADV_HUGEPAGE = 14


def advise(buffer: Tensor) -> None:
    """Ask the system for huge pages under a new CPU buffer of any shape and dtype. It may ignore the request."""
    size = buffer.untyped_storage().nbytes()
    if buffer.device.type != "cpu" or size < 4 * _PAGE or (madvise := _madvise()) is None:
        return
    start = buffer.untyped_storage().data_ptr()
    first, last = -(-start // _PAGE) * _PAGE, (start + size) // _PAGE * _PAGE
    madvise(first, last - first, _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
