"""Given token weights: every implementation against float64, divided batches, compilation, and refusals."""

import pytest
import torch

import nextquill as nq
from nextquill import reference
from nextquill.ops import loss_operator
from nextquill.ops.dispatch import why_not
from nextquill.ops.loss_operator import pair_loss_operator
from tests.helpers import FLOAT64_RELATIVE, assert_close, assert_same_gradients, make_case

REDUCTIONS = ("sequence", "token", "micro_batch")
LOSSES = {
    "NextQuill": nq.NextQuillLoss,
    "NextQuill-paper": lambda **o: nq.NextQuillLoss(weighted_effect=True, **o),
    "NextQuill-detached": lambda **o: nq.NextQuillLoss(detach_counterfactual=True, **o),
    "NextQuill-anchored": lambda **o: nq.NextQuillLoss(anchor=0.3, **o),
    "NextQuill-plain": lambda **o: nq.NextQuillLoss(alpha=0.0, **o),
    "PerCE": nq.PerCELoss,
    "LongCE": nq.LongCELoss,
    "SFT": nq.SFTLoss,
    # Reads the effect, and whole sequences, neither of which given weights need.
    "user": lambda **o: nq.PairLoss(lambda p: p.effect / p.effect.max(), normalize_weights=True, **o),
}
TERMS = ("NextQuill", "NextQuill-paper", "NextQuill-detached", "NextQuill-anchored")
losses = pytest.mark.parametrize("name", LOSSES)
single = pytest.mark.parametrize("name", [name for name in LOSSES if name not in TERMS])
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def weighted_case(dtype=torch.float32):
    """Interleaved sequences with ignored rows, whose weights are NaN. One sequence has only weights of 0."""
    case = make_case(40, 12, 29, dtype=dtype)
    ids = torch.tensor([9, 2, 2, 5, 2, 9, 7, 4]).repeat(5)
    case.labels[ids == 4] = -100
    weights = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype) * 3
    weights[::7] = 0.0
    weights[ids == 7] = 0.0
    weights[case.labels == -100] = torch.nan
    return case, ids, weights


def reference_loss(loss_fn, case, ids, weights):
    """`loss_fn` by nextquill.reference."""
    objective = loss_fn.objective
    weights = torch.where(case.labels == -100, 0.0, weights.double())
    return reference.pair_loss(
        *case.pair_args,
        token_weights=weights,
        normalize_weights=objective.normalize_weights,
        alpha=objective.alpha,
        weighted_effect=objective.weighted_effect,
        detach_counterfactual=loss_fn.detaches_counterfactual,
        anchor=objective.anchor,
        reduction=objective.reduction,
        sequence_ids=ids,
        bias=case.bias,
    )


def without_empty_sequence(case, ids, weights):
    """The case without the sequence whose Σw is 0, as the reference divides by it."""
    keep = ids != 7
    return case.take(keep), ids[keep], weights[keep]


