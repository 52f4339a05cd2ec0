"""linear_pair_jsd of every implementation against the float64 reference and the divergence's own properties.

They run on a GPU if there is one; on a CPU, Triton's interpreter runs the kernels.
"""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

import nextquill as nq
from nextquill import reference
from nextquill.ops.chunks import LogitsBuffer
from nextquill.ops.dispatch import why_not
from tests.helpers import FLOAT64_RELATIVE, assert_close, assert_same_gradients, make_case, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BETAS = (0, 0.1, 0.5, 1)
HEADS = {"plain": {}, "softcap-scale": {"softcap": 3.0, "logit_scale": -0.7}}
NAMES = ("factual", "weight", "bias")  # what gets a gradient: `factual` is the student
SUBSETS = [names for k in (1, 2, 3) for names in itertools.combinations(NAMES, k)]
LARGE, SMALL = [(252, 507, 123)], [(23, 19, 301), (1, 8, 5), (13, 33, 130), (9, 3, 2)]
betas = pytest.mark.parametrize("beta", BETAS)
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@pytest.fixture(params=["torch", "native", "triton"])
def impl(request):
    if reason := why_not(request.param, DEVICE, torch.float32):
        pytest.skip(reason)
    return request.param


def placed(case, *names):
    """The case on the device under test, with fresh leaves."""
    for field in ("factual", "counterfactual", "weight", "bias", "labels"):
        tensor = getattr(case, field)
        setattr(case, field, None if tensor is None else tensor.to(DEVICE))
    return case.leaves(*(names or NAMES))


def run(function, case, grad=None, **options):
    """The divergence of a case, after the backward of a sum weighted by `grad`."""
    jsd = function(*case.pair_args, bias=case.bias, **options)
    if jsd.requires_grad:
        jsd.backward(torch.ones_like(jsd) if grad is None else grad.to(jsd.dtype))
    return jsd.detach()


def check(case, impl, relative=1e-5, **options):
    """Assert that values and gradients equal the float64 reference's."""
    leaves = [name for name, tensor in case.tensors.items() if tensor.requires_grad]
    exact = case.leaves(*leaves, dtype=torch.float64)
    grad = torch.randn(case.labels.shape, device=case.labels.device, dtype=torch.float64)
    jsd = run(nq.linear_pair_jsd, case, grad, impl=impl, **options)
    truth = run(reference.linear_pair_jsd, exact, grad, **options)
    assert jsd.dtype == (torch.float64 if case.factual.dtype == torch.float64 else torch.float32)
    # A divergence is a sum of probabilities times logarithms of about 1, each of which is rounded.
    floor = 2 * torch.finfo(jsd.dtype).eps
    assert (jsd - truth).abs().max() <= max(relative * truth.max().item(), floor)
    assert case.gradients().keys() == set(leaves) - {"counterfactual"}
    assert_same_gradients(case, exact, relative)
    return jsd


@pytest.mark.covering(2)
@betas
@heads
@pytest.mark.parametrize("shape", LARGE + SMALL, ids=lambda s: "N{}-D{}-V{}".format(*s))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_values_and_gradients(impl, beta, head, shape, bias):
    if impl == "triton" and DEVICE.type == "cpu" and shape in LARGE:
        pytest.skip("too large for the interpreter")
    case = placed(make_case(*shape, bias=bias, ignored=0.2 if shape[0] > 1 else 0.0), *NAMES[: 2 + bias])
    jsd = check(case, impl, beta=beta, **head)
    ignored = case.labels == -100
    assert torch.equal(jsd == 0, ignored)
    assert torch.equal((case.factual.grad == 0).all(-1), ignored)


