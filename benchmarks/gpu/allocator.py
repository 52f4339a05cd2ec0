"""Whether PyTorch's allocator may use segments that grow, asked in a process of its own.

The phases allocate tensors of many sizes one after the other, so fixed segments would run out of memory early. Some
virtual machines do not offer what growing segments need; then the setting is left out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

_SETTING = "expandable_segments:True"
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_TRY = """
import torch
held = [torch.ones(2**e, device="cuda") for e in range(18, 27)]
del held[::2]
held.append(torch.ones(2**27, device="cuda"))
torch.cuda.synchronize()
assert all(float(each[-1]) == 1 for each in held)
"""


def growing_segments(environment: Mapping[str, str], seconds: float = 60) -> tuple[dict[str, str], str]:
    """The variable to set for children, or none, and a note about it."""
    if any(name in environment for name in _NAMES):
        return {}, "the allocator's settings are the environment's"
    setting = {variable(): _SETTING}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY],
            env={**environment, **setting}, capture_output=True, text=True, check=False, timeout=seconds,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"fixed segments: the test of growing ones failed ({type(error).__name__})"
    if done.returncode != 0 or "not supported" in done.stderr:
        return {}, f"fixed segments: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}"
    return setting, "segments that grow"


def variable() -> str:
    """The variable's name, which torch 2.9 changed; it warns about the old one."""
    import torch

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return _NAMES[0] if release >= (2, 9) else _NAMES[1]
