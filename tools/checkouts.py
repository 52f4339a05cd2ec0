"""Copies a checkout and runs pytest in the copy, which never imports the checkout or an installed nextquill."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.record_tests import OWN, REPORT_VARIABLE

TOOLS = Path(__file__).resolve().parent
#: The folder of a copy's own build of `csrc`, which precedes the installed one.
NATIVE = ".native"


@dataclass(frozen=True)
class Run:
    """The end of a run of pytest: its exit code (None if it hung), its reports on tests, and its output."""

    code: int | None
    reports: list[dict[str, Any]]
    output: str

    @property
    def failed(self) -> list[str]:
        return [each["nodeid"] for each in self.reports if each["outcome"] == "failed"]


def tracked(folder: Path) -> list[str]:
    """The files of a checkout that git tracks and that exist now.

    Raises:
        SystemExit: the folder is not a git checkout.
    """
    done = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{folder}: expected a git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name and (folder / name).is_file()]


def fingerprint(folder: Path, *more: str) -> str:
    """A digest of a checkout's content and of `more`."""
    digest = hashlib.sha256("\0".join(more).encode())
    for name in tracked(folder):
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def copy(folder: Path, target: Path) -> None:
    """Copy the files that git tracks."""
    for name in tracked(folder):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / name, target / name)


def write_source(path: Path, text: str) -> None:
    """Write a module and delete its compiled file, as Python tells versions apart only by second and size."""
    path.write_text(text, encoding="utf-8")
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def build_native(root: Path) -> str:
    """Build a copy's `csrc` for that copy alone, and return the error, or "" if there is none."""
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(root / NATIVE), str(root / "csrc")], capture_output=True, text=True)
    return done.stderr[-2000:] if done.returncode else ""


def run_pytest(
    root: Path,
    arguments: Sequence[str],
    *,
    workers: int = 0,
    seconds: float | None = None,
    show: bool = False,
    **environment: str,
) -> Run:
    """Run tests of a copy. After a timeout, every process that the run has started is killed.

    Args:
        root: the copy.
        arguments: paths or ids of tests.
        workers: worker processes, if pytest-xdist is installed; 0 for none.
        seconds: the timeout.
        show: let pytest write to the terminal.
        environment: further environment variables.
    """
    words, report, printed = (root.with_name(root.name + suffix) for suffix in (".words", ".jsonl", ".txt"))
    words.write_text("".join(f"{word}\n" for word in arguments), encoding="utf-8")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "record_tests", "-m", ""]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    path = (root / NATIVE, root, root / "kernels", TOOLS)
    # Without the variables of an outer pytest, and of an outer map.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", OWN))}
    inherited |= {"PYTHONPATH": os.pathsep.join(map(str, path)), REPORT_VARIABLE: str(report), "OMP_NUM_THREADS": "1"}
    code = None
    with printed.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *(() if show else ("-x",)), f"@{words}"],
            cwd=root,
            env=inherited | environment,
            stdin=subprocess.DEVNULL,
            stdout=None if show else output,
            stderr=None if show else output,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                _kill(process.pid)
                process.wait()
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    return Run(code, [json.loads(line) for line in lines], printed.read_text(encoding="utf-8", errors="replace"))


def _kill(pid: int) -> None:
    """Kill a process and its descendants, which may belong to other sessions."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for each in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
