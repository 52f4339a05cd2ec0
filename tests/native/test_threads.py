"""Threads change only the time; forks and other Python threads do no harm."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.native.cases import make_pair, needs_native

pytestmark = needs_native

# 64 rows are four groups of rows: enough for three threads to share.
SHAPE = (64, 1031)


PAIR = make_pair(*SHAPE, softcap=20.0)


def everything(threads: int) -> list[Tensor]:
    """The results of all six kernels. Almost no PyTorch runs here, as its own threads do not survive a fork."""
    import nextquill_ext

    pair = PAIR
    tokens, stats, jsd = torch.empty(3, SHAPE[0]), torch.empty(11, SHAPE[0]), torch.empty(6, SHAPE[0])
    nextquill_ext.token_stats(pair.factual, pair.labels, tokens, threads)
    nextquill_ext.pair_stats(pair.factual, pair.counterfactual, pair.labels, stats, threads)
    z = pair.factual.clone()
    nextquill_ext.token_grad_(z, pair.labels, tokens, pair.grad_factual, 20.0, 2.0, threads)
    z1, z0 = pair.logits
    nextquill_ext.pair_grad_(
        z1, z0, pair.labels, stats[:9], pair.grad_factual, pair.grad_counterfactual, pair.grad_effect, 20.0, 2.0,
        threads=threads,
    )  # fmt: skip
    student, teacher = pair.logits
    nextquill_ext.jsd_stats(student, teacher, jsd, 0.3, False, threads)
    nextquill_ext.jsd_grad_(student, teacher, jsd, pair.grad_factual, 0.3, 20.0, 2.0, threads)
    return [tokens, stats, z, z1, z0, jsd, student]


def same(results: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    expected = everything(1)
    for threads in (1, 2, 3, 2, 7, 1, 3):
        assert same(everything(threads), expected)


def test_alignment_does_not_change_the_bits(isa: str) -> None:
    import nextquill_ext

    pair = make_pair(*SHAPE)
    results = []
    for offset in range(3):
        buffer = torch.empty(SHAPE[0], SHAPE[1] + offset)
        buffer[:, offset:] = pair.factual
        out = torch.empty(3, SHAPE[0])
        nextquill_ext.token_stats(buffer[:, offset:], pair.labels, out, 2)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_calls_from_several_python_threads() -> None:
    expected = everything(1)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda threads: same(everything(threads), expected), [2, 3, 1, 2] * 5))


def test_the_interpreter_runs_meanwhile() -> None:
    import nextquill_ext

    # One row again and again: a call of some 100 ms without a large tensor.
    pair, rows = make_pair(1, 8192), 20000
    z1, z0 = (z.expand(rows, -1) for z in pair.logits)
    labels, out = pair.labels.expand(rows), torch.empty(11, rows)
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        nextquill_ext.pair_stats(z1, z0, labels, out, 1)
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    worker.start()
    stamps = []
    while worker.is_alive():
        stamps.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    start, stop = span
    quarter = (stop - start) / 4
    assert any(start + quarter < stamp < stop - quarter for stamp in stamps), (stop - start, len(stamps))


_FORK = """
import os, signal, sys, threading
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.native.test_threads import everything, same

expected = everything(1)
assert same(everything(3), expected)  # the threads are there

stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        everything(3)
busy = threading.Thread(target=keep_busy, daemon=True)
busy.start()
for _ in range(8):
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a deadlock ends the child, by a signal
        os._exit(0 if same(everything(3), expected) and same(everything(2), expected) else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
stop.set()
busy.join()
assert same(everything(3), expected)
print("survived")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_forked_children_start_threads_of_their_own(request: pytest.FixtureRequest) -> None:
    """Children start like the workers of a DataLoader, while another thread keeps the parent's threads busy."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK, str(request.config.rootpath)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "survived\n"


_GUARD = """
import ctypes, mmap
import nextquill_ext, torch

page, pages = mmap.PAGESIZE, 4
memory = mmap.mmap(-1, (pages + 2) * page)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
for guard in (base, base + (pages + 1) * page):
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
inside = torch.frombuffer(memory, dtype=torch.float32, offset=page, count=pages * page // 4)
labels, ones = torch.zeros(1, dtype=torch.int64), torch.ones(1)
for isa in nextquill_ext.available_isas():
    nextquill_ext.set_isa(isa)
    for vocabulary in [*range(1, 70), 1023, 1024, 1025, 1031]:
        at_end = inside[len(inside) - vocabulary :].view(1, -1)
        at_start = inside[:vocabulary].view(1, -1)
        for logits in (at_start, at_end):
            other = torch.zeros(1, vocabulary)
            for first, second in ((logits, other), (other, logits)):
                logits.zero_()
                stats = torch.empty(11, 1)
                nextquill_ext.pair_stats(first, second, labels, stats)
                nextquill_ext.token_stats(first, labels, stats[:3])
                nextquill_ext.pair_grad_(first, second, labels, stats[:9], ones, ones, ones, 9.0, 1.0)
                nextquill_ext.token_grad_(first, labels, stats[:3], ones, None, 1.0)
                nextquill_ext.jsd_stats(first, second, stats[:6], 0.5)
                nextquill_ext.jsd_grad_(first, second, stats[:6], ones, 0.5, 9.0, 1.0)
print("no fault")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
def test_no_byte_beyond_the_rows_is_touched() -> None:
    """Rows begin or end at a page that must not be accessed."""
    run = subprocess.run([sys.executable, "-c", _GUARD], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "no fault\n"


OPENMP = """
import os, sys, torch, nextquill_ext
from nextquill.ops import chunk_native
torch.manual_seed(0)
z, y = torch.randn(64, 1031), torch.randint(1031, (64,))

def stats(threads):
    out = torch.empty(3, 64)
    nextquill_ext.token_stats(z, y, out, threads)
    return out

alone, pooled = stats(1), stats(3)
path = chunk_native._openmp_of_torch()
assert path is not None and path.startswith(os.path.dirname(torch.__file__)), path
assert not nextquill_ext.use_openmp(path + ".not-there")
assert nextquill_ext.use_openmp(path)
shared = stats(3)
assert torch.equal(alone, pooled) and torch.equal(alone, shared)
child = os.fork()
if child == 0:  # OpenMP's threads are not here: using them would hang
    os._exit(0 if torch.equal(stats(3), alone) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert torch.equal(stats(3), alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_torchs_openmp_threads_give_the_same_bits_and_survive_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", OPENMP], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
