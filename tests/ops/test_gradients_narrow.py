"""dz in bfloat16, collected over several chunks, as on a GPU. Only the products are emulated."""

import pytest
import torch

import nextquill as nq
from nextquill.ops import head as head_module
from tests.helpers import make_case, relative_error

LOSSES = {
    "NextQuill": lambda **o: nq.NextQuillLoss(anchor=0.1, **o),
    "detached": lambda **o: nq.NextQuillLoss(detach_counterfactual=True, **o),
    "anchored": lambda **o: nq.NextQuillLoss(alpha=0.0, anchor=0.3, **o),
    "PerCE": nq.PerCELoss,
    "SFT": nq.SFTLoss,
}


@pytest.fixture
def _wide_products(monkeypatch):
    """Emulates products of half-precision factors into float32 on a CPU, and counts the narrow inputs."""
    seen = []

    def check(left, right):
        assert left.dtype == right.dtype == torch.bfloat16
        seen.append(left)

    def mm_into(out, left, right):
        check(left, right)
        return torch.mm(left.float(), right.float(), out=out)

    def addmm_into(accumulator, left, right):
        check(left, right)
        accumulator.addmm_(left.float(), right.float())

    monkeypatch.setattr(head_module, "has_wide_mm", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(head_module, "mm_into", mm_into)
    monkeypatch.setattr(head_module, "addmm_into", addmm_into)
    return seen


def gradients(loss_fn, case, ids):
    own = case.leaves()
    loss_fn(*own.pair_args, own.bias, ids).backward()
    return own.gradients()


@pytest.mark.covering(1)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, impl, _wide_products):  # noqa: PT019
    case, ids = make_case(30, 12, 77, dtype=torch.bfloat16), torch.arange(30) // 7
    # Memory for a few rows, so that both buffers are used several times.
    actual = gradients(LOSSES[name](impl=impl, chunk_bytes=77 * 4 * 16), case, ids)
    assert _wide_products
    again = gradients(LOSSES[name](impl=impl, chunk_bytes=77 * 4 * 16), case, ids)
    for key, value in actual.items():
        assert torch.equal(value, again[key]), f"{key} differs between two calls"
    truth = gradients(LOSSES[name](impl="torch"), case.double(), ids)
    for key, expected in truth.items():
        # dz is rounded to bfloat16 (cut off by Triton's interpreter) before it is summed, dh and dW after.
        assert relative_error(actual[key], expected) < 2**-7, key


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_operators(impl, _wide_products):  # noqa: PT019
    case = make_case(30, 12, 77, dtype=torch.bfloat16)
    own, exact = case.leaves(), case.double()
    for each in (own, exact):
        pair = nq.linear_pair_nll(*each.pair_args, bias=each.bias, impl=impl if each is own else "torch")
        sum(nll.mean() * factor for nll, factor in zip(pair, (1.0, 0.4, -0.3), strict=True)).backward()
    assert _wide_products
    for key, expected in exact.gradients().items():
        assert relative_error(own.gradients()[key], expected) < 2**-7, key


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_the_divergence(impl, beta, _wide_products):  # noqa: PT019
    case = make_case(30, 12, 77, dtype=torch.bfloat16)
    own, exact = case.leaves(), case.double()
    # Memory for a few rows, so that both buffers are used several times.
    nq.linear_pair_jsd(*own.pair_args, bias=own.bias, impl=impl, beta=beta, chunk_bytes=77 * 4 * 16).mean().backward()
    nq.linear_pair_jsd(*exact.pair_args, bias=exact.bias, impl="torch", beta=beta).mean().backward()
    assert _wide_products
    for key, expected in exact.gradients().items():
        assert relative_error(own.gradients()[key], expected) < 2**-7, key
