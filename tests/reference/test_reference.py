"""The reference against F.cross_entropy and against the reductions written out by hand."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F  # noqa: N812

from nextquill import reference
from tests.helpers import assert_close, make_case
from tests.oracle import cross_entropy, logits

IDS = torch.tensor([4, 0, 0, 1, 4]).repeat(6)


def test_token_nll_is_cross_entropy():
    case = make_case(30, 6, 11, dtype=torch.float64)
    z = logits(case.factual, case.weight, case.bias, 0.5, 3.0)
    expected = F.cross_entropy(z, case.labels, reduction="none")
    actual = reference.linear_token_nll(
        case.factual, case.weight, case.labels, bias=case.bias, logit_scale=0.5, softcap=3.0
    )
    assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("shape", [(30,), (5, 6)], ids=["flat", "batched"])
def test_pair_nll_is_three_cross_entropies_in_the_labels_shape(shape):
    case = make_case(30, 6, 11, dtype=torch.float64).view(*shape)
    pair = reference.linear_pair_nll(*case.pair_args)
    z1, z0 = (h.reshape(30, 6) @ case.weight.T for h in (case.factual, case.counterfactual))
    for actual, z in zip(pair, (z1, z0, z1 - z0), strict=True):
        assert actual.shape == shape
        assert_close(actual.flatten(), F.cross_entropy(z, case.labels.flatten(), reduction="none"), 1e-13)


def test_pair_stats_are_torchs_divergence_and_entropy():
    case = make_case(30, 6, 11, dtype=torch.float64)
    stats = reference.linear_pair_stats(*case.pair_args, bias=case.bias)
    z1, z0 = (logits(h, case.weight, case.bias) for h in (case.factual, case.counterfactual))
    keep = case.labels != -100
    first, second = (Categorical(logits=z) for z in (z1, z0))
    assert_close(stats.kl, keep * kl_divergence(first, second), 1e-12)
    assert_close(stats.entropy, keep * first.entropy(), 1e-12)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_pair_jsd_is_torchs_divergences_from_the_mixture(beta):
    case = make_case(30, 6, 11, dtype=torch.float64).leaves()
    jsd = reference.linear_pair_jsd(*case.pair_args, bias=case.bias, beta=beta)
    student, teacher = (
        Categorical(logits=logits(h, case.weight, case.bias)) for h in (case.factual, case.counterfactual)
    )
    mixture = Categorical(probs=beta * teacher.probs + (1 - beta) * student.probs)
    weight0, weight1 = (beta, 1 - beta) if beta == 0.3 else (1 - beta, beta)
    truth = weight0 * kl_divergence(teacher, mixture) + weight1 * kl_divergence(student, mixture)
    assert_close(jsd, (case.labels != -100) * truth, 1e-12)
    assert torch.equal(
        reference.linear_pair_jsd(*case.pair_args[:3], case.labels != -100, bias=case.bias, beta=beta), jsd
    )
    jsd.sum().backward()
    assert case.counterfactual.grad is None


def test_a_masked_column_adds_nothing_to_jsd_and_its_gradient():
    case = make_case(30, 6, 11, dtype=torch.float64).leaves("factual", "weight")
    case.bias[3] = -torch.inf
    reference.linear_pair_jsd(*case.pair_args, bias=case.bias).sum().backward()
    assert torch.isfinite(case.factual.grad).all()
    assert not case.weight.grad[3].any()


def test_ignored_rows_are_zero_whatever_they_hold():
    case = make_case(30, 6, 11)
    ignored = case.labels == -100
    case.factual[ignored] = torch.nan
    pair = reference.linear_pair_nll(*case.leaves().pair_args)
    assert all(torch.equal(nll == 0, ignored) for nll in pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    case = make_case(30, 6, 11, dtype=dtype)
    nll = reference.linear_token_nll(case.factual, case.weight, case.labels)
    assert nll.dtype == torch.float32
    assert_close(nll, reference.linear_token_nll(case.factual.double(), case.weight.double(), case.labels))


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "normalized"])
@pytest.mark.parametrize("weighted_effect", [False, True], ids=["official", "paper"])
@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
def test_reductions_written_out(reduction, weighted_effect, normalize):
    case, alpha, anchor = make_case(30, 6, 11, dtype=torch.float64), 0.3, 0.2
    weights = torch.rand(30, dtype=torch.float64) + 0.1
    z1, z0 = (logits(h, case.weight, None) for h in (case.factual, case.counterfactual))
    keep = (case.labels != -100).nonzero().flatten().tolist()
    groups = {i: [r for r in keep if IDS[r] == i] for i in IDS.unique().tolist()}
    if reduction != "sequence":
        groups = {0: keep}
    expected = 0.0
    for rows in groups.values():
        y, w = case.labels[rows], weights[rows]
        nll_f, nll_c, nll_e = (cross_entropy(z[rows], y) for z in (z1, z0, z1 - z0))
        total = w.sum() if normalize and reduction != "token" else float(len(rows))
        effect = (w * nll_e).sum() / total if weighted_effect else nll_e.sum() / len(rows)
        expected += ((w * nll_f).sum() / total + alpha * effect + anchor * nll_c.mean()) / len(groups)
    actual = reference.pair_loss(
        *case.pair_args, token_weights=weights, normalize_weights=normalize, alpha=alpha, anchor=anchor,
        weighted_effect=weighted_effect, reduction=reduction, sequence_ids=IDS,
    )  # fmt: skip
    assert_close(actual, expected, 1e-13)


def test_batch_without_a_supervised_row_is_zero():
    case = make_case(6, 4, 5, ignored=1.0).leaves()
    loss = reference.pair_loss(*case.pair_args, token_weights=torch.ones(6), normalize_weights=True)
    loss.backward()
    assert loss == 0
    assert not case.weight.grad.any()
