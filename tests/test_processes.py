"""The helper that starts processes for other tests: after a hang, the test fails soon and prints the stacks."""

from __future__ import annotations

import sys
import time

import psutil
import pytest

from tests.processes import run_to_end

_STARTS_ANOTHER = (
    "import subprocess, sys, time\n"
    "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    "print('other', other.pid, flush=True)\n"
    "def waits_here():\n"
    "    time.sleep(600)\n"
    "waits_here()\n"
)


@pytest.mark.slow
def test_a_hang_ends_with_all_processes_and_their_stacks() -> None:
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="hung") as failure:
        run_to_end([sys.executable, "-c", _STARTS_ANOTHER], timeout=2)
    assert time.monotonic() - began < 30
    said = str(failure.value)
    assert "in waits_here" in said
    pid = int(said.split("other ")[-1].split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_a_command_prints_is_returned_and_a_failure_fails() -> None:
    assert run_to_end([sys.executable, "-c", "print('done')"], timeout=60) == "done\n"
    with pytest.raises(AssertionError, match="broken"):
        run_to_end([sys.executable, "-c", "raise SystemExit('broken')"], timeout=60)
