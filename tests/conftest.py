"""Settings for all tests: a fixed seed, so that failures repeat, and one thread, which is fast for small tensors."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
from collections import defaultdict
from itertools import combinations

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of PyTorch here, and of every process that a test starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")  # otherwise trainers report to every installed service
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background

import pytest
import torch

if not torch.cuda.is_available():
    # Read when the kernels are first imported: without a GPU, Triton's interpreter runs them on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _threads():
    # Two threads that wait for each other on a busy machine made gradcheck forty times slower.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_finish():
    """Exclude imported modules from garbage collection, which each training runs, in a third of a second."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # `nextquill prepare` calls it at its end, which would undo this for all later tests


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End the process if a test hangs outside Python, where pytest-timeout's signal has no effect.

    Another worker replaces it, and the test is reported as the one that crashed its worker.
    """
    marker = item.get_closest_marker("timeout")
    seconds = marker.args[0] if marker else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(seconds + 60, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the marks that are set here
def pytest_collection_modifyitems(items):
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("covering"):
            tests[item.parent, item.originalname].append(item)
    for cases in tests.values():
        (strength,) = cases[0].get_closest_marker("covering").args
        for item in _repeats(cases, strength):
            item.add_marker(pytest.mark.slow)


def _repeats(cases, strength):
    """The cases that can be left out while any `strength` values of different parameters still occur together."""
    # By identity, because some values have no hash, and all cases of a test hold the same objects.
    values = {item: sorted((name, id(value)) for name, value in item.callspec.params.items()) for item in cases}
    meetings = {item: set(combinations(values[item], strength)) for item in cases}
    unseen = set().union(*meetings.values())
    while unseen:
        best = max(meetings, key=lambda item: len(unseen & meetings[item]))
        unseen -= meetings.pop(best)
    return meetings


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Use no workers for a few files, because a worker takes seconds to start."""
    files = [argument for argument in config.args if argument.partition("::")[0].endswith(".py")]
    return 0 if len(files) == len(config.args) <= 3 else None
