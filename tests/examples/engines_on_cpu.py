"""Runs a script or a module with Accelerate's GPU engines, on CPUs: `engines_on_cpu.py [-m] WHAT ARGUMENTS…`.

Accelerate does not use FSDP and DeepSpeed without a GPU. Here it is told that these processes have several GPUs, so it
prepares the model as usual. Everything then runs on a CPU over gloo.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def engines_on_cpu() -> None:
    """Make Accelerate take this process for one of several GPUs."""

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


if __name__ == "__main__":
    # A process that waits for another says where, before it is ended.
    faulthandler.dump_traceback_later(float(os.environ.get("NEXTQUILL_TEST_TIMEOUT", "200")), exit=True)
    faulthandler.register(signal.SIGTERM, chain=True)
    torch.set_num_threads(1)
    engines_on_cpu()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
