"""Native CPU kernels for nextquill: statistics and gradients of chunks of logits, through DLPack.

The six kernels take float32 tensors on the CPU, or their DLPack capsules, and write into the tensors they are given.
`nextquill.ops.chunk_native` calls them and documents their results.

The best instruction set of the machine is used. `NEXTQUILL_ISA` in the environment, which is read once on import, or
`set_isa` chooses another one of `available_isas()`.
"""

from __future__ import annotations

import os

from nextquill_ext._core import (
    available_isas,
    current_isa,
    jsd_grad_,
    jsd_stats,
    pair_grad_,
    pair_stats,
    set_isa,
    token_grad_,
    token_stats,
    use_openmp,
)

__version__ = "0.1.0"

# Goes up when a signature or the meaning of an argument changes, so that nextquill can refuse an old build.
INTERFACE_VERSION = 6

__all__ = [
    "INTERFACE_VERSION",
    "available_isas",
    "current_isa",
    "jsd_grad_",
    "jsd_stats",
    "pair_grad_",
    "pair_stats",
    "set_isa",
    "token_grad_",
    "token_stats",
    "use_openmp",
]

if "NEXTQUILL_ISA" in os.environ:
    try:
        set_isa(os.environ["NEXTQUILL_ISA"])
    except ValueError as error:
        raise ImportError(f"NEXTQUILL_ISA: {error}") from None
