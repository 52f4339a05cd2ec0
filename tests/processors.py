"""Imitates other processors, by environment variables that take effect when a process starts.

Intel's MKL, PyTorch's own kernels and oneDNN choose their code by the processor. These settings make them choose the
code for an older one. AMD's and ARM's processors ignore some of the settings. `python tests/processors.py avx2 3
COMMAND…` runs a command with AVX2 and three threads.
"""

from __future__ import annotations

import os
import sys

PROCESSORS = {
    "native": {},
    # Most laptops, most AMD servers, most machines that run continuous integration.
    "avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx2-alike": {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oldest": {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def environment(processor: str, threads: int) -> dict[str, str]:
    """The variables to add to the environment of a process."""
    # With more threads than cores, waiting threads must not spin.
    return {**PROCESSORS[processor], "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


if __name__ == "__main__":
    name, threads, *command = sys.argv[1:]
    os.execvpe(command[0], command, {**os.environ, **environment(name, int(threads))})
