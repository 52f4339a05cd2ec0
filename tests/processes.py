"""Runs commands in separate processes, which end together with all processes that they start."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest


def run_to_end(words: list[str], *, timeout: float, cwd: Path | None = None, **environment: str) -> str:
    """Run a command and return its output.

    After a timeout the test fails with the stacks of every process that the command has started. Launchers put workers
    into separate sessions, so killing only the command's group would leave these processes, and the open pipe.
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
    """Kill a process and its descendants. At the abort signal, faulthandler prints the stacks of each."""
    parent = psutil.Process(pid)
    family = [*parent.children(recursive=True), parent]
    for number in (signal.SIGABRT, signal.SIGKILL):
        for member in family:
            try:
                member.send_signal(number)
            except psutil.NoSuchProcess:
                continue
            psutil.wait_procs([member], timeout=1)  # one at a time, so that their stacks are not mixed
