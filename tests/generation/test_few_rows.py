"""Linear layers for few rows: as accurate as PyTorch's, and only where they are replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nextquill.generation.few_rows import faster_few_rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 5), (8,), (), (1, 9), (0, 3)])
def test_products_are_those_of_the_layer(shape, bias):
    torch.manual_seed(len(shape))
    layer, x = nn.Linear(24, 10, bias=bias), torch.randn(*shape, 24)
    truth = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.no_grad(), faster_few_rows(nn.Sequential(layer)):
        found = layer(x)
    assert found.shape == truth.shape
    assert found.is_contiguous(), "sdpa leaves its fused kernel for queries of another layout"
    # Each sum of 24 products and a bias has at most 25 roundings in either order.
    bound = 25 * torch.finfo(torch.float32).eps * (x.double().abs() @ layer.weight.double().abs().T + 1)
    assert ((found - truth).abs() <= bound).all()


def test_only_float32_layers_change_and_all_are_given_back():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double(), Own(4, 4))
    with faster_few_rows(model):
        assert ["forward" in vars(layer) for layer in model] == [True, False, False]
        assert model[0](torch.zeros(1, 4, dtype=torch.float32)).dtype == torch.float32
    assert not any("forward" in vars(layer) for layer in model)
