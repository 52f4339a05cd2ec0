"""The registered operators: PyTorch's own checks, compiled graphs, autocast, and shared memory."""

import copy
import dataclasses
import gc
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import nextquill as nq
from nextquill.ops.loss_operator import pair_loss_operator
from nextquill.ops.nll_operators import (
    pair_jsd,
    pair_jsd_backward,
    pair_nll,
    pair_nll_backward,
    pair_stats,
    token_nll,
    token_nll_backward,
)
from nextquill.ops.objective_spec import decode
from tests.helpers import HeadCase, assert_close, make_case, relative_error, run_python

OPTIONS = (-100, 3.0, 0.5, "torch", None, None, None)
LOSSES = {
    "NextQuill": nq.NextQuillLoss(),
    "detached": nq.NextQuillLoss(detach_counterfactual=True),
    "PerCE": nq.PerCELoss(),
    "SFT": nq.SFTLoss(),
    "MIRROR": nq.MirrorLoss(0.3),
}
# All, none, and two that differ in every gradient; the others are slow.
FEW = ["gggg", "----", "g-g-", "-g-g"]
subsets = pytest.mark.parametrize(
    "needs",
    [
        pytest.param(needs, id=name, marks=() if name in FEW else pytest.mark.slow)
        for needs in itertools.product([True, False], repeat=4)
        for name in ["".join("-g"[x] for x in needs)]
    ],
)


def leaves(needs, dtype=torch.float32):
    names = [name for name, need in zip(("factual", "counterfactual", "weight", "bias"), needs, strict=True) if need]
    return make_case(12, 5, 11, dtype=dtype).leaves(*(names or ["none"]))


@subsets
def test_opcheck_of_the_pair_operator(needs):
    case = leaves(needs)
    torch.library.opcheck(pair_nll, (case.factual, case.counterfactual, case.weight, case.bias, case.labels, *OPTIONS))


@subsets
def test_opcheck_of_the_loss_operator(needs):
    case, loss = leaves(needs), LOSSES["NextQuill"]
    tensors = (case.factual, case.counterfactual, case.weight, case.bias, case.labels, None, None, None)
    torch.library.opcheck(pair_loss_operator, (*tensors, loss._objective_spec, True, list(needs), *OPTIONS))


@subsets
def test_opcheck_of_the_divergence(needs):
    case = leaves(needs)
    tensors = (case.factual, case.counterfactual, case.weight, case.bias, case.labels != -100)
    torch.library.opcheck(pair_jsd, (*tensors, 0.3, *OPTIONS[1:]))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck_of_each_loss(name, dtype):
    loss, case = LOSSES[name], leaves([True] * 4, dtype)
    counterfactual = None if name == "SFT" else case.counterfactual
    needs = [True, counterfactual is not None, True, True]
    ids = torch.arange(12) // 4
    tensors = (case.factual, counterfactual, case.weight, case.bias, case.labels, ids, torch.tensor(2.0), None)
    # Two half-precision results are compared by torch's own tolerance for the dtype.
    torch.library.opcheck(pair_loss_operator, (*tensors, loss._objective_spec, False, needs, *OPTIONS))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck_of_the_single_stream_and_of_the_statistics(bias):
    case = leaves([True] * 4)
    b = case.bias if bias else None
    torch.library.opcheck(token_nll, (case.factual, case.weight, b, case.labels, *OPTIONS))
    detached = (case.factual.detach(), case.counterfactual.detach(), case.weight.detach(), None, case.labels)
    torch.library.opcheck(pair_stats, (*detached, *OPTIONS))


class Model(nn.Module):
    """Embeddings, a layer, a head, and one of the public functions at the end."""

    def __init__(self, end):
        super().__init__()
        self.embed, self.mix, self.head, self.end = nn.Embedding(37, 16), nn.Linear(16, 16), nn.Linear(16, 37), end

    def forward(self, factual, counterfactual, labels):
        h1, h0 = (torch.tanh(self.mix(self.embed(ids))) for ids in (factual, counterfactual))
        if self.end == "token":
            return nq.linear_token_nll(h1, self.head.weight, labels, bias=self.head.bias).mean()
        if self.end == "pair":
            pair = nq.linear_pair_nll(h1, h0, self.head.weight, labels, bias=self.head.bias)
            return (pair.factual + 0.3 * pair.effect + pair.effect_prob).mean()
        if self.end == "divergence":
            return nq.linear_pair_jsd(h1, h0, self.head.weight, labels, bias=self.head.bias, beta=0.3).mean()
        if self.end == "no-grad":
            with torch.no_grad():
                h0 = h0 * 1.0
            return LOSSES["PerCE"](h1, h0, self.head.weight, labels, self.head.bias)
        return self.end(h1, h0, self.head.weight, labels, self.head.bias)


