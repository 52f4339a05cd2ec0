"""Starts several processes of one command; each is `shared_run_worker.py CASE PRINTED WORDS`, under torchrun.

It runs `nextquill WORDS`, prints into PRINTED-RANK, and lets rank 1 fail in its second forward, or in the second step
that it trains for a comparison, as CASE says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nextquill.cli.main import main
from nextquill.errors import NonFiniteError
from tests.processes import end_family

#: Seconds after which a launch is given up.
PATIENCE = 240


def launch(processes: int, case: str, printed: Path, *words: object) -> tuple[int, list[str]]:
    """Run `nextquill WORDS` on several processes: exit code, and what each has printed."""
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__, case]
        + [str(word) for word in (printed, *words)],
        env=told, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        code = process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            end_family(process.pid)  # torchrun's workers are in sessions of their own
            process.wait()
    return code, [printed.with_name(f"{printed.name}-{rank}").read_text() for rank in range(processes)]


def run(case: str, printed: str, words: list[str]) -> int:
    rank = os.environ["RANK"]
    file = os.open(f"{printed}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    if rank == "1" and case == "data":
        words = [word.replace("eval.jsonl", "other.jsonl") for word in words]
    elif rank == "1" and case != "equal":
        _plant(case, Path(f"{printed}-fault"), is_comparison=words[0] == "compare")
    return main(words)


def _plant(case: str, fault: Path, *, is_comparison: bool) -> None:
    """Let a function of this process fail when it is called for the second time."""
    from nextquill.comparison.measuring import RunMeter
    from nextquill.evaluation import scoring

    place: Any = RunMeter if is_comparison else scoring
    name = "on_step_end" if is_comparison else "_score_part"
    setattr(place, name, _failing(getattr(place, name), case, fault))


def _failing(score: Any, case: str, fault: Path) -> Any:
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 2:
            return score(*arguments, **named)
        fault.touch()
        if case == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "stopped":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(3)  # the launcher passes it on in this step
            return score(*arguments, **named)
        raise NonFiniteError("model: it gives a nan") if case == "error" else KeyError("a bug")

    return call


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
