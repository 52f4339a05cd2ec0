"""Bad input: a typed error that names the argument, before any work is done."""

import math

import pytest
import torch

import nextquill as nq
from nextquill.weighting import ClipWeighting, ExpClipWeighting, ThresholdWeighting
from tests.helpers import make_case

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

VALUE, TYPE = nq.ArgumentError, nq.ArgumentTypeError


def arguments():
    case = make_case(6, 4, 5)
    return {
        "hidden_factual": case.factual,
        "hidden_counterfactual": case.counterfactual,
        "lm_head_weight": case.weight,
        "labels": torch.tensor([0, 1, 2, 3, 4, -100]),
        "bias": case.bias,
    }


# (argument, what makes it wrong, error, words of the message)
TENSOR_CASES = {
    "label-below": ("labels", lambda t: t.index_fill(0, torch.tensor([2]), -1), VALUE, "got -1 at flat position 2"),
    "label-above": ("labels", lambda t: t.index_fill(0, torch.tensor([3]), 5), VALUE, "got 5 at flat position 3"),
    "label-far": ("labels", lambda t: t.index_fill(0, torch.tensor([0]), 2**40), VALUE, r"\[0, 5\)"),
    "labels-float": ("labels", lambda t: t.float(), TYPE, "torch.float32"),
    "labels-bool": ("labels", lambda t: t > 0, TYPE, "torch.bool"),
    "labels-complex": ("labels", lambda t: t.to(torch.complex64), TYPE, "torch.complex64"),
    "labels-list": ("labels", lambda t: t.tolist(), TYPE, "list"),
    "labels-short": ("labels", lambda t: t[:-1], VALUE, r"\[6\].*\[5\]"),
    "labels-2d": ("labels", lambda t: t.view(2, 3), VALUE, r"\[2, 3\]"),
    "labels-meta": ("labels", lambda t: t.to("meta"), VALUE, "got one on the meta device"),
    "labels-sparse": ("labels", lambda t: t.to_sparse(), TYPE, r"got layout torch\.sparse_coo; .*\.to_dense"),
    "hidden-1d": ("hidden_factual", lambda t: t[0], VALUE, r"\[N, D\] or \[B, T, D\]"),
    "hidden-4d": ("hidden_factual", lambda t: t[None, None], VALUE, r"\[1, 1, 6, 4\]"),
    "hidden-width": ("hidden_factual", lambda t: t[:, :3], VALUE, "last dimension 4"),
    "hidden-int": ("hidden_factual", lambda t: t.long(), TYPE, "torch.int64"),
    "hidden-none": ("hidden_factual", lambda _: None, TYPE, "NoneType"),
    "other-short": ("hidden_counterfactual", lambda t: t[:-1], VALUE, r"\[5, 4\]"),
    "other-dtype": ("hidden_counterfactual", lambda t: t.double(), TYPE, "torch.float64"),
    "hidden-sparse": ("hidden_factual", lambda t: t.to_sparse(), TYPE, r"got layout torch\.sparse_coo"),
    "other-meta": ("hidden_counterfactual", lambda t: t.to("meta"), VALUE, "got one on the meta device"),
    "other-none": ("hidden_counterfactual", lambda _: None, TYPE, "None"),
    "weight-dtype": ("lm_head_weight", lambda t: t.bfloat16(), TYPE, "torch.bfloat16"),
    "weight-int": ("lm_head_weight", lambda t: t.int(), TYPE, "torch.int32"),
    "weight-1d": ("lm_head_weight", lambda t: t[0], VALUE, r"\[V, D\]"),
    "weight-empty": ("lm_head_weight", lambda t: t[:0], VALUE, r"\[0, 4\]"),
    "weight-meta": ("lm_head_weight", lambda t: t.to("meta"), VALUE, "got one on the meta device"),
    "weight-sparse": ("lm_head_weight", lambda t: t.to_sparse(), TYPE, r"got layout torch\.sparse_coo"),
    "weight-csr": ("lm_head_weight", lambda t: t.to_sparse_csr(), TYPE, r"got layout torch\.sparse_csr"),
    "bias-short": ("bias", lambda t: t[:-1], VALUE, r"\[5\].*\[4\]"),
    "bias-2d": ("bias", lambda t: t[None], VALUE, r"\[1, 5\]"),
    "bias-dtype": ("bias", lambda t: t.double(), TYPE, "torch.float64"),
    "bias-meta": ("bias", lambda t: t.to("meta"), VALUE, "got one on the meta device"),
    "bias-number": ("bias", lambda _: 1.0, TYPE, "float"),
}
ONE_STREAM = {key: case for key, case in TENSOR_CASES.items() if case[0] != "hidden_counterfactual"}
SPOILED = ("name", "spoil", "error", "words")
tensor_cases = pytest.mark.parametrize(SPOILED, TENSOR_CASES.values(), ids=TENSOR_CASES)


def spoiled(name, spoil):
    given = arguments()
    given[name] = spoil(given[name])
    return given


