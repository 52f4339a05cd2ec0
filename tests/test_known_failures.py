"""Bugs that users of other fused losses have reported, with every implementation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import nextquill as nq
from nextquill.ops import dispatch
from tests.helpers import assert_close, assert_same_gradients, make_case

NAN = torch.nan
CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "native", "triton"], autouse=True)
def _impl(request, monkeypatch):
    """The implementation that "auto" chooses here; float64 always uses plain PyTorch."""
    if reason := dispatch.why_not(request.param, CPU, torch.float32):
        pytest.skip(reason)
    monkeypatch.setitem(dispatch._PREFERRED, "cpu", request.param)


LOSSES = [
    nq.NextQuillLoss(anchor=0.1),
    nq.NextQuillLoss(detach_counterfactual=True),
    nq.PerCELoss(),
    nq.LongCELoss(),
    nq.SFTLoss(),
    nq.PairLoss(lambda p: p.factual / p.factual.max(), alpha=0.5),
]
losses = pytest.mark.parametrize("loss_fn", LOSSES, ids=["NextQuill", "detached", "PerCE", "LongCE", "SFT", "user"])


@pytest.mark.covering(1)
@losses
@pytest.mark.parametrize("poison", [NAN, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_what_an_ignored_row_holds_is_inert(loss_fn, poison):
    """0 · NaN is NaN, so masking a computed loss would let padding put NaN into the gradient of W."""
    clean = make_case(30, 6, 11)
    dirty = clean.leaves()
    ignored = clean.labels == -100
    with torch.no_grad():
        dirty.factual[ignored] = poison
        dirty.counterfactual[ignored] = poison
    clean = clean.leaves()
    results = []
    for case in (clean, dirty):
        output = loss_fn.compute(*case.pair_args, case.bias)
        output.loss.backward()
        results.append([output.loss, output.token_loss, *output.pair_nll, *case.gradients().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not dirty.factual.grad[ignored].any()


def test_what_an_ignored_row_holds_is_inert_in_the_operator():
    case = make_case(30, 6, 11)
    ignored = case.labels == -100
    case.factual[ignored] = NAN
    own = case.leaves()
    pair = nq.linear_pair_nll(*own.pair_args, bias=own.bias)
    sum(nll.sum() for nll in pair).backward()
    assert all(torch.isfinite(t).all() for t in (*pair, *own.gradients().values()))
    assert not own.factual.grad[ignored].any()


def test_an_upstream_nan_on_an_ignored_row_is_inert():
    case = make_case(30, 6, 11).leaves()
    ignored = case.labels == -100
    upstream = torch.ones(30).masked_fill(ignored, NAN)
    nq.linear_token_nll(case.factual, case.weight, case.labels).backward(upstream)
    assert torch.isfinite(case.weight.grad).all()
    assert not case.factual.grad[ignored].any()


@pytest.mark.covering(1)
@losses
@pytest.mark.parametrize("stream", ["factual", "counterfactual"])
def test_nan_in_a_counted_row_is_visible(loss_fn, stream):
    case = make_case(30, 6, 11, ignored=0.0)
    case.tensors[stream][4, 2] = NAN
    output = loss_fn.compute(*case.pair_args, case.bias)
    assert torch.isnan(getattr(output.pair_nll, stream)[4])
    unread = stream == "counterfactual" and isinstance(loss_fn, nq.SFTLoss)
    assert torch.isnan(output.loss) != unread
    assert torch.isnan(output.mean_effect_logprob)


def test_nan_in_the_head_is_visible():
    case = make_case(30, 6, 11)
    case.weight[3, 1] = NAN
    assert torch.isnan(nq.NextQuillLoss()(*case.pair_args, case.bias))


@pytest.mark.covering(1)
@pytest.mark.parametrize("vocabulary", [2, 63, 64, 65, 127, 129, 1031], ids=lambda v: f"V{v}")
def test_the_tail_of_the_vocabulary_counts_once(vocabulary):
    """A last tile that adds exp(0) for columns beyond V shifts every logsumexp (verl #2899)."""
    case = make_case(20, 8, vocabulary, ignored=0.0)
    case.labels[:] = vocabulary - 1
    case.bias[:] = -30.0  # exp(0) of a phantom column would dominate
    own, exact = case.leaves(), case.double()
    nq.linear_token_nll(own.factual, own.weight, own.labels, bias=own.bias).sum().backward()
    F.cross_entropy(exact.factual @ exact.weight.T + exact.bias, exact.labels, reduction="sum").backward()
    assert_same_gradients(own, exact)


def test_columns_masked_by_minus_infinity_stay_masked():
    """exp(-inf) is 0 in the sum, and 0 · finite in the gradient (unsloth #10616 lost the mask)."""
    case = make_case(20, 8, 16, ignored=0.0)
    case.labels %= 13
    padded, short = case.leaves("factual", "weight"), case.leaves("factual", "weight")
    padded.bias[13:] = -torch.inf
    nll = nq.linear_token_nll(padded.factual, padded.weight, padded.labels, bias=padded.bias)
    expected = nq.linear_token_nll(short.factual, short.weight[:13], short.labels, bias=short.bias[:13])
    nll.sum().backward()
    expected.sum().backward()
    assert_close(nll, expected, 1e-6)
    assert_same_gradients(padded, short, 1e-6)
    assert not padded.weight.grad[13:].any()


def test_effect_nll_with_softcap_is_not_that_of_the_difference_of_hidden_states():
    """Without a cap, nll_e needs one product of h1 - h0. With a cap that shortcut is wrong and must not be used."""
    case = make_case(20, 8, 16, ignored=0.0, dtype=torch.float64)
    difference = lambda **o: nq.linear_token_nll(  # noqa: E731
        case.factual - case.counterfactual, case.weight, case.labels, **o
    )
    assert_close(nq.linear_pair_nll(*case.pair_args).effect, difference(), 1e-12)
    capped = nq.linear_pair_nll(*case.pair_args, softcap=2.0).effect
    z1, z0 = (2.0 * torch.tanh(h @ case.weight.T / 2.0) for h in (case.factual, case.counterfactual))
    assert_close(capped, F.cross_entropy(z1 - z0, case.labels, reduction="none"), 1e-12)
    assert (capped - difference(softcap=2.0)).abs().max() > 0.1


def test_extreme_logits_are_finite():
    """logsumexp and softmax do not overflow, in values and gradients, up to the limit of float32."""
    case = make_case(20, 8, 16, ignored=0.0)
    case.factual *= 1e4
    own, exact = case.leaves(), case.double()
    for c in (own, exact):
        sum(nll.sum() for nll in nq.linear_pair_nll(*c.pair_args, bias=c.bias)).backward()
    assert_same_gradients(own, exact)


def test_a_shared_stream_gets_both_gradients():
    """One tensor is used for both passes: the effect term's gradients cancel, and the uniform nll_e is log V."""
    case = make_case(20, 8, 16, ignored=0.0, dtype=torch.float64).leaves("factual", "weight")
    pair = nq.linear_pair_nll(case.factual, case.factual, case.weight, case.labels)
    assert_close(pair.effect, torch.full_like(pair.effect, 16.0).log(), 1e-14)
    pair.effect.sum().backward()
    assert case.factual.grad.abs().max() < 1e-14


def test_a_tied_head_gets_the_sum_of_both_gradients():
    """Embedding and lm_head share one parameter, so autograd must add our dW to the embedding's gradient."""
    tied, tokens = nn.Embedding(16, 8).double(), torch.randint(16, (20,))
    labels = torch.randint(16, (20,))
    loss = nq.SFTLoss()(tied(tokens).tanh(), None, tied.weight, labels)
    expected = F.cross_entropy(tied(tokens).tanh() @ tied.weight.T, labels)
    actual, truth = torch.autograd.grad(loss, tied.weight)[0], torch.autograd.grad(expected, tied.weight)[0]
    assert_close(actual, truth, 1e-12)


class TinyModel(nn.Module):
    def __init__(self, loss_fn):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(37, 16), nn.Linear(16, 16), nn.Linear(16, 37, bias=False)
        self.loss_fn = loss_fn

    def forward(self, factual, counterfactual, labels):
        h1, h0 = (torch.tanh(self.mix(self.embed(ids))) for ids in (factual, counterfactual))
        return self.loss_fn(h1, h0, self.head.weight, labels)


def check_compiled(backend, ignored_counts):
    model = TinyModel(nq.NextQuillLoss(threshold=0.001))
    factual, counterfactual, labels = (torch.randint(37, (3, 5)) for _ in range(3))
    compiled = torch.compile(model, backend=backend)
    for ignored in ignored_counts:
        labels.view(-1)[:ignored] = -100
        losses, gradients = [], []
        for function in (model, compiled):
            model.zero_grad()
            loss = function(factual, counterfactual, labels)
            loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert_close(losses[1], losses[0], 1e-6)
        for compiled_grad, eager_grad in zip(gradients[1], gradients[0], strict=True):
            assert_close(compiled_grad, eager_grad, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_with_ignored_rows_has_the_eager_loss():
    """Liger-Kernel #1338 silently changed the loss under torch.compile. A graph break is allowed, a change is not."""
    torch._dynamo.reset()
    check_compiled("eager", (4,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_compiled_model_with_ignored_rows_has_the_eager_loss():
    torch._dynamo.reset()
    check_compiled("inductor", (0, 4, 9, 15))  # it changes between steps; at last all rows are ignored
