"""Tries a Jinja template out in a process of its own, with a budget of time, memory and output.

A template is a program that may come from somebody else: it can loop for ever, or ask for a string of 3 GB. Jinja's
sandbox bounds what it reaches, not what it costs, and no bound inside this process holds for every operation: `10 ** n`
returns only when it is done. So a fork renders the template with made-up texts first, and the system ends the fork when
the budget is spent.

The trial is sound for what does not depend on the texts. A template that becomes expensive only for certain texts
passes it. Then only the loops and the output of `prompt_jinja` are bounded (see `jinja_prompt`), not those of a chat
template, which transformers renders. Where processes cannot be forked (Windows), there is no trial. Where the system
does not say how much memory a process has (macOS), memory is not bounded.
"""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

#: The budget of a trial. Templates in use take some milliseconds.
CPU_SECONDS = 1
MEMORY_BYTES = 512 * 2**20
#: Some 10 million tokens.
CHARACTERS = 50_000_000
# Ends a fork that waits for a lock which a thread of this process held, long after any trial on a busy machine.
_WALL_SECONDS = 60
_MEMORY, _OUTPUT = 101, 102


def beyond_budget(render: Callable[[], Iterable[str]]) -> str | None:
    """What `render` needs more of than the budget allows, in words; None if it stays within, or raises an error.

    It runs in a fork of this process, so what it changes is lost.
    """
    if not hasattr(os, "fork"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the fork takes no lock of theirs
        child = os.fork()
    if not child:
        status = _MEMORY
        try:
            status = _rendered(render)
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM:
        return None  # it has waited, not computed, so it says nothing of the template
    if code == -signal.SIGPROF:
        return f"more than {CPU_SECONDS} second of computing"
    if code in (_MEMORY, -signal.SIGKILL, -signal.SIGABRT):
        return f"more than {MEMORY_BYTES // 2**20} MiB"
    if code == _OUTPUT:
        return f"more than {CHARACTERS:,} characters"
    return f"a deeper stack than there is (signal {-code})" if code else None


def _rendered(render: Callable[[], Iterable[str]]) -> int:
    """The exit status of the fork."""
    gc.disable()  # objects of the parent must not be finalised here
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # The default action ends the process even inside a call of C.
    for timer, signum, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS),
        (signal.ITIMER_REAL, signal.SIGALRM, _WALL_SECONDS),
    ):
        signal.signal(signum, signal.SIG_DFL)
        signal.setitimer(timer, seconds)
    _limit_memory()
    written = 0
    try:
        for piece in render():
            written += len(piece)
            if written > CHARACTERS:
                return _OUTPUT
    except Exception as error:  # noqa: BLE001 - the parent raises it again, with its message
        return _MEMORY if isinstance(error.__cause__ or error, MemoryError) else 0
    return 0


def _limit_memory() -> None:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