@betas
@pytest.mark.parametrize("leaves", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(impl, beta, leaves):
    check(placed(make_case(13, 9, 31), *leaves), impl, beta=beta, softcap=4.0)


@betas
@heads
def test_float64_inputs_are_computed_in_float64(beta, head):
    case = make_case(37, 19, 53, dtype=torch.float64).leaves(*NAMES)
    check(case, "auto", FLOAT64_RELATIVE, beta=beta, **head)


@betas
@heads
def test_gradcheck(beta, head):
    """Student and teacher read different columns of the head, so that a column's whole derivative is the student's."""
    case = make_case(5, 3, 4, dtype=torch.float64).leaves("factual", "weight")
    nothing, of_teacher = torch.zeros(5, 3, dtype=torch.float64), case.weight.detach().flip(0)
    teacher = torch.cat([nothing, case.counterfactual], 1)

    def function(student, weight):
        wide, head_weight = torch.cat([student, nothing], 1), torch.cat([weight, of_teacher], 1)
        return nq.linear_pair_jsd(wide, teacher, head_weight, case.labels, bias=case.bias, beta=beta, **head)

    assert gradcheck(function, (case.factual, case.weight))


@betas
def test_a_vocabulary_of_one_has_no_divergence_and_no_gradient(impl, beta):
    case = placed(make_case(9, 4, 1, ignored=0.0))
    assert run(nq.linear_pair_jsd, case, impl=impl, beta=beta).abs().max() <= 1e-7
    assert all(gradient.abs().max() <= 1e-6 for gradient in case.gradients().values())


def test_the_teacher_is_a_constant(impl):
    case = placed(make_case(13, 9, 31), *NAMES, "counterfactual")
    run(nq.linear_pair_jsd, case, impl=impl)
    assert case.counterfactual.grad is None
    alone = placed(make_case(13, 9, 31), "counterfactual")
    assert not run(nq.linear_pair_jsd, alone, impl=impl).requires_grad
    # The head's gradient is what it would be for a teacher with a head of its own.
    exact = placed(make_case(13, 9, 31)).leaves(*NAMES, dtype=torch.float64)
    z1 = reference.linear.linear_logits(exact.factual, exact.weight, exact.bias)
    z0 = reference.linear.linear_logits(exact.counterfactual, exact.weight, exact.bias).detach()
    p1, p0 = z1.softmax(1), z0.softmax(1)
    m = (p1 + p0) / 2
    jsd = 0.5 * (p0 * (p0 / m).log()).sum(1) + 0.5 * (p1 * (p1 / m).log()).sum(1)
    jsd[case.labels != -100].sum().backward()
    assert_same_gradients(case, exact)


@betas
def test_equal_streams_have_no_divergence_and_no_gradient(impl, beta):
    case = placed(make_case(40, 9, 301, ignored=0.0))
    case.counterfactual = case.factual.detach().clone()
    jsd = run(nq.linear_pair_jsd, case, impl=impl, beta=beta)
    assert ((jsd >= 0) & (jsd <= 1e-7)).all()
    assert case.factual.grad.abs().max() <= 1e-6


def test_symmetric_and_bounded_at_one_half(impl):
    case = placed(make_case(40, 9, 301, spread=30.0), "none")
    jsd = run(nq.linear_pair_jsd, case, impl=impl)
    case.factual, case.counterfactual = case.counterfactual, case.factual
    assert_close(run(nq.linear_pair_jsd, case, impl=impl), jsd, 1e-6)
    assert jsd.max() > 0.68  # log 2 is 0.693: streams of this spread hardly overlap
    assert ((jsd >= 0) & (jsd <= math.log(2) * (1 + 1e-6))).all()


@pytest.mark.parametrize("end", [0, 1])
def test_limits_of_beta(end):
    case = make_case(40, 9, 301, dtype=torch.float64).leaves(*NAMES)
    limit = make_case(40, 9, 301, dtype=torch.float64).leaves(*NAMES)
    near, weight = abs(end - 1e-7), 1e-7
    assert_close(run(nq.linear_pair_jsd, case, beta=near) / weight, run(nq.linear_pair_jsd, limit, beta=end), 1e-5)
    for name, gradient in limit.gradients().items():
        assert_close(case.gradients()[name] / weight, gradient, 1e-5, name)
    z1, z0 = (h @ case.weight.T + case.bias for h in (case.factual, case.counterfactual))
    p, q = (z1, z0) if end == 1 else (z0, z1)
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=z) for z in (p, q)))
    assert_close(nq.linear_pair_jsd(*case.pair_args, bias=case.bias, beta=end), kl * (case.labels != -100), 1e-10)


@pytest.mark.parametrize("beta", [1e-12, 1 - 1e-12])
def test_beta_that_float32_cannot_tell_from_an_end_is_not_that_end(impl, beta):
    case = placed(make_case(40, 9, 301))
    jsd = run(nq.linear_pair_jsd, case, impl=impl, beta=beta)
    assert ((jsd >= 0) & (jsd < 1e-6)).all()
    assert torch.isfinite(case.factual.grad).all()
    assert case.factual.grad.abs().max() < 1e-5