ENDS = {
    "token": "token",
    "pair": "pair",
    "no-grad": "no-grad",
    "divergence": "divergence",
    **LOSSES,
    "user": nq.PairLoss(lambda p: p.factual.detach(), alpha=0.1),
    "micro-batch": nq.NextQuillLoss(reduction="micro_batch"),
}
# One of each operator, one of them with gradient through one pass; the others are slow.
ends = pytest.mark.parametrize(
    "end",
    [
        pytest.param(
            end,
            id=name,
            marks=() if name in ("pair", "no-grad", "divergence", "NextQuill", "MIRROR") else pytest.mark.slow,
        )
        for name, end in ENDS.items()
    ],
)


def step(function, model, batch):
    model.zero_grad()
    loss = function(*batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def batches(*lengths):
    for length in lengths:
        factual, counterfactual, labels = (torch.randint(37, (3, length)) for _ in range(3))
        labels[0, : length - 2] = -100
        yield factual, counterfactual, labels


@ends
def test_one_graph_over_changing_row_counts(end):
    torch._dynamo.reset()
    model, backend = Model(end), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for batch in batches(5, 7, 9, 12):
        for actual, expected in zip(step(compiled, model, batch), step(model, model, batch), strict=True):
            assert torch.equal(actual, expected)
    assert backend.frame_count == 1


@ends
def test_traced_forward_and_backward_are_the_eager_ones(end):
    """aot_eager also traces the backward, and decides itself which tensors are saved."""
    torch._dynamo.reset()
    model = Model(end)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in batches(5, 8):
        for actual, expected in zip(step(compiled, model, batch), step(model, model, batch), strict=True):
            assert_close(actual, expected, 1e-6)


def test_traced_under_autocast():
    torch._dynamo.reset()
    model = Model(LOSSES["NextQuill"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches(6):
            results = zip(step(compiled, model, batch), step(model, model, batch), strict=True)
            # The layers before ours round in bfloat16, in another order.
            assert all(relative_error(actual, expected) < 2**-7 for actual, expected in results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@ends
def test_inductor_compiled_step_is_the_eager_one(end):
    torch._dynamo.reset()
    model = Model(end)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in batches(5, 8):
        for actual, expected in zip(step(compiled, model, batch), step(model, model, batch), strict=True):
            assert_close(actual, expected, 1e-5)


def test_a_label_out_of_range_is_an_error_in_compiled_code_too():
    torch._dynamo.reset()
    compiled = torch.compile(Model("pair"), backend="eager", fullgraph=True)
    factual, counterfactual, labels = next(batches(5))
    labels[1, 1] = 37
    with pytest.raises(nq.ArgumentError, match="got 37"):
        compiled(factual, counterfactual, labels)


def test_autocast_reaches_the_operator_itself():
    """Called through torch.ops, without our checks, with float32 weights and bfloat16 hidden states."""
    case = make_case(12, 5, 11)
    arguments = (
        case.factual.bfloat16(),
        case.weight,
        case.bias,
        case.labels,
        -100,
        None,
        1.0,
        "torch",
        None,
        None,
        None,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = torch.ops.nextquill.token_nll(*arguments)
    wide = case.factual.bfloat16().float()
    expected = nq.linear_token_nll(wide, case.weight, case.labels, bias=case.bias, impl="torch")
    assert torch.equal(nll, expected)


def test_autocast_reaches_the_divergence():
    case = make_case(12, 5, 11)
    counts = case.labels != -100
    streams = case.factual.bfloat16(), case.counterfactual.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        jsd = torch.ops.nextquill.pair_jsd(
            *streams, case.weight, None, counts, 0.5, None, 1.0, "torch", None, None, None
        )
        public = nq.linear_pair_jsd(*streams, case.weight, counts, impl="torch")
    expected = nq.linear_pair_jsd(*(stream.float() for stream in streams), case.weight, counts, impl="torch")
    assert torch.equal(jsd, expected)
    assert torch.equal(public, expected)


def test_results_share_no_memory():
    case = make_case(12, 5, 11).leaves()
    pair = nq.linear_pair_nll(*case.pair_args)
    assert len({nll.untyped_storage().data_ptr() for nll in pair}) == 3


def test_only_inputs_are_saved():
    """No tensor of the logits' size is kept for the backward."""
    case, saved = make_case(12, 5, 300).leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nq.linear_pair_nll(*case.pair_args, bias=case.bias)
        mask = case.labels != -100
        nq.linear_pair_jsd(*case.pair_args[:3], mask, bias=case.bias)
    inputs = {t.data_ptr() for t in (*case.tensors.values(), case.labels)}
    others = [t for t in saved if t.data_ptr() not in inputs]
    assert [(tuple(t.shape), t.dtype) for t in others] == [((12,), torch.bool)]


def test_a_copy_of_a_loss_outlives_the_original():
    case = make_case(12, 5, 11)
    original = nq.PairLoss(half_weighting, alpha=0.3)
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    expected, spec = original(*case.pair_args), original._objective_spec
    assert len({spec, *(c._objective_spec for c in copies)}) == 3
    del original
    gc.collect()
    with pytest.raises(nq.ArgumentError, match=r"^objective: .*own"):
        decode(spec)
    assert all(torch.equal(c(*case.pair_args), expected) for c in copies)


def half_weighting(pair):
    return 0.5 * torch.ones_like(pair.factual)


def test_equal_published_losses_are_one_to_the_compiler():
    specs = {nq.NextQuillLoss(alpha=0.3)._objective_spec for _ in range(3)}
    assert len(specs) == 1
    assert decode(specs.pop()) == nq.NextQuillLoss(alpha=0.3).objective
    assert nq.NextQuillLoss()._objective_spec != nq.NextQuillLoss(detach_counterfactual=True)._objective_spec


def test_a_divergence_has_no_other_terms():
    objective = nq.MirrorLoss(0.3).objective
    for change in ({"alpha": 0.5}, {"anchor": 0.1}, {"detach_counterfactual": False}):
        with pytest.raises(nq.ArgumentError, match=r"^jsd_beta: expected detach_counterfactual=True, alpha=0 and anc"):
            dataclasses.replace(objective, **change)


def test_the_objective_may_be_replaced():
    case, loss_fn = make_case(12, 5, 11), nq.NextQuillLoss()
    loss_fn.objective = dataclasses.replace(loss_fn.objective, alpha=5.0)
    output = loss_fn.compute(*case.pair_args)
    assert torch.equal(output.loss, nq.NextQuillLoss(alpha=5.0)(*case.pair_args))
    assert_close(output.token_loss.sum(), output.loss, 1e-6)


CACHED = """
import sys, torch
import nextquill as nq
torch.manual_seed(0)
h1, h0, w = (torch.randn(n, 6).requires_grad_() for n in (12, 12, 33))
y = torch.randint(33, (12,))
loss_fn = {"detached": nq.NextQuillLoss(detach_counterfactual=True), "both": nq.NextQuillLoss()}[sys.argv[1]]
torch.compile(lambda a, b, c: loss_fn(a, b * 2, c, y), fullgraph=True)(h1, h0, w).backward()
print(h0.grad is not None and bool(h0.grad.any()))
"""


@pytest.mark.slow
def test_a_graph_from_the_compilers_cache_is_that_of_the_same_loss(tmp_path, monkeypatch):
    """The on-disk cache finds a graph by its arguments, so two objectives must not look equal in two processes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = {name: run_python(CACHED, name).strip() for name in ("detached", "both")}
    assert found == {"detached": "False", "both": "True"}


def test_an_exported_program_keeps_its_loss():
    class Loss(nn.Module):
        def __init__(self, loss_fn):
            super().__init__()
            self.loss_fn = loss_fn

        def forward(self, h1, h0, weight, labels):
            return self.loss_fn(h1, h0, weight, labels)

    case = make_case(12, 5, 11)
    exported = torch.export.export(Loss(nq.NextQuillLoss(alpha=0.7)), case.pair_args)
    assert torch.equal(exported.module()(*case.pair_args), nq.NextQuillLoss(alpha=0.7)(*case.pair_args))


def test_num_items_may_change_between_compiled_calls():
    torch._dynamo.reset()
    case, backend = make_case(12, 5, 11), CompileCounterWithBackend("eager")
    loss_fn = nq.NextQuillLoss()
    compiled = torch.compile(lambda n: loss_fn(*case.pair_args, num_items_in_batch=n), backend=backend, fullgraph=True)
    for items in (2, 3, 4, 5):
        assert_close(compiled(items), loss_fn(*case.pair_args) / items, 1e-6)
    assert backend.frame_count <= 2
    with pytest.raises(nq.ArgumentError, match=r"^num_items_in_batch: "):
        compiled(torch.tensor(-2.0))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_of_the_backward_operators(layout):
    """For a head stored as [D, V], the gradient has the strides of the fake result."""
    case = make_case(12, 5, 11)
    weight = case.weight if layout == "contiguous" else case.weight.T.contiguous().T
    grads, needs = torch.randn(3, 12), [True] * 4
    tail = (*OPTIONS[:3], "torch", None, None, None)
    torch.library.opcheck(
        pair_nll_backward,
        (*grads, case.factual, case.counterfactual, weight, case.bias, case.labels, needs, *tail),
    )
    torch.library.opcheck(
        token_nll_backward, (grads[0], case.factual, weight, case.bias, case.labels, needs[:3], *tail)
    )
    tensors = (case.factual, case.counterfactual, weight, case.bias, case.labels != -100)
    torch.library.opcheck(pair_jsd_backward, (grads[0], *tensors, needs, 0.3, *tail[1:]))
    tensors = (case.factual, case.counterfactual, weight, case.bias, case.labels, None, None, None)
    spec = LOSSES["NextQuill"]._objective_spec
    torch.library.opcheck(pair_loss_operator, (*tensors, spec, True, needs, *OPTIONS))


def test_streams_of_two_dtypes_under_autocast_meet_in_the_wider_one():
    """h1 comes from inside the region and h0 from outside. Neither of them is rounded, nor its gradient."""
    case = make_case(12, 5, 11)
    own, exact = case.leaves(), case.double()
    own.factual = case.factual.bfloat16().requires_grad_()
    exact.factual = own.factual.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = nq.linear_pair_nll(own.factual, own.counterfactual, own.weight, own.labels)
        loss = nq.NextQuillLoss()(own.factual, own.counterfactual, own.weight, own.labels)
    (sum(nll.sum() for nll in pair) + loss).backward()
    truth = nq.linear_pair_nll(*exact.pair_args)
    (sum(nll.sum() for nll in truth) + nq.NextQuillLoss()(*exact.pair_args)).backward()
    for actual, expected in zip(pair, truth, strict=True):
        assert_close(actual, expected)
    assert_close(own.counterfactual.grad, exact.counterfactual.grad)
    assert own.factual.grad.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_derivatives_that_do_not_exist_are_refused():
    case = make_case(12, 5, 11)
    function = lambda h: nq.NextQuillLoss()(h, case.counterfactual, case.weight, case.labels)  # noqa: E731
    with pytest.raises(nq.GradientError, match=r"torch\.func"):
        torch.func.grad(function)(case.factual)
    with pytest.raises(nq.GradientError, match=r"torch\.func|forward-mode"):
        torch.func.jvp(function, (case.factual,), (case.factual,))
    with forward_ad.dual_level(), pytest.raises(nq.GradientError, match="forward-mode"):
        function(forward_ad.make_dual(case.factual, case.factual))


def test_several_upstream_gradients_at_once_are_refused():
    case = make_case(12, 5, 11).leaves()
    pair, loss = nq.linear_pair_nll(*case.pair_args), nq.NextQuillLoss()(*case.pair_args)
    token, jsd = nq.linear_token_nll(case.factual, case.weight, case.labels), nq.linear_pair_jsd(*case.pair_args)
    for result in (token, jsd, pair.factual, loss):
        batch = torch.ones(3, *result.shape)
        with pytest.raises(nq.GradientError, match=r"^is_grads_batched: .*one upstream gradient at a time"):
            torch.autograd.grad(result, case.factual, batch, is_grads_batched=True, retain_graph=True)
        with pytest.raises(nq.GradientError, match=r"^is_grads_batched: "):
            torch.vmap(lambda g: torch.autograd.grad(result, case.factual, g, retain_graph=True)[0])(batch)  # noqa: B023
        torch.autograd.grad(result, case.factual, batch[0])


def test_values_that_only_a_compiler_sees():
    """Fake tensors pass the checks of the tensors that they stand for, also on the meta device."""
    for device in ("cpu", "meta"):
        with FakeTensorMode():
            case = make_case(12, 5, 11)
            case = HeadCase(*(t.to(device) for t in (*case.tensors.values(), case.labels))).leaves()
            loss = nq.NextQuillLoss()(*case.pair_args, case.bias)
            loss.backward()
        assert loss.shape == ()
        assert case.weight.grad.shape == (11, 5)


def test_a_counterfactual_from_inference_mode():
    case = make_case(12, 5, 11).leaves("factual", "weight")
    with torch.inference_mode():
        h0 = case.counterfactual * 1.0
    nq.linear_pair_nll(case.factual, h0, case.weight, case.labels).factual.sum().backward()
    nq.linear_pair_jsd(case.factual, h0, case.weight, case.labels).sum().backward()
    nq.PerCELoss()(case.factual, h0, case.weight, case.labels).backward()
    assert torch.isfinite(case.factual.grad).all()
