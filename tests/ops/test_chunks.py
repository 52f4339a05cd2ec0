"""Chunks under a memory bound: the division of the memory, and dz collected over several chunks."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextquill as nq
from nextquill.errors import ArgumentError
from nextquill.ops import chunks
from nextquill.ops.chunks import ChunkedHead, ChunkMemory
from nextquill.ops.dispatch import resolve_impl
from tests.helpers import make_case

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class NarrowHead(ChunkedHead):
    """A head whose dz is bfloat16 wherever it is, as on an accelerator."""

    @property
    def grad_dtype(self):
        return torch.bfloat16


def open_head(v, d, chunk_bytes=None, *, narrow=True, device="cpu"):
    kernels = resolve_impl("torch", torch.device("cpu"), torch.float32)
    weight = torch.empty(v, d, dtype=torch.bfloat16, device=device)
    return (NarrowHead if narrow else ChunkedHead)(weight, kernels=kernels, chunk_bytes=chunk_bytes)


def stride(v):
    return -(-v // 16) * 16


def held(memory, v, d, streams, *, narrow=True):
    """Bytes of logits and, for a narrow dz, of dz with its hidden states and dh."""
    of_gradient = 2 * stride(v) + (2 + 4) * d if narrow else 0
    return 4 * streams * memory.rows * stride(v) + memory.gradient_rows * of_gradient


sizes = st.tuples(st.integers(1, 5000), st.integers(1, 300))


@property_test
@given(
    size=sizes,
    rows=st.integers(0, 400),
    streams=st.integers(1, 2),
    gradients=st.integers(0, 2),
    longest=st.integers(0, 400),
    spare=st.integers(0, 10**7),
    narrow=st.booleans(),
)
def test_what_is_held_stays_within_the_bound(size, rows, streams, gradients, longest, spare, narrow):
    v, d = size
    gradients = min(gradients, streams)
    least = 4 * streams * stride(v) + (gradients * (2 * stride(v) + 6 * d) if narrow else 0)
    memory = open_head(v, d, least + spare, narrow=narrow).memory(rows, streams, gradients, longest)
    assert held(memory, v, d, streams, narrow=narrow) <= least + spare
    assert 1 <= memory.rows <= max(1, rows)
    if narrow and gradients:
        # One row of each stream, at least, unless there are no rows at all.
        assert min(gradients, gradients * rows) <= memory.gradient_rows <= gradients * rows
    else:
        assert memory.gradient_rows == 0
    with pytest.raises(ArgumentError, match=rf"chunk_bytes: expected at least {least}, .*, got {least - 1}"):
        open_head(v, d, least - 1, narrow=narrow).memory(rows, streams, gradients, longest)


def test_the_default_on_an_accelerator_is_small_logits_and_large_products():
    v, d = 151_936, 4096
    memory = open_head(v, d, device="meta").memory(8192, 2, 2, 512)
    assert memory == ChunkMemory(rows=512, gradient_rows=4224)  # 622 MB of logits
    assert held(memory, v, d, 2) <= 2 * 2**30
    # A sequence of 1,024 rows is not cut: it takes memory from dz.
    long = open_head(v, d, device="meta").memory(8192, 2, 2, 1024)
    assert long.rows == 1024
    assert long.gradient_rows >= 2 * 1024
    assert held(long, v, d, 2) <= 2 * 2**30


def test_long_sequences_leave_memory_for_the_gradient():
    memory = open_head(151_936, 4096, device="meta").memory(10**5, 2, 2, 10**5)
    assert 0.7 * 15 * 2**27 < 4 * 2 * memory.rows * 151_936 <= 0.75 * 15 * 2**27
    assert memory.gradient_rows > 1000


def test_a_bound_too_small_for_one_row_is_refused_before_any_product():
    case = make_case(6, 4, 5).leaves()
    with pytest.raises(
        ArgumentError, match="chunk_bytes: expected at least 128, which one row of 2 streams takes, got 127"
    ):
        nq.NextQuillLoss(chunk_bytes=127)(*case.pair_args)
    with pytest.raises(
        ArgumentError, match="chunk_bytes: expected at least 64, which one row of 1 stream takes, got 1"
    ):
        nq.SFTLoss(chunk_bytes=1)(case.factual, None, case.weight, case.labels)


@pytest.mark.parametrize("gradient_rows", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("streams", [(0,), (0, 1)])
def test_rows_are_collected_and_each_flush_takes_as_many_as_fit(gradient_rows, streams, monkeypatch):
    """Any memory of at least a row for each stream gives the same products, in pieces that fill it."""
    if gradient_rows < len(streams):
        pytest.skip("less than one row")
    v, d, n = 21, 5, 17
    head = open_head(v, d)
    head.weight.copy_(torch.randn(v, d))
    hiddens = torch.randn(2, n, d).bfloat16()
    taken = []

    class Gradients:
        def __init__(self):
            self.head, self.rows = head, torch.zeros(2, n)

        def add(self, blocks, grad_logits, hidden, *, last):
            taken.append(len(grad_logits))
            assert sum(rows.numel() for _, rows in blocks) == len(grad_logits) == len(hidden)
            for (stream, rows), dz, h in zip(
                blocks,
                grad_logits.split([r.numel() for _, r in blocks]),
                hidden.split([r.numel() for _, r in blocks]),
                strict=True,
            ):
                assert torch.equal(h, hiddens[stream][rows])
                self.rows[stream, rows] += dz.float().sum(1)

    def write(indices, rows, outs):
        for stream, out in enumerate(outs):
            out.fill_(0.0)
            out[:, 0] = 1 + 100 * stream + indices[rows]

    gradients = Gradients()
    buffer = chunks.GradientBuffer(gradients, streams, gradient_rows)
    for start, stop in ((0, 5), (5, 6), (6, 13), (13, n)):
        indices = torch.arange(start, stop)
        hidden = torch.cat([hiddens[0, indices], hiddens[1, indices]])
        chunk = chunks.Chunk(head, slice(start, stop), indices, indices, hidden, torch.empty(len(hidden), v))
        buffer.add(chunk, functools.partial(write, indices))
    buffer.flush()
    for stream in (0, 1):
        expected = 1 + 100 * stream + torch.arange(n) if stream in streams else torch.zeros(n)
        assert torch.equal(gradients.rows[stream], expected.float().bfloat16().float())
    whole = gradient_rows // len(streams) * len(streams)
    assert taken[:-1] == [whole] * (len(taken) - 1)
    assert sum(taken) == len(streams) * n
