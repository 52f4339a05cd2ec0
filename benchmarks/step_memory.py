"""Peak memory of a training step.

    peak        everything: on a CPU the process with its libraries, on a GPU all memory of the allocator
    step_peak   without the memory that stays between steps: libraries, the model's weights and AdamW's state

On a GPU, the caching allocator counts. On a CPU (Linux), each provider runs in a forked child of a fresh process that
has only imported modules. The child makes model and optimiser, and takes a short step, so that AdamW's state and the
libraries' pages exist. Then it resets the high-water mark of its resident memory, and takes the measured step. The mark
is `VmHWM`, because `ru_maxrss` cannot be reset and starts at the parent's value.

At most two micro-batches run. The second one, which adds to the gradients of the first, has the peak of all later ones.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.memory import _MALLOC, _status
from benchmarks.step_cases import SHORT, Case, build_model, make_examples
from benchmarks.step_peers import StepProvider, providers, step

_MICROS = 2


class Peak(NamedTuple):
    """Peak memory in bytes: in total, and of the step alone."""

    total: int
    of_step: int


def make_optimiser(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with the published learning rate, which hardly changes the weights while steps are timed."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return torch.optim.AdamW(trained, lr=5e-6, weight_decay=0.025)


def bind(model: torch.nn.Module, case: Case, provider: StepProvider) -> list[Callable[[], torch.Tensor]]:
    """The micro-batches of a provider's timed step."""
    return provider.build(model, case, make_examples(case)[: provider.examples_of(case)])


def short_step(model: torch.nn.Module, optimiser: torch.optim.Optimizer, case: Case, provider: StepProvider) -> None:
    """Take a step on a few tokens, which leaves AdamW's state but no gradients."""
    step(optimiser, bind(model, replace(case, lengths=SHORT), provider)[:_MICROS])
    optimiser.zero_grad(set_to_none=True)
    gc.collect()


def cuda_peak(model: torch.nn.Module, optimiser: torch.optim.Optimizer, case: Case, provider: StepProvider) -> Peak:
    """The memory that this process has allocated at the step's peak.

    Raises:
        torch.OutOfMemoryError: the step does not fit.
    """
    short_step(model, optimiser, case, provider)
    micros = bind(model, case, provider)[:_MICROS]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(optimiser, micros)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    optimiser.zero_grad(set_to_none=True)
    return Peak(peak, peak - before)


def cpu_peaks(case: Case, labels: Sequence[str], timeout: float = 600) -> dict[str, Peak]:
    """The peaks of providers, each measured in its own process. Those without a peak in time are left out."""
    if not sys.platform.startswith("linux"):
        return {}
    order = json.dumps({"case": case.to_json(), "labels": list(labels), "threads": torch.get_num_threads()})
    answers = (json.loads(line) for line in _ask(order, timeout).splitlines())
    return {label: Peak(*peak) for label, peak in zip(labels, answers, strict=False) if peak is not None}


def _ask(order: str, timeout: float) -> str:
    """The output of the measuring process at its end or at the timeout, after which the process is killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.step_memory"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        cwd=Path(__file__).parent.parent, env=os.environ | _MALLOC,
    )  # fmt: skip
    try:
        return process.communicate(order, timeout)[0]
    except subprocess.TimeoutExpired:
        _kill(process)
        return process.communicate()[0]
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _serve(order: str) -> None:
    """Print a line for every provider; null if its child died."""
    values = json.loads(order)
    case, entrants = Case.from_json(values["case"]), providers(Case.from_json(values["case"]))
    torch.set_num_threads(1)
    importlib.import_module(f"transformers.models.{case.model.architecture}.modeling_{case.model.architecture}")
    gc.freeze()  # garbage collection in a child would copy every shared page
    for label in values["labels"]:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(values["threads"])
            os.write(1, f"{json.dumps(_measure(case, entrants[label]))}\n".encode())
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            os.write(1, b"null\n")


def _measure(case: Case, provider: StepProvider) -> Peak:
    model = build_model(case.model, torch.device("cpu"))
    optimiser = make_optimiser(model)
    short_step(model, optimiser, case, provider)
    micros = bind(model, case, provider)[:_MICROS]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    step(optimiser, micros)
    peak = _status("VmHWM")
    return Peak(peak, max(0, peak - before))


if __name__ == "__main__":
    _serve(sys.stdin.read())
