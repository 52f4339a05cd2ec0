"""The three products of the head: values, result dtypes, and half-precision weights widened block by block."""

import pytest
import torch

from nextquill.ops import head as head_module
from nextquill.ops.gradients import HeadGradients, Needs, scaled
from nextquill.ops.head import LinearHead
from tests.helpers import assert_close, make_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=[1, 2**23], ids=["row-blocks", "one-block"], autouse=True)
def _cast_bytes(request, monkeypatch):
    monkeypatch.setattr(head_module, "_CAST_BYTES", request.param)


@dtypes
def test_products_are_exact_to_the_compute_dtype(dtype):
    case, wide = make_case(12, 8, 21, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    head = LinearHead(case.weight, case.bias, softcap=3.0, logit_scale=0.5)
    exact = {name: tensor.double() for name, tensor in case.tensors.items()}
    poisoned = torch.full((12, 21), torch.nan, dtype=wide)
    logits = head.logits(case.factual, poisoned)
    assert logits.data_ptr() == poisoned.data_ptr()
    truth = 3.0 * torch.tanh(0.5 * (exact["factual"] @ exact["weight"].T + exact["bias"]) / 3.0)
    assert_close(logits, truth, 1e-6)

    grad_logits = torch.randn(12, 21, dtype=wide)
    hidden_grad = head.hidden_grad(grad_logits)
    assert hidden_grad.dtype == wide
    assert_close(hidden_grad, grad_logits.double() @ exact["weight"], 1e-6)

    accumulator = torch.ones(21, 8, dtype=wide)
    head.add_weight_grad(accumulator, grad_logits, case.factual)
    assert_close(accumulator, 1 + grad_logits.double().T @ exact["factual"], 1e-6)


def test_gradients_are_kept_only_where_needed():
    case = make_case(6, 4, 5)
    head = LinearHead(case.weight, case.bias)
    grads = HeadGradients(head, case.factual, case.counterfactual, Needs(True, False, False, True))
    grads.add(grads.factual, torch.tensor([1, 4]), torch.randn(2, 5), torch.randn(2, 4))
    assert grads.counterfactual is None
    assert grads.weight is None
    assert grads.bias.any()
    assert grads.factual.any(-1).tolist() == [False, True, False, False, True, False]


def test_scaling_never_happens_in_place():
    gradient = torch.ones(3)
    result = scaled(gradient, torch.tensor(2.0), torch.bfloat16)
    assert (result.dtype, result.tolist(), gradient.tolist()) == (torch.bfloat16, [2.0] * 3, [1.0] * 3)
    assert scaled(None, torch.tensor(2.0), torch.float32) is None
