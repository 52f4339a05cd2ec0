"""The same call with the same inputs, threads and machine gives the same bits in separate processes."""

from __future__ import annotations

import hashlib

import pytest
import torch

import nextquill as nq
from nextquill.ops.dispatch import why_not
from nextquill.tree import TreeLayout, build_prefix_tree, tree_attention
from tests.helpers import make_case, run_python
from tests.processors import PROCESSORS, environment

SETTINGS = [(processor, threads) for processor in PROCESSORS for threads in (1, 2, 3)]
LOSSES = [
    nq.NextQuillLoss(anchor=0.1),
    nq.NextQuillLoss(weighted_effect=True, softcap=20.0, reduction="token"),
    nq.NextQuillLoss(detach_counterfactual=True, reduction="micro_batch"),
    nq.PerCELoss(logit_scale=0.5),
    nq.LongCELoss(),
    nq.SFTLoss(),
]


def results() -> dict[str, list[torch.Tensor]]:
    """Values and gradients of every loss, both operators and the attention of trees, for all implementations here.

    Inputs are so large that threads share the matrix products, and that a loss takes several chunks.
    """
    found = {}
    ids = torch.arange(301) // 43
    for impl in ("torch", "native"):
        if why_not(impl, torch.device("cpu"), torch.float32):
            continue
        for loss_fn in LOSSES:
            case = make_case(301, 96, 1031).leaves()
            loss_fn.impl, loss_fn.chunk_bytes = impl, 1 << 19
            output = loss_fn.compute(*case.pair_args, case.bias, ids)
            output.loss.backward()
            found[f"{impl} {loss_fn}"] = [output.loss, *output.pair_nll, *case.gradients().values()]
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(301, 96, 1031, dtype=dtype).leaves()
            pair = nq.linear_pair_nll(*case.pair_args, bias=case.bias, impl=impl)
            token = nq.linear_token_nll(case.factual, case.weight, case.labels, bias=case.bias, impl=impl)
            (pair.factual.sum() + 0.3 * pair.effect.sum() + token.mean()).backward()
            found[f"{impl} {dtype}"] = [*pair, token, *case.gradients().values()]
    trunk = list(range(200))
    tree = build_prefix_tree([[*trunk, 1000 + n, *range(150)] for n in range(3)])
    layout = TreeLayout.of_tree(tree)
    for window in (None, 50):
        query = torch.randn(1, 4, len(tree), 32).requires_grad_()
        key, value = (torch.randn(1, 2, len(tree), 32).requires_grad_() for _ in range(2))
        out = tree_attention(query, key, value, layout, window=window)
        gradients = torch.autograd.grad(out.sin().sum(), (query, key, value))
        found[f"tree, window {window}"] = [out, *gradients]
    return found


def digests() -> str:
    """One line per computation: its name, and a digest of the bits of its results."""
    torch.manual_seed(0)
    lines = []
    for name, tensors in results().items():
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().ravel().view(torch.uint8).numpy().tobytes())
        lines.append(f"{name} {digest.hexdigest()}")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "threads"),
    SETTINGS,
    ids=lambda value: str(value),
)
def test_two_processes_give_the_same_bits(processor, threads):
    code = "from tests.test_repeatability import digests; print(digests())"
    first, second = (run_python(code, **environment(processor, threads)) for _ in range(2))
    assert first == second
    assert len(set(first.splitlines())) >= 2 + len(LOSSES)
