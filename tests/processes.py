"""Runs commands in separate processes, which end together with all processes that they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
            end_family(process.pid)
            printed, _ = process.communicate()
            pytest.fail(f"{words} hung:\n{printed[-12000:]}")
    assert process.returncode == 0, printed[-12000:]
    return printed


def end_family(pid: int) -> None:
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


#: Modules that a server of forks loads once; see `run_command`.
PRELOADED = ["tests.processes", "torch", "transformers.trainer", "peft", "nextquill.cli.train"]


def run_command(words: list[str], folder: str, stdin: str, stdout: str, stderr: str) -> None:
    """Run `nextquill WORDS` in a folder with files for its streams, in a process forked for it."""
    os.chdir(folder)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdin = os.fdopen(0)
    from nextquill.cli.main import main

    sys.exit(main(words))
