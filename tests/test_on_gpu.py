"""On a GPU: a second device, a stream of the caller's own, autocast, and torch.compile with CUDA graphs.

Only torch, triton and pytest are needed. `python -m benchmarks.verify_gpu` runs this file.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nextquill as nq
from tests.helpers import FLOAT32_RELATIVE, assert_close, make_case, relative_error

pytestmark = pytest.mark.gpu

LOSSES: dict[str, Callable[..., nq.PairLoss]] = {
    "nextquill": nq.NextQuillLoss,
    "detached": lambda **options: nq.NextQuillLoss(detach_counterfactual=True, **options),
    "perce": nq.PerCELoss,
    "sft": nq.SFTLoss,
}
losses = pytest.mark.parametrize("name", LOSSES)


def case_on(device, dtype=torch.float32):
    """The same case in every call: rows of several chunks, a fifth of them ignored."""
    case = make_case(60, 64, 1031, dtype=dtype)
    for field in ("factual", "counterfactual", "weight", "bias", "labels"):
        setattr(case, field, getattr(case, field).to(device))
    return case.leaves()


def run(name: str, case, **options) -> list[Tensor]:
    """The loss, the per-token NLLs, and every gradient of both."""
    loss = LOSSES[name](chunk_bytes=20 * 2 * 1031 * 4, **options)(*case.pair_args, case.bias)
    nlls = nq.linear_pair_nll(*case.pair_args, bias=case.bias)
    (loss + sum(nll.mean() for nll in nlls)).backward()
    return [loss.detach(), *(nll.detach() for nll in nlls), *case.gradients().values()]


@losses
def test_a_second_device_gives_the_same_result_and_leaves_the_first_one_current(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = (run(name, case_on(torch.device("cuda", index))) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    for one, other in zip(first, second, strict=True):
        assert other.device.index == 1
        assert_close(other.cpu(), one.cpu())


@losses
def test_a_stream_of_the_callers_own_gives_the_same_result(name):
    """Index tensors are copied on the stream in use, and no launch goes to the default stream."""
    expected = run(name, case_on("cuda"))
    case, stream = case_on("cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):  # work on the default stream, which ours neither waits for nor overtakes by luck
        busy = (busy @ busy).clamp(-1, 1)
    with torch.cuda.stream(stream):
        actual = run(name, case)
    stream.synchronize()
    # cuBLAS promises equal bits on a single active stream only.
    for one, other in zip(expected, actual, strict=True):
        assert_close(other, one)


@losses
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(name):
    case, half = case_on("cuda"), case_on("cuda", torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        actual = run(name, case)
    expected = run(name, half)
    assert all(gradient.dtype == torch.float32 for gradient in case.gradients().values())
    assert relative_error(actual[0], expected[0]) <= 1e-3
    for one, other in zip(actual[4:], expected[4:], strict=True):
        assert relative_error(one, other) <= 2**-5


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor imports
@pytest.mark.parametrize("name", ["nextquill", "perce"])  # each compiles for seconds
def test_compiled_with_cuda_graphs_it_gives_the_same_result_for_every_batch(name, monkeypatch):
    """Labels are read on the host. A graph that replays what was read for the first batch would be wrong for others."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")
    loss = LOSSES[name](chunk_bytes=20 * 2 * 1031 * 4)

    def scaled(h1: Tensor, h0: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return loss(torch.tanh(h1), torch.tanh(h0), weight, labels)

    compiled = torch.compile(scaled, mode="reduce-overhead")
    for batch in range(4):
        cases = [case_on("cuda") for _ in range(2)]
        for case in cases:
            case.labels[: 7 * batch] = -100
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = compiled(*cases[0].pair_args), scaled(*cases[1].pair_args)
        assert_close(actual.detach().clone(), expected.detach(), FLOAT32_RELATIVE)
        for each in (actual, expected):
            each.backward()
        for key, gradient in cases[1].gradients().items():
            assert relative_error(cases[0].gradients()[key], gradient) <= FLOAT32_RELATIVE, key