@betas
def test_masks_and_labels_mean_the_same(impl, beta):
    labels = placed(make_case(23, 9, 31))
    masked, renamed = labels.leaves(*NAMES), labels.leaves(*NAMES)
    masked.labels = labels.labels != -100
    renamed.labels = torch.where(masked.labels, 10_000, 7)
    expected = run(nq.linear_pair_jsd, labels, impl=impl, beta=beta)
    assert torch.equal(run(nq.linear_pair_jsd, masked, impl=impl, beta=beta), expected)
    assert torch.equal(run(nq.linear_pair_jsd, renamed, impl=impl, beta=beta, ignore_index=7), expected)
    for case in (masked, renamed):
        assert all(torch.equal(case.gradients()[name], grad) for name, grad in labels.gradients().items())
    assert torch.equal(expected == 0, ~masked.labels)
    everything = torch.ones_like(masked.labels)
    assert (nq.linear_pair_jsd(*masked.pair_args[:3], everything, beta=beta, ignore_index=1, impl=impl) > 0).all()


def test_batched_inputs_equal_flat_ones():
    flat, batched = make_case(24, 8, 11).leaves(*NAMES), make_case(24, 8, 11).view(4, 6).leaves(*NAMES)
    expected, actual = run(nq.linear_pair_jsd, flat), run(nq.linear_pair_jsd, batched)
    assert torch.equal(actual, expected.view(4, 6))
    assert torch.equal(batched.factual.grad, flat.factual.grad.view(4, 6, 8))
    assert torch.equal(batched.weight.grad, flat.weight.grad)


@betas
@pytest.mark.parametrize("ignored", ["some", "all", "empty"])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(impl, beta, ignored):
    case = placed(make_case(0 if ignored == "empty" else 40, 9, 31, ignored=1.0 if ignored == "all" else 0.5))
    clean = case.leaves(*NAMES)
    skipped = case.labels == -100
    with torch.no_grad():
        case.factual[skipped] = torch.nan
        case.counterfactual[skipped] = torch.inf
    jsd, expected = (run(nq.linear_pair_jsd, each, impl=impl, beta=beta) for each in (case, clean))
    assert torch.equal(jsd, expected)
    assert not jsd[skipped].any()
    assert not case.factual.grad[skipped].any()
    for name, gradient in case.gradients().items():
        assert torch.equal(gradient, clean.gradients()[name])
        assert ignored == "some" or not gradient.any()


@betas
def test_strided_and_stride_0_inputs(impl, beta):
    wide = torch.randn(11, 2, 24, device=DEVICE)
    hidden, teacher = wide[:, 0, 3:12], wide[:, 1, 12:21]
    weight = torch.randn(9, 40, device=DEVICE)[:, 5:36].T
    same = torch.randn(9, device=DEVICE).expand(11, 9)
    mask = (torch.arange(22, device=DEVICE) % 3 > 0)[::2]
    for h1, h0 in ((hidden, teacher), (same, hidden), (hidden, same)):
        case = [t.detach().requires_grad_() for t in (h1, weight)]
        exact = [t.detach().double().requires_grad_() for t in (h1, weight)]
        actual = nq.linear_pair_jsd(case[0], h0, case[1], mask, beta=beta, impl=impl)
        truth = reference.linear_pair_jsd(exact[0], h0.double(), exact[1], mask, beta=beta)
        assert_close(actual, truth)
        actual.sum().backward()  # an expanded upstream gradient
        truth.sum().backward()
        for a, b in zip(case, exact, strict=True):
            assert_close(a.grad, b.grad)


@betas
def test_masked_columns_add_nothing(impl, beta):
    """A bias of -inf: the tokens have probability 0 in both streams, and get no gradient."""
    case = placed(make_case(13, 9, 31), "factual", "weight")
    kept = torch.arange(31, device=DEVICE) % 4 != 1
    case.bias[~kept] = -torch.inf
    exact = case.leaves("factual", "weight", dtype=torch.float64)
    jsd = run(nq.linear_pair_jsd, case, impl=impl, beta=beta)
    short = (exact.weight[kept], case.labels)
    truth = reference.linear_pair_jsd(exact.factual, exact.counterfactual, *short, beta=beta, bias=exact.bias[kept])
    truth.sum().backward()
    assert_close(jsd, truth)
    assert_same_gradients(case, exact)
    assert not case.weight.grad[~kept].any()


@betas
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
def test_non_finite_hidden_states_show_in_their_row_only(impl, beta, softcap):
    for bad, stream in itertools.product((torch.nan, torch.inf, -torch.inf), ("factual", "counterfactual")):
        case = placed(make_case(13, 9, 31, ignored=0.0))
        with torch.no_grad():
            case.tensors[stream][4, 2] = bad
        jsd = run(nq.linear_pair_jsd, case, impl=impl, beta=beta, softcap=softcap)
        others = torch.arange(13, device=DEVICE) != 4
        assert not torch.isfinite(jsd[4]), (bad, stream)
        assert torch.isfinite(jsd[others]).all()
        assert torch.isfinite(case.factual.grad[others]).all()
        assert not torch.isfinite(case.factual.grad[4]).all()