@pytest.mark.covering(2)
@losses
@reductions
@pytest.mark.parametrize(
    ("impl", "chunk_bytes"),
    [("torch", None), ("torch", 5 * 29 * 4), ("native", 5 * 29 * 4), ("triton", 5 * 29 * 4)],
    ids=["torch-one-chunk", "torch", "native", "triton"],
)
def test_loss_and_gradients_match_float64(name, reduction, impl, chunk_bytes):
    if reason := why_not(impl, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    loss_fn = LOSSES[name](reduction=reduction, impl=impl, chunk_bytes=chunk_bytes)
    case, ids, weights = without_empty_sequence(*weighted_case())
    actual, exact = case.leaves(), case.double()
    output = loss_fn.compute(*actual.pair_args, actual.bias, ids, None, weights)
    output.loss.backward()
    truth = reference_loss(loss_fn, exact, ids, weights)
    truth.backward()
    assert_close(output.loss, truth)
    assert_same_gradients(actual, exact)
    supervised = case.labels != -100
    assert torch.equal(output.token_weights[supervised], weights[supervised])
    assert not output.token_weights[~supervised].any()
    assert_close(output.token_loss.sum(), truth, 1e-5)


@single
@reductions
def test_no_counterfactual_is_needed_without_a_term_that_reads_it(name, reduction):
    loss_fn = LOSSES[name](reduction=reduction)
    case, ids, weights = weighted_case(torch.float64)
    with_it, without = case.leaves("factual", "weight", "bias"), case.leaves("factual", "weight", "bias")
    expected = loss_fn(*with_it.pair_args, with_it.bias, ids, token_weights=weights)
    output = loss_fn.compute(
        without.factual, None, without.weight, without.labels, without.bias, ids, token_weights=weights
    )
    expected.backward()
    output.loss.backward()
    assert float(expected.detach()) > 0
    assert_close(output.loss, expected, FLOAT64_RELATIVE)
    assert_same_gradients(without, with_it, FLOAT64_RELATIVE)
    assert output.pair_nll.counterfactual is None


@pytest.mark.parametrize("name", TERMS)
def test_terms_need_the_counterfactual_still(name):
    case, ids, weights = weighted_case()
    with pytest.raises(nq.ArgumentTypeError, match="hidden_counterfactual: NextQuillLoss expects a tensor, got None"):
        LOSSES[name]()(case.factual, None, case.weight, case.labels, case.bias, ids, token_weights=weights)


@losses
@reductions
def test_the_weightings_own_weights_given_change_nothing(name, reduction):
    loss_fn = LOSSES[name](reduction=reduction)
    case, ids, _ = weighted_case(torch.float64)
    own, given = case.leaves(), case.leaves()
    expected = loss_fn.compute(*own.pair_args, own.bias, ids)
    expected.loss.backward()
    loss = loss_fn(*given.pair_args, given.bias, ids, token_weights=expected.token_weights)
    loss.backward()
    assert_close(loss, expected.loss, FLOAT64_RELATIVE)
    assert_same_gradients(given, own, FLOAT64_RELATIVE)


@losses
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_any_split_of_the_batch_gives_the_same_loss(name, reduction):
    """The batch is divided by sequence, and its rows stand in another order."""
    loss_fn = LOSSES[name](reduction=reduction)
    case, ids, weights = weighted_case(torch.float64)
    whole, split = case.leaves(), case.leaves()
    loss = loss_fn(*whole.pair_args, whole.bias, ids, token_weights=weights)
    loss.backward()
    items = len(ids[case.labels != -100].unique()) if reduction == "sequence" else int((case.labels != -100).sum())
    total = 0.0
    for sequence in ids.unique():
        rows = (ids == sequence).nonzero().flatten().flip(0)
        part = split.take(rows)
        total = total + loss_fn(*part.pair_args, split.bias, ids[rows], items, weights[rows])
    total.backward()
    assert_close(total, loss, FLOAT64_RELATIVE)
    assert_same_gradients(split, whole, FLOAT64_RELATIVE)


def test_given_weights_need_neither_effects_nor_whole_sequences(monkeypatch):
    """The weighting reads both."""
    engines, own = [], loss_operator.PairLossEngine
    monkeypatch.setattr(loss_operator, "PairLossEngine", lambda *a, **k: engines.append(own(*a, **k)) or engines[-1])
    loss_fn = nq.PairLoss(lambda p: p.effect / p.effect.max())
    case, ids, weights = weighted_case()
    for given in (None, weights):
        output = loss_fn.compute(*case.pair_args, case.bias, ids, None, given, effect_nll=False)
        assert (output.pair_nll.effect is None) is (given is not None)
    found = [(engine.effect, engine.objective.needs_whole_sequences) for engine in engines]
    assert found == [(True, True), (False, False)]


def test_rows_of_two_dimensions():
    case, _, weights = weighted_case(torch.float64)
    flat, square = case.leaves(), case.view(5, 8)
    expected = nq.PerCELoss()(*flat.pair_args, flat.bias, torch.arange(40) // 8, token_weights=weights)
    output = nq.PerCELoss().compute(*square.pair_args, square.bias, token_weights=weights.view(5, 8))
    assert_close(output.loss, expected, FLOAT64_RELATIVE)
    assert output.token_weights.shape == (5, 8)


def test_weights_all_zero_give_zero():
    case, ids, weights = weighted_case()
    case = case.leaves()
    loss = nq.NextQuillLoss(alpha=0.0)(*case.pair_args, case.bias, ids, token_weights=torch.zeros_like(weights))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not case.factual.grad.any()


def test_nothing_supervised_gives_zero():
    case, ids, weights = weighted_case()
    case.labels.fill_(-100)
    case = case.leaves()
    loss = nq.PerCELoss()(case.factual, None, case.weight, case.labels, case.bias, ids, token_weights=weights)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not case.factual.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_floating_dtype(dtype):
    case, ids, weights = weighted_case()
    weights = weights.to(dtype)
    expected = nq.PerCELoss()(*case.pair_args, case.bias, ids, token_weights=weights.float())
    assert torch.equal(nq.PerCELoss()(*case.pair_args, case.bias, ids, token_weights=weights), expected)


# ---- what is refused -------------------------------------------------------------------------------

WRONG = {
    "a list": (lambda w: w.tolist(), nq.ArgumentTypeError, "expected a tensor, got list"),
    "integers": (lambda w: w.nan_to_num().long(), nq.ArgumentTypeError, "expected a floating dtype, got torch.int64"),
    "short": (lambda w: w[1:], nq.ArgumentError, r"expected the labels' shape \[40\], got \[39\]"),
    "another device": (lambda w: w.to("meta"), nq.ArgumentError, "expected a tensor with values"),
    "gradient": (lambda w: w.clone().requires_grad_(), nq.ArgumentError, "expected constants"),
}
BAD = {"negative": -0.5, "nan": torch.nan, "infinite": torch.inf}


@pytest.mark.parametrize("wrong", WRONG)
def test_unusable_weights_are_refused(wrong):
    case, ids, weights = weighted_case()
    change, error, message = WRONG[wrong]
    with pytest.raises(error, match=f"token_weights: {message}"):
        nq.PerCELoss()(*case.pair_args, case.bias, ids, token_weights=change(weights))


@pytest.mark.parametrize("bad", BAD)
def test_unusable_values_are_refused_where_labels_count(bad):
    case, ids, weights = weighted_case()
    position = int((case.labels != -100).nonzero()[3])
    weights[position] = BAD[bad]
    with pytest.raises(nq.ArgumentError, match=f"token_weights: expected finite .* at flat position {position}"):
        nq.PerCELoss()(*case.pair_args, case.bias, ids, token_weights=weights)


# ---- the operator ----------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "single"])
def test_opcheck(paired):
    case, ids, weights = weighted_case()
    case = case.leaves()
    loss_fn = nq.NextQuillLoss() if paired else nq.PerCELoss()
    counterfactual = case.counterfactual if paired else None
    tensors = (case.factual, counterfactual, case.weight, case.bias, case.labels, ids, torch.tensor(2.0), weights)
    needs = [True, paired, True, True]
    torch.library.opcheck(
        pair_loss_operator,
        (*tensors, loss_fn._objective_spec, False, needs, -100, 3.0, 0.5, "torch", None, None, None),
    )


@pytest.mark.parametrize("name", ["NextQuill", "PerCE", "user"])
def test_compiled(name):
    torch._dynamo.reset()
    loss_fn = LOSSES[name]()
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True, dynamic=True)
    case, ids, weights = weighted_case()
    for rows in (slice(0, 24), slice(0, 40)):
        part = case.take(torch.arange(40)[rows])
        eager, traced = part.leaves(), part.leaves()
        expected = loss_fn(*eager.pair_args, eager.bias, ids[rows], None, weights[rows])
        loss = compiled(*traced.pair_args, traced.bias, ids[rows], None, weights[rows])
        expected.backward()
        loss.backward()
        assert_close(loss, expected, 1e-6)
        assert_same_gradients(traced, eager, 1e-6)


def test_under_autocast():
    case, ids, weights = weighted_case()
    expected = nq.PerCELoss()(*case.pair_args, case.bias, ids, token_weights=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nq.PerCELoss()(*case.pair_args, case.bias, ids, token_weights=weights)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 2**-7)


def test_weights_made_in_inference_mode():
    case, ids, weights = weighted_case()
    with torch.inference_mode():
        weights = weights * 1.0
    case = case.leaves()
    nq.PerCELoss()(*case.pair_args, case.bias, ids, token_weights=weights).backward()
    assert bool(case.factual.grad.any())


@pytest.mark.gpu
def test_the_device_is_read_once(monkeypatch):
    device = torch.device("cuda")
    case, ids, weights = weighted_case()
    tensors = [t.to(device) for t in (case.factual, case.weight, case.labels, case.bias, ids, weights)]
    hidden, head, labels, bias, ids, weights = tensors
    hidden.requires_grad_()
    loss_fn = nq.PerCELoss(impl="triton")
    call = lambda: loss_fn(hidden, None, head, labels, bias, ids, token_weights=weights).backward()  # noqa: E731
    call()  # compiles
    plan = loss_operator.plan_rows(labels, ids, -100, 29, weights)
    monkeypatch.setattr(loss_operator, "plan_rows", lambda *_: plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