@tensor_cases
def test_pair_nll_refuses(name, spoil, error, words):
    with pytest.raises(error, match=f"^{name}: .*{words}"):
        nq.linear_pair_nll(**spoiled(name, spoil))


@tensor_cases
def test_loss_refuses(name, spoil, error, words):
    with pytest.raises(error, match=f"^{name}: .*{words}"):
        nq.NextQuillLoss()(**spoiled(name, spoil))


@pytest.mark.parametrize(SPOILED, ONE_STREAM.values(), ids=ONE_STREAM)
def test_token_nll_refuses(name, spoil, error, words):
    given = spoiled(name, spoil)
    given["hidden_states"] = given.pop("hidden_factual")
    del given["hidden_counterfactual"]
    shown = "hidden_states" if name == "hidden_factual" else name
    with pytest.raises(error, match=f"^{shown}: .*{words}"):
        nq.linear_token_nll(**given)


def test_a_call_on_the_meta_device_is_refused():
    """Its results would have shapes but no values, so a training step would change nothing."""
    given = {name: tensor.to("meta") for name, tensor in arguments().items()}
    for call in (nq.linear_pair_nll, nq.linear_pair_stats, nq.NextQuillLoss(), nq.PerCELoss().compute):
        with pytest.raises(VALUE, match=r"^hidden_.*: .*got one on the meta device"):
            call(**given)


OPTION_CASES = {
    "softcap-zero": ({"softcap": 0.0}, VALUE),
    "softcap-negative": ({"softcap": -1.0}, VALUE),
    "softcap-nan": ({"softcap": math.nan}, VALUE),
    "softcap-inf": ({"softcap": math.inf}, VALUE),
    "softcap-bool": ({"softcap": True}, TYPE),
    "softcap-text": ({"softcap": "30"}, TYPE),
    "logit_scale-zero": ({"logit_scale": 0.0}, VALUE),
    "logit_scale-nan": ({"logit_scale": math.nan}, VALUE),
    "logit_scale-inf": ({"logit_scale": math.inf}, VALUE),
    "logit_scale-none": ({"logit_scale": None}, TYPE),
    "ignore_index-float": ({"ignore_index": -100.0}, TYPE),
    "ignore_index-bool": ({"ignore_index": True}, TYPE),
    "ignore_index-none": ({"ignore_index": None}, TYPE),
    "impl-unknown": ({"impl": "cuda"}, VALUE),
    "impl-none": ({"impl": None}, VALUE),
    "impl-list": ({"impl": ["torch"]}, VALUE),
}


@pytest.mark.parametrize(("option", "error"), OPTION_CASES.values(), ids=OPTION_CASES)
def test_operators_and_losses_refuse_the_option(option, error):
    (name,) = option
    given = arguments()
    with pytest.raises(error, match=f"^{name}: "):
        nq.linear_pair_nll(**given, **option)
    with pytest.raises(error, match=f"^{name}: "):
        nq.linear_token_nll(given["hidden_factual"], given["lm_head_weight"], given["labels"], **option)
    with pytest.raises(error, match=f"^{name}: "):
        nq.NextQuillLoss(**option)


HYPER_PARAMETERS = {
    **{f"NextQuill-{name}-{bad}": (nq.NextQuillLoss, {name: bad}, VALUE, name)
       for name in ("threshold", "high_weight", "low_weight", "alpha", "anchor") for bad in (math.nan, math.inf)},
    **{f"NextQuill-{name}-negative": (nq.NextQuillLoss, {name: -0.1}, VALUE, name)
       for name in ("high_weight", "low_weight", "alpha", "anchor")},
    **{f"NextQuill-{name}-{type(bad).__name__}": (nq.NextQuillLoss, {name: bad}, TYPE, name)
       for name in ("threshold", "high_weight", "low_weight", "alpha", "anchor") for bad in ("0.1", None, True)},
    "NextQuill-low-above-high": (nq.NextQuillLoss, {"low_weight": 0.8, "high_weight": 0.2}, VALUE, "low_weight"),
    "NextQuill-all-zero": (nq.NextQuillLoss, {"low_weight": 0.0, "high_weight": 0.0}, VALUE, "high_weight"),
    "NextQuill-anchored-constant": (
        nq.NextQuillLoss, {"anchor": 0.1, "detach_counterfactual": True}, VALUE, "anchor"),
    "PerCE-min-above-max": (nq.PerCELoss, {"min_weight": 6.0}, VALUE, "min_weight"),
    "PerCE-min-negative": (nq.PerCELoss, {"min_weight": -1.0}, VALUE, "min_weight"),
    "PerCE-max-nan": (nq.PerCELoss, {"max_weight": math.nan}, VALUE, "max_weight"),
    "PerCE-max-zero": (nq.PerCELoss, {"min_weight": 0.0, "max_weight": 0.0}, VALUE, "max_weight"),
    "LongCE-max-inf": (nq.LongCELoss, {"max_weight": math.inf}, VALUE, "max_weight"),
    "LongCE-max-zero": (nq.LongCELoss, {"max_weight": 0}, VALUE, "max_weight"),
    "reduction-unknown": (nq.SFTLoss, {"reduction": "mean"}, VALUE, "reduction"),
    "reduction-none": (nq.SFTLoss, {"reduction": None}, VALUE, "reduction"),
    "reduction-list": (nq.SFTLoss, {"reduction": ["token"]}, VALUE, "reduction"),
    "chunk_bytes-zero": (nq.SFTLoss, {"chunk_bytes": 0}, VALUE, "chunk_bytes"),
    "chunk_bytes-negative": (nq.SFTLoss, {"chunk_bytes": -8}, VALUE, "chunk_bytes"),
    "chunk_bytes-float": (nq.SFTLoss, {"chunk_bytes": 1e6}, TYPE, "chunk_bytes"),
    "chunk_bytes-bool": (nq.SFTLoss, {"chunk_bytes": True}, TYPE, "chunk_bytes"),
    "weighting-none": (nq.PairLoss, {"weighting": None}, TYPE, "weighting"),
    "weighting-text": (nq.PairLoss, {"weighting": "clip"}, TYPE, "weighting"),
    "threshold-weighting": (ThresholdWeighting, {"threshold": math.nan}, VALUE, "threshold"),
    "clip-weighting": (ClipWeighting, {"minimum": 2.0, "maximum": 1.0}, VALUE, "min_weight"),
    "exp-clip-weighting": (ExpClipWeighting, {"maximum": -1.0}, VALUE, "max_weight"),
}  # fmt: skip