@betas
def test_huge_logits(impl, beta):
    """Differences of thousands of nats, and probabilities that underflow in one stream and not in the other."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-8, 9, shape, generator=rng).to(DEVICE)  # noqa: E731
    factual, teacher, weight = 1250.0 * draw(9, 4), 1250.0 * draw(9, 4), draw(77, 4) / 1.0
    mask = torch.ones(9, dtype=torch.bool, device=DEVICE)
    # These products are exact in float32. The largest logits are 10^5.
    leaf, exact = factual.requires_grad_(), factual.detach().double().requires_grad_()
    jsd = nq.linear_pair_jsd(leaf, teacher, weight, mask, beta=beta, impl=impl)
    truth = reference.linear_pair_jsd(exact, teacher.double(), weight.double(), mask, beta=beta)
    jsd.sum().backward()
    truth.sum().backward()
    assert_close(jsd, truth)
    assert_close(leaf.grad, exact.grad)


@betas
def test_two_runs_are_bitwise_equal(impl, beta):
    runs = []
    for _ in range(2):
        case = placed(make_case(40, 19, 301))
        runs.append([run(nq.linear_pair_jsd, case, impl=impl, beta=beta), *case.gradients().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@betas
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_many_chunks_equal_one(impl, beta, rows):
    whole, cut = placed(make_case(23, 8, 31)), placed(make_case(23, 8, 31))
    grad = torch.randn(23, device=DEVICE)
    expected = run(nq.linear_pair_jsd, whole, grad, impl=impl, beta=beta)
    actual = run(nq.linear_pair_jsd, cut, grad, impl=impl, beta=beta, chunk_bytes=rows * 2 * 32 * 4)
    # A product of one row may round in another order than that of many.
    assert_close(actual, expected)
    assert_same_gradients(cut, whole)


def test_chunks_are_as_small_as_asked(impl, monkeypatch):
    sizes, fill = [], LogitsBuffer.fill
    monkeypatch.setattr(LogitsBuffer, "fill", lambda *args: sizes.append(args[2].stop - args[2].start) or fill(*args))
    run(nq.linear_pair_jsd, placed(make_case(23, 8, 31, ignored=0.0)), impl=impl, chunk_bytes=8 * 2 * 32 * 4)
    assert sizes == [7, 8, 8] * 2
    with pytest.raises(nq.ArgumentError, match=r"^chunk_bytes: expected at least 256, "):
        run(nq.linear_pair_jsd, placed(make_case(23, 8, 31)), impl=impl, chunk_bytes=100)


@betas
def test_half_precision_is_no_worse_than_plain_pytorch(impl, beta):
    """float16 runs everywhere. bfloat16 does not run under Triton's interpreter, which multiplies it wrongly."""
    dtypes = [torch.float16] + [torch.bfloat16] * (impl != "triton" or DEVICE.type == "cuda")
    for dtype in dtypes:
        case = placed(make_case(29, 24, 301, dtype=dtype))
        plain, exact = case.leaves(*NAMES), case.leaves(*NAMES, dtype=torch.float64)
        z1, z0 = (
            torch.nn.functional.linear(h, plain.weight, plain.bias).float()
            for h in (plain.factual, plain.counterfactual)
        )
        log_p1, log_p0 = z1.log_softmax(1), z0.log_softmax(1).detach()
        by_hand = divergence_by_hand(log_p1, log_p0, beta) * (case.labels != -100)
        by_hand.sum().backward()
        jsd = run(nq.linear_pair_jsd, case, impl=impl, beta=beta)
        truth = run(reference.linear_pair_jsd, exact, beta=beta)
        assert_close(jsd, truth)
        assert relative_error(jsd, truth) <= relative_error(by_hand, truth)
        for name, value in exact.gradients().items():
            assert case.gradients()[name].dtype == dtype
            own, other = (relative_error(each.gradients()[name], value) for each in (case, plain))
            assert own <= 2 * other, (dtype, name)


def divergence_by_hand(log_p1, log_p0, beta):
    kl = lambda p, q: torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)  # noqa: E731
    if beta in (0, 1):
        return kl(log_p1, log_p0) if beta else kl(log_p0, log_p1)
    log_m = torch.logaddexp(log_p0 + math.log(beta), log_p1 + math.log(1 - beta))
    return beta * kl(log_p0, log_m) + (1 - beta) * kl(log_p1, log_m)


