"""A training run compiles few kernels: Triton's own keys for launches whose slices begin at any row.

The launchers run on CPU tensors with `JITFunction.run` replaced, in a process without TRITON_INTERPRET; nothing is
compiled and no GPU is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COUNT = """
import contextlib, json, torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from nextquill_kernels import chunk_grad, chunk_stats, coefficients, jsd, launch, stream
from nextquill_kernels.tiles import Tile

backend = make_backend(GPUTarget("cuda", 90, 32))
keys = {}

def run(self, *arguments, grid, warmup, **options):
    binder = create_function_from_signature(self.signature, self.params, backend)
    _, specialization, options = binder(*arguments, **options)
    keys.setdefault(self.fn.__name__, set()).add(str((specialization, sorted(options.items()))))

JITFunction.run = run
launch.INTERPRETED = True  # accept tensors on the CPU
for module in (chunk_grad, chunk_stats, coefficients, jsd, stream):
    module.on_device = lambda tensor: contextlib.nullcontext()

def counted(calls):
    keys.clear()
    calls()
    return {name: len(found) for name, found in keys.items()}

def chunks(stride=1024):
    "Rows [first, first + n) of a batch of `batch` rows, as the engine cuts them; logits begin at a row of the buffer."
    for first, n, batch in ((0, 16, 64), (16, 16, 64), (3, 7, 71), (4, 1, 5), (1, 5, 6), (17, 16, 33)):
        rows = slice(first, first + n)
        z = torch.zeros(2 * n, stride)[:, :1000]
        z1, z0 = z[:n], z[n:]
        labels = torch.zeros(batch, dtype=torch.long)[rows]
        stats, grads = torch.zeros(9, batch)[:, rows], torch.zeros(3, batch)[:, rows]
        chunk_stats.token_stats(z1, labels, stats[:3])
        chunk_stats.pair_stats((z1, z0), labels, stats)
        dz = torch.zeros(2 * n + 3, stride, dtype=torch.bfloat16)[3:, :1000]  # begins at any row of its buffer, too
        chunk_grad.token_grad(z1, labels, stats[:3], grads[0], dz[:n])
        chunk_grad.pair_grad((z1, z0), labels, stats, grads, (dz[:n], dz[n:]))
        jsd.jsd_stats((z1, z0), stats[:6], 0.5)
        jsd.jsd_grad((z1, z0), stats[:6], grads[0], dz[:n], 0.5)
        coefficients.row_coefficients(
            stats[2], stats[5], torch.zeros(batch + 9, dtype=torch.long)[rows], scheme="clip", low=0.0, high=1.0,
            threshold=0.0, normalize=True, per_token=False, num_items=torch.zeros(batch)[first], out=grads,
        )

def streams():
    "Batches of any size, and labels that begin anywhere in a larger tensor."
    tile = Tile(block_n=32, block_v=128, block_d=16, num_warps=4, num_stages=2, group_n=2, interleave=8)
    weight = torch.zeros(1000, 64)
    for first, n in ((0, 16), (1, 16), (2, 1), (3, 100), (16, 333)):
        labels = torch.zeros(n + first, dtype=torch.long)[first:]
        for labels in (labels, labels.repeat_interleave(2)[::2]):
            stream.label_stats((torch.zeros(n, 64), torch.zeros(n, 64)), weight, labels, tile=tile)

print(json.dumps({"chunks": counted(chunks), "streams": counted(streams),
                  "two_strides": counted(lambda: (chunks(1024), chunks(1001)))}))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COUNT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CHUNK_KERNELS = tuple(f"_{of}_{what}_kernel" for of in ("token", "pair", "jsd") for what in ("stats", "grad"))


def test_chunks_that_begin_at_any_row_share_one_kernel(counts):
    assert counts["chunks"] == dict.fromkeys((*CHUNK_KERNELS, "_row_coefficients_kernel"), 1)


def test_batches_of_any_size_share_one_kernel(counts):
    assert counts["streams"] == dict.fromkeys(("gather_kernel", "stream_fwd_kernel", "combine_kernel"), 1)


def test_wide_and_narrow_rows_have_kernels_of_their_own(counts):
    """Conversely, launches that differ in their 16-byte accesses have different kernels."""
    assert all(counts["two_strides"][name] > 1 for name in CHUNK_KERNELS)
