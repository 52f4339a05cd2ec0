"""Commands in processes of their own, which end with all they started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest


def run_to_end(words: list[str], *, timeout: float, cwd: Path | None = None, **environment: str) -> str:
    """What a command printed.

    One that does not end in time fails the test with the stacks of every process it started. Launchers put workers into
    sessions of their own, so killing the command's group would leave them, and with them the open pipe.
    """
    told = {"PYTHONFAULTHANDLER": "1", "WANDB_DISABLED": "true", **environment}
    with subprocess.Popen(
        words, cwd=cwd, env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(process.pid)
            printed, _ = process.communicate()
            pytest.fail(f"{words} hung:\n{printed[-12000:]}")
    assert process.returncode == 0, printed[-12000:]
    return printed


def _end(pid: int) -> None:
    """Kill a process and its descendants; faulthandler prints each one's stacks at the abort signal."""
    parent = psutil.Process(pid)
    family = [*parent.children(recursive=True), parent]
    for number in (signal.SIGABRT, signal.SIGKILL):
        for member in family:
            try:
                member.send_signal(number)
            except psutil.NoSuchProcess:
                continue
            psutil.wait_procs([member], timeout=1)  # one at a time, or their stacks are printed into one another