def test_inputs_are_left_as_they_were(impl):
    case = placed(make_case(16, 8, 11))
    before = {name: tensor.detach().clone() for name, tensor in case.tensors.items()}
    labels, grad = case.labels.clone(), torch.randn(16, device=DEVICE)
    kept = grad.clone()
    run(nq.linear_pair_jsd, case, grad, impl=impl, softcap=2.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in case.tensors.items())
    assert torch.equal(labels, case.labels)
    assert torch.equal(grad, kept)


def test_backward_twice_and_second_derivatives():
    case = make_case(16, 8, 11).leaves(*NAMES)
    total = nq.linear_pair_jsd(*case.pair_args, bias=case.bias).square().sum()
    leaves = [case.tensors[name] for name in NAMES]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(nq.GradientError, match="create_graph"):
        torch.autograd.grad(total, leaves, create_graph=True)


@pytest.mark.gpu
def test_a_model_sized_head_in_bfloat16():
    """Many tiles in each direction, several chunks, and half-precision products with float32 results."""
    case = placed(make_case(2100, 512, 50257, dtype=torch.bfloat16, bias=False), "factual", "weight")
    exact = case.leaves("factual", "weight", dtype=torch.float64)
    jsd = run(nq.linear_pair_jsd, case, impl="triton")
    truth = run(nq.linear_pair_jsd, exact, impl="torch")
    assert_close(jsd, truth)
    for name, value in exact.gradients().items():
        assert relative_error(case.gradients()[name], value) <= 2**-7, name


WRONG = {
    "beta-negative": ({"beta": -0.1}, nq.ArgumentError, r"^beta: expected a number in \[0, 1\], got -0\.1"),
    "beta-large": ({"beta": 1.5}, nq.ArgumentError, r"^beta: .*got 1\.5"),
    "beta-nan": ({"beta": math.nan}, nq.ArgumentError, r"^beta: .*got nan"),
    "beta-bool": ({"beta": True}, nq.ArgumentTypeError, r"^beta: expected a number, got bool"),
    "beta-text": ({"beta": "0.5"}, nq.ArgumentTypeError, r"^beta: expected a number, got str"),
    "mask-float": (
        {"mask": torch.ones(6)},
        nq.ArgumentTypeError,
        r"^mask: expected a bool or integer dtype, got torch\.fl",
    ),
    "mask-list": ({"mask": [True] * 6}, nq.ArgumentTypeError, r"^mask: expected a bool or integer tensor, got list"),
    "mask-shape": (
        {"mask": torch.ones(5, dtype=torch.bool)},
        nq.ArgumentError,
        r"^mask: expected shape \[6\] to match hidden_student \[6, 4\], got \[5\]",
    ),
    "teacher-shape": (
        {"hidden_teacher": torch.ones(5, 4)},
        nq.ArgumentError,
        r"^hidden_teacher: expected the shape of hidden_student \[6, 4\], got \[5, 4\]",
    ),
    "teacher-none": ({"hidden_teacher": None}, nq.ArgumentTypeError, r"^hidden_teacher: expected a tensor"),
    "teacher-dtype": (
        {"hidden_teacher": torch.ones(6, 4).double()},
        nq.ArgumentTypeError,
        r"^hidden_teacher: expected dtype torch\.float32 like hidden_student",
    ),
    "student-integers": ({"hidden_student": torch.ones(6, 4).long()}, nq.ArgumentTypeError, r"^hidden_student: "),
    "weight-width": ({"lm_head_weight": torch.ones(9, 5)}, nq.ArgumentError, r"^hidden_student: .*last dimension 5"),
    "bias-shape": ({"bias": torch.ones(8)}, nq.ArgumentError, r"^bias: expected shape \[9\], got \[8\]"),
    "ignore_index": ({"ignore_index": 1.0}, nq.ArgumentTypeError, r"^ignore_index: expected an int"),
    "softcap": ({"softcap": 0.0}, nq.ArgumentError, r"^softcap: "),
    "logit_scale": ({"logit_scale": 0.0}, nq.ArgumentError, r"^logit_scale: "),
    "chunk_bytes": ({"chunk_bytes": 0}, nq.ArgumentError, r"^chunk_bytes: expected a positive number of bytes, got 0"),
    "impl": ({"impl": "cuda"}, nq.ArgumentError, r"^impl: expected one of auto, "),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_named(name):
    change, error, message = WRONG[name]
    arguments = {
        "hidden_student": torch.ones(6, 4),
        "hidden_teacher": torch.ones(6, 4),
        "lm_head_weight": torch.ones(9, 4),
        "mask": torch.ones(6, dtype=torch.bool),
    }
    with pytest.raises(error, match=message):
        nq.linear_pair_jsd(**{**arguments, **change})
