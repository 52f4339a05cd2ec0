"""One of the processes of `test_shared_runs.py`: `shared_run_worker.py CASE PRINTED WORDS`, under torchrun.

It runs `nextquill WORDS`, prints into PRINTED-RANK, and lets rank 1 fail in its second forward, as CASE says.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from nextquill.cli.main import main
from nextquill.errors import NonFiniteError
from nextquill.evaluation import scoring


def run(case: str, printed: str, words: list[str]) -> int:
    rank = os.environ["RANK"]
    file = os.open(f"{printed}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    if rank == "1" and case == "data":
        words = [word.replace("eval.jsonl", "other.jsonl") for word in words]
    elif rank == "1" and case != "equal":
        scoring._score_part = _failing(scoring._score_part, case, Path(f"{printed}-fault"))
    return main(words)


def _failing(score: Any, case: str, fault: Path) -> Any:
    calls = 0

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 2:
            return score(*arguments)
        fault.touch()
        if case == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise NonFiniteError("model: it gives a nan") if case == "error" else KeyError("a bug")

    return call


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
