"""Random shapes, strides, masks, dtypes and options: every implementation against float64.

And files damaged at random: every command ends soon, with success or with an error of one line.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextquill as nq
from nextquill import reference
from nextquill.ops.dispatch import why_not
from tests.fuzzed_files import failures
from tests.helpers import relative_error

CPU = torch.device("cpu")


@st.composite
def calls(draw):
    """The tensors and options of one operator call. Every tensor may be a strided view into garbage."""
    n, d, v = draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 150))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16]))

    def matrix(rows, columns, scale=1.0):
        layout = draw(st.sampled_from(["contiguous", "wide rows", "transposed", "every other row", "expanded"]))
        if layout == "expanded" and rows:
            return (scale * torch.randn(1, columns, generator=rng)).to(dtype).expand(rows, columns)
        if layout == "transposed":
            return (scale * torch.randn(columns, rows, generator=rng)).to(dtype).T
        buffer = torch.full((2 * rows + 1, columns + 3), torch.nan)
        view = buffer[1 : rows + 1, 2 : columns + 2]
        if layout == "every other row":
            view = buffer[: 2 * rows : 2, 1 : columns + 1]
        view.copy_(scale * torch.randn(rows, columns, generator=rng))
        return view.contiguous().to(dtype) if layout == "contiguous" else buffer.to(dtype).as_strided(
            view.size(), view.stride(), view.storage_offset()
        )  # fmt: skip

    labels = torch.randint(v, (n,), generator=rng)
    ignore_index = draw(st.sampled_from([-100, -1, 0, v + 7]))
    labels[torch.rand(n, generator=rng) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore_index
    bias = torch.randn(v, generator=rng).to(dtype) if draw(st.booleans()) else None
    tensors = [matrix(n, d), matrix(n, d), matrix(v, d, 2.0 / d**0.5), bias]
    options = {
        "ignore_index": ignore_index,
        "softcap": draw(st.sampled_from([None, 1.5, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -2.0])),
    }
    return tensors, labels, options


def results(function, tensors, labels, grads, options):
    h1, h0, weight, bias = leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    pair = function(h1, h0, weight, labels, bias=bias, **options)
    sum((nll * g).sum() for nll, g in zip(pair, grads, strict=True)).backward()
    return [*pair, *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("impl", ["torch", "native", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.timeout(900)  # the interpreter beside other work
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_pair_operator(impl, call):
    if reason := why_not(impl, CPU, torch.float32):
        pytest.skip(reason)
    tensors, labels, options = call
    grads = torch.randn(3, labels.numel())
    exact = [None if t is None else t.double() for t in tensors]
    truth = results(reference.linear_pair_nll, exact, labels, grads, options)
    actual = results(nq.linear_pair_nll, tensors, labels, grads, {**options, "impl": impl})
    half = tensors[0].dtype == torch.float16
    for index, (a, t) in enumerate(zip(actual, truth, strict=True)):
        # Gradients are rounded to their input's dtype; nll's never are. Where the exact result cancels to nearly 0 (one
        # column, equal rows) only the size of the terms bounds the error.
        tolerance = 2**-10 if half and index > 2 else 1e-5
        error = (a.double() - t).abs().max() / (1 + t.abs().max()) if t.numel() else torch.zeros(())
        assert error <= tolerance or relative_error(a, t) <= tolerance, f"result {index}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damaged_files(tmp_path):
    """2,100 cases over records, YAML, files of models and checkpoints, and templates."""
    found = dict(failures(range(2100), tmp_path))
    assert not found, "\n".join(f"case {number}: {problem}" for number, problem in list(found.items())[:5])
