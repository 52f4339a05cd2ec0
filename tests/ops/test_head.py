"""The three products of the head: values, result dtypes, and half-precision weights widened block by block."""

import contextlib
import itertools

import pytest
import torch

from nextquill.ops import head as head_module
from nextquill.ops import mixed_precision_mm as wide
from nextquill.ops.gradients import HeadGradients, Needs
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
    logits = head.finish_(head.products(case.factual, poisoned))
    assert logits.data_ptr() == poisoned.data_ptr()
    truth = 3.0 * torch.tanh(0.5 * (exact["factual"] @ exact["weight"].T + exact["bias"]) / 3.0)
    assert_close(logits, truth, 1e-6)

    grad_logits = torch.randn(12, 21, dtype=wide)
    hidden_grad = head.hidden_grad(grad_logits)
    assert hidden_grad.dtype == wide
    assert_close(hidden_grad, grad_logits.double() @ exact["weight"], 1e-6)

    accumulator = torch.ones(21, 8, dtype=wide)
    head.add_weight_grad(accumulator, grad_logits, case.factual)
    weight_grad = grad_logits.double().T @ exact["factual"]
    assert_close(accumulator, 1 + weight_grad, 1e-6)
    accumulator.fill_(torch.nan)
    head.add_weight_grad(accumulator, grad_logits, case.factual, overwrite=True)
    assert_close(accumulator, weight_grad, 1e-6)


def test_gradients_are_kept_only_where_needed():
    case = make_case(6, 4, 5)
    head = LinearHead(case.weight, case.bias)
    grads = HeadGradients(head, case.factual, case.counterfactual, Needs(True, False, False, True))
    rows = torch.tensor([1, 4])
    grads.add([(0, rows), (1, rows)], torch.randn(4, 5), torch.randn(4, 4))
    assert grads.counterfactual is None
    assert grads.weight is None
    assert grads.bias.any()
    assert grads.factual.any(-1).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize(
    "needs", list(itertools.product([True, False], repeat=4)), ids=lambda n: "".join("ny"[x] for x in n)
)
def test_stacked_streams_give_each_its_own_gradient(needs):
    case, rows = make_case(6, 4, 5, dtype=torch.float64), torch.tensor([1, 4])
    grads = HeadGradients(LinearHead(case.weight, case.bias), case.factual, case.counterfactual, Needs(*needs))
    dz, hidden = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    grads.add([(0, rows), (1, rows)], dz, hidden)
    expected = [torch.zeros(6, 4).double().index_copy(0, rows, part @ case.weight) for part in dz.split(2)]
    expected += [dz.T @ hidden, dz.sum(0)]
    found = (grads.factual, grads.counterfactual, grads.weight, grads.bias)
    for actual, truth, wanted in zip(found, expected, needs, strict=True):
        if wanted:
            assert_close(actual, truth, 1e-14)
        else:
            assert actual is None


def test_a_gradient_without_rows_is_zero():
    case = make_case(6, 4, 5)
    grads = HeadGradients(LinearHead(case.weight, case.bias), case.factual, None, Needs(True, False, True, True))
    grads._weight.fill_(torch.nan)  # as memory may hold anything
    for gradient in (grads.factual, grads.weight, grads.bias):
        assert not gradient.any()


def test_the_bias_gradient_of_opposite_streams_cancels_exactly():
    case = make_case(6, 4, 5)
    grads = HeadGradients(LinearHead(case.weight, case.bias), case.factual, None, Needs(False, False, False, True))
    dz = torch.randn(3, 5)
    rows = torch.arange(3)
    grads.add([(0, rows), (1, rows)], torch.cat([dz, -dz]), torch.randn(6, 4))
    assert not grads.bias.any()


@pytest.mark.gpu
@pytest.mark.parametrize("accumulates", [True, False], ids=["one-product", "slices"])
def test_wide_products_on_a_gpu(accumulates, monkeypatch):
    """bfloat16 factors, float32 results: as exact as float32 products of the same factors."""
    device = torch.device("cuda")
    if not wide.has_wide_mm(device, torch.bfloat16):
        pytest.skip("this build has no product of half-precision factors into float32")
    works = wide._works
    monkeypatch.setattr(
        wide, "_works", lambda probe, *a: works(probe, *a) and (accumulates or "addmm" not in probe.__name__)
    )
    monkeypatch.setattr(wide, "_SLICE_BYTES", 4 * 64 * 7)
    left, right = torch.randn(96, 33, device=device).bfloat16(), torch.randn(33, 64, device=device).bfloat16()
    truth = left.double() @ right.double()
    assert_close(wide.mm_into(torch.full((96, 64), torch.nan, device=device), left, right), truth, 1e-6)
    accumulator = torch.ones(96, 64, device=device)
    wide.addmm_into(accumulator, left, right)
    assert_close(accumulator, 1 + truth, 1e-6)


def test_tf32_is_allowed_inside_and_only_there():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with wide.tf32_products():
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
    with contextlib.suppress(KeyError), wide.tf32_products():
        raise KeyError
    assert matmul.fp32_precision == before


@pytest.mark.gpu
def test_float16_gradients_use_tensor_cores_and_do_not_underflow():
    """Factors far below float16's smallest number, products as exact as TF32's 11 bits."""
    device = torch.device("cuda")
    weight, hidden = torch.randn(512, 256, device=device).half(), torch.randn(64, 256, device=device).half()
    grad_logits = torch.randn(64, 512, device=device) * 1e-9
    head = LinearHead(weight)
    truth = grad_logits.double() @ weight.double()
    assert_close(head.hidden_grad(grad_logits), truth, 2**-10)
    accumulator = torch.zeros(512, 256, device=device)
    head.add_weight_grad(accumulator, grad_logits, hidden)
    assert_close(accumulator, grad_logits.double().T @ hidden.double(), 2**-10)


def test_no_wide_products_on_a_cpu():
    assert not wide.has_wide_mm(torch.device("cpu"), torch.bfloat16)
    assert LinearHead(torch.zeros(2, 2, dtype=torch.bfloat16)).grad_dtype == torch.float32
