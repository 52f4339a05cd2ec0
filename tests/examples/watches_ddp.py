"""Runs a script or a module, and fails if DDP outlives its process group: `watches_ddp.py [-m] WHAT ARGUMENTS…`.

DDP's destructor can wait forever if it is the last owner of a gloo group.
"""

from __future__ import annotations

import gc
import runpy
import sys
from typing import Any

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel


def watch() -> None:
    end_training = Accelerator.end_training

    def watched(self: Accelerator, *args: Any) -> None:
        alive = sum(isinstance(each, DistributedDataParallel) for each in gc.get_objects())
        end_training(self, *args)
        if alive:
            raise SystemExit("DDP is alive when its process group ends")

    Accelerator.end_training = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    watch()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