@pytest.mark.parametrize(("cls", "options", "error", "name"), HYPER_PARAMETERS.values(), ids=HYPER_PARAMETERS)
def test_hyper_parameter_is_refused(cls, options, error, name):
    with pytest.raises(error, match=f"^{name}: expected "):
        cls(**options)


IDS = torch.zeros(6, dtype=torch.long)
CALL_CASES = {
    "sequence_ids-short": ({"sequence_ids": IDS[:-1]}, VALUE),
    "sequence_ids-2d": ({"sequence_ids": IDS.view(2, 3)}, VALUE),
    "sequence_ids-float": ({"sequence_ids": IDS.float()}, TYPE),
    "sequence_ids-bool": ({"sequence_ids": IDS.bool()}, TYPE),
    "sequence_ids-list": ({"sequence_ids": [0] * 6}, TYPE),
    "sequence_ids-meta": ({"sequence_ids": IDS.to("meta")}, VALUE),
    "sequence_ids-sparse": ({"sequence_ids": IDS.to_sparse()}, TYPE),
    "num_items-zero": ({"num_items_in_batch": 0}, VALUE),
    "num_items-negative": ({"num_items_in_batch": -1.0}, VALUE),
    "num_items-nan": ({"num_items_in_batch": math.nan}, VALUE),
    "num_items-text": ({"num_items_in_batch": "4"}, TYPE),
    "num_items-bool": ({"num_items_in_batch": True}, TYPE),
    "num_items-zero-tensor": ({"num_items_in_batch": torch.tensor(0)}, VALUE),
    "num_items-nan-tensor": ({"num_items_in_batch": torch.tensor(math.nan)}, VALUE),
    "num_items-vector": ({"num_items_in_batch": torch.ones(2)}, VALUE),
}


@pytest.mark.parametrize(("option", "error"), CALL_CASES.values(), ids=CALL_CASES)
@pytest.mark.parametrize("method", ["forward", "compute"])
def test_loss_call_refuses(option, error, method):
    (name,) = option
    with pytest.raises(error, match=f"^{name}: "):
        getattr(nq.PerCELoss(), method)(**arguments(), **option)


def test_backend_that_cannot_run_says_why(monkeypatch):
    given = arguments()
    monkeypatch.setattr("nextquill.ops.dispatch._why_not_triton", lambda device: "no such luck")
    for call in (lambda: nq.linear_pair_nll(**given, impl="triton"), lambda: nq.NextQuillLoss(impl="triton")(**given)):
        with pytest.raises(nq.BackendUnavailableError, match=r"^impl: 'triton' cannot run on cpu: no such luck"):
            call()


def test_errors_are_both_ours_and_the_expected_built_in():
    for ours, built_in in (
        (nq.ArgumentError, ValueError),
        (nq.ArgumentTypeError, TypeError),
        (nq.BackendUnavailableError, RuntimeError),
        (nq.GradientError, RuntimeError),
    ):
        assert issubclass(ours, nq.NextQuillError)
        assert issubclass(ours, built_in)


def test_an_ignored_row_does_not_excuse_a_label_out_of_range():
    given = arguments()
    given["labels"] = torch.tensor([-100, -100, -100, -100, -100, 77])
    with pytest.raises(nq.ArgumentError, match="77"):
        nq.NextQuillLoss()(**given)
