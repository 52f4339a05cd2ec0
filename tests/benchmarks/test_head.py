"""Suite `head`: its providers, its gate, its rows, and the picture drawn from them."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import cases, environment, gate, head, measure, memory, plot, table
from benchmarks.cases import FORWARD, FROZEN, TRAINABLE, TRAINING, Shape, Task
from benchmarks.peers import cce, compose, liger, ours, plain, torch_lce
from benchmarks.provider import Provider, ProviderError
from nextquill.ops import mixed_precision_mm as wide

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 32, 16, 96)
CAPPED = replace(SHAPE, name="capped", softcap=30.0)
NEXTQUILL = Task("NextQuill", TRAINING, TRAINABLE)
TASKS = [
    NEXTQUILL,
    Task("NextQuill", TRAINING, FROZEN),
    Task("NextQuill detached", TRAINING, TRAINABLE),
    Task("NextQuill detached", TRAINING, FROZEN),
    Task("PerCE", TRAINING, TRAINABLE),
    Task("SFT", TRAINING, FROZEN),
    Task("NextQuill", FORWARD),
    Task("pair nll", FORWARD),
    Task("token nll", FORWARD),
]
OURS = ours.PROVIDERS[0]


def inputs(shape=SHAPE, dtype=torch.float32):
    return cases.make_inputs(shape, dtype, CPU)


def naive(hidden, weight, labels, softcap, reduction, **options):
    """The result of a peer's fused cross-entropy, in plain PyTorch."""
    return cross_entropy(plain.logits(hidden, weight, softcap), labels, reduction=reduction)


COMPOSED = Provider("composed", compose.compose(naive), unsupported=compose.unsupported)


@pytest.fixture
def small(monkeypatch):
    """Use one shape and two tasks, without the processes that measure memory."""
    steps = tuple(cases.Step(SHAPE, task) for task in (NEXTQUILL, Task("pair nll", FORWARD)))
    monkeypatch.setattr(head, "plan", lambda device, quick: steps)
    monkeypatch.setattr(head, "cpu_peaks", lambda shape, requests: [2**20 * (1 + i) for i in range(len(requests))])


def test_inputs_give_both_weights_and_none_near_the_threshold():
    for shape in (Shape("a", 64, 64, 512), Shape("b", 64, 64, 512, 30.0)):
        nll = plain.pair_nll_plain(
            *(getattr(inputs(shape), n) for n in ("h1", "h0", "weight", "labels")), shape.softcap
        )
        effect = (-nll[0]).exp() - (-nll[1]).exp()
        assert 0.4 < (effect > 0.3).float().mean() < 0.6
        assert not ((effect - 0.05).abs() < 0.02).any()


def test_useful_products():
    counted = {str(task): task.products for task in TASKS}
    assert counted["NextQuill, forward+backward, trainable head"] == 6
    assert counted["NextQuill, forward+backward, frozen head"] == 4
    assert counted["NextQuill detached, forward+backward, frozen head"] == 3
    assert counted["pair nll, forward"] == 2


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, CAPPED], ids=str)
def test_every_provider_that_can_run_here_passes(task, shape):
    entrants = [plain.PROVIDER, OURS, COMPOSED, torch_lce.PROVIDER]
    able = [each for each in entrants if each.reason_against(task, inputs(shape)) is None]
    assert able[:2] == entrants[:2]
    found, refused = gate.check_slice(able, task, inputs(shape), {})
    assert refused == {}
    assert len(found) == len(able)
    assert {len(errors) for errors in found.values()} == {len(cases.output_names(cases.for_task(inputs(), task), task))}


def test_a_composition_says_what_it_cannot_express():
    against = COMPOSED.reason_against
    assert against(NEXTQUILL, inputs()) is None
    assert against(Task("PerCE", TRAINING, TRAINABLE), inputs(CAPPED)) is None
    assert "soft-capped" in against(NEXTQUILL, inputs(CAPPED))
    assert "trainable W" in against(Task("NextQuill detached", TRAINING, TRAINABLE), inputs())
    assert torch_lce.PROVIDER.unsupported(Task("SFT", TRAINING, FROZEN), inputs(CAPPED)) == "has no softcap"


def test_the_composition_of_the_detached_loss_would_be_wrong():
    """Without that refusal, the gate finds a wrong gradient of W."""
    forced = replace(COMPOSED, unsupported=lambda task, inputs: None)
    for task, shape, output in (
        (Task("NextQuill detached", TRAINING, TRAINABLE), SHAPE, "grad_weight"),
        (NEXTQUILL, CAPPED, "loss"),
    ):
        assert output in gate.check_slice([plain.PROVIDER, forced], task, inputs(shape), {})[1]["composed"]


def test_why_a_provider_is_missing(monkeypatch):
    cuda = torch.device("cuda")
    assert liger.PROVIDER.missing(CPU) == cce.PROVIDER.missing(CPU) == "needs a GPU"
    assert ours.missing("triton", CPU) == "needs a GPU"
    assert ours.missing("native", cuda) == "runs on a CPU"
    assert ours.missing("torch", CPU) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert liger.PROVIDER.missing(cuda) == "liger-kernel is not installed"
    assert cce.PROVIDER.missing(cuda) == "cut-cross-entropy is not installed"
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert "has no chunked linear_cross_entropy" in torch_lce.PROVIDER.missing(CPU)


def test_cces_gradient_filter_is_off_in_every_version():
    assert cce._exact({"filter_eps": None, "impl": None}) == {"impl": "cce", "filter_eps": None}
    assert cce._exact({"filter_eps": None, "accum_e_fp32": None}) == {"impl": "cce_exact"}
    assert "float16" in cce.PROVIDER.unsupported(NEXTQUILL, inputs())
    assert cce.PROVIDER.unsupported(NEXTQUILL, inputs(dtype=torch.bfloat16)) is None


def spoiled(provider, position, factor=1.01, **changes):
    """A provider with one output that is wrong by 1%."""

    class Spoiled(Provider):
        def bind(self, task, inputs, options=None):
            call = provider.bind(task, inputs, options)

            def wrong():
                results = list(call())
                results[position] = factor * results[position]
                return tuple(results)

            return wrong

    return Spoiled(**{**{f: getattr(provider, f) for f in Provider.__dataclass_fields__}, **changes})


@pytest.mark.parametrize(
    ("position", "name"), list(enumerate(["loss", "grad_factual", "grad_counterfactual", "grad_weight"]))
)
def test_the_gate_refuses_a_wrong_output(position, name):
    _, refused = gate.check_slice([plain.PROVIDER, spoiled(OURS, position)], NEXTQUILL, inputs(), {})
    assert refused == {"ours, torch": refused["ours, torch"]}
    assert refused["ours, torch"].startswith(f"{name} off by 1.0e-02")


def test_the_gate_refuses_what_is_not_finite_and_what_has_another_shape():
    assert gate.errors(["a"], [torch.tensor([float("nan")])], [torch.ones(1)])["a"] == float("inf")
    assert gate.errors(["a"], [torch.ones(2)], [torch.ones(1)])["a"] == float("inf")
    assert gate.verdict({"a": float("inf")}, {"a": 0.05}).startswith("a off by inf")


def test_the_check_at_full_size_names_who_differs():
    calls = {each.name: each.bind(NEXTQUILL, cases.for_task(inputs(), NEXTQUILL)) for each in (plain.PROVIDER, OURS)}
    names = ("loss", "grad_factual", "grad_counterfactual", "grad_weight")
    assert gate.check_full_size(calls, names, torch.float32)[0::2] == ("plain", {})
    calls["ours, torch"] = spoiled(OURS, 3).bind(NEXTQUILL, cases.for_task(inputs(), NEXTQUILL))
    assert "at full size grad_weight" in gate.check_full_size(calls, names, torch.float32)[2]["ours, torch"]


def test_half_precision_is_judged_by_plain_pytorchs_error():
    names, baseline = ("loss", "grad_weight"), {"loss": 1e-4, "grad_weight": 2e-3}
    own = gate.limits(names, torch.bfloat16, True, baseline)
    assert own == pytest.approx({"loss": 1.2e-3, "grad_weight": 5e-3})
    peers = gate.limits(names, torch.bfloat16, False, baseline)
    assert peers == pytest.approx({"loss": 2e-3, "grad_weight": 5e-2})


def test_suite_writes_every_metric_and_every_reason(small):
    saved = []
    rows = head.run(measure.Options(rounds=3, device="cpu", save=lambda rows: saved.append(len(rows))), None)
    assert saved[-1] == len(rows)
    assert len(saved) == 2
    metrics = {row.metric for row in rows if row.provider == "ours, torch" and row.loss == "NextQuill"}
    assert metrics >= {
        "seconds",
        "time",
        "tflops",
        "gemm_fraction",
        "peak",
        "forward_peak",
        "transient",
        "full_size",
        "error_loss",
    }
    notes = {row.provider: row.note for row in rows if row.metric == "status"}
    assert notes["Liger"] == "needs a GPU"
    (weight,) = [row for row in rows if row.metric == "peak" and row.provider == "plain" and row.loss == "NextQuill"]
    assert weight.value == 1.0


def test_rates_come_from_useful_products_and_from_the_products_of_the_same_round(small, monkeypatch):
    seconds = {"plain": [2.0, 4.0, 2.0], "ours, torch": [1.0, 2.0, 1.0], head.GEMM: [0.5, 1.0, 0.5]}
    monkeypatch.setattr(head, "time_in_turns", lambda calls, *_: {name: list(seconds[name]) for name in calls})
    rows = head.run(measure.Options(device="cpu"), (plain.PROVIDER, OURS))
    product = 2 * 32 * 16 * 96 / 1e12
    found = {(row.loss, row.provider, row.metric): row for row in rows}
    own = found["NextQuill", "ours, torch", "tflops"]
    assert (own.mode, own.head, own.dtype, own.rounds) == (TRAINING, TRAINABLE, "float32", 3)
    assert own.value == pytest.approx(6 * product, rel=1e-4)
    assert found["NextQuill", head.GEMM, "gemm_rate"].value == pytest.approx(product / 0.5, rel=1e-4)
    fraction = found["NextQuill", "ours, torch", "gemm_fraction"]
    assert fraction.p20 == fraction.value == fraction.p80 == 3.0
    assert found["pair nll", "plain", "gemm_fraction"].value == 0.5
    assert found["NextQuill", "ours, torch", "time"].value == 0.5


def test_what_is_wrong_is_not_timed_and_fails_the_run_but_the_rest_is_measured(small):
    saved = []
    entrants = (plain.PROVIDER, spoiled(OURS, 0), spoiled(COMPOSED, 1))
    with pytest.raises(measure.GateError, match=r"ours, torch, NextQuill, .*: loss off by 1.0e-02") as caught:
        head.run(measure.Options(rounds=1, device="cpu", save=lambda rows: saved.append(list(rows))), entrants)
    assert "composed" not in str(caught.value)
    rows = saved[-1]
    assert {row.provider for row in rows if row.metric == "time" and row.loss == "NextQuill"} == {"plain"}
    assert {row.provider for row in rows if row.metric == "error_loss"} == {"plain", "ours, torch", "composed"}


def test_a_peer_without_memory_is_noted_and_plain_pytorch_too(small, monkeypatch):
    def no_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    greedy = replace(COMPOSED, name="greedy", losses={"NextQuill": no_memory})
    rows = head.run(measure.Options(rounds=1, device="cpu"), (plain.PROVIDER, OURS, greedy))
    (note,) = [row for row in rows if row.provider == "greedy" and row.loss == "NextQuill"]
    assert (note.metric, note.note) == ("status", "out of memory")
    hungry = replace(plain.PROVIDER, losses={**plain.PROVIDER.losses, "NextQuill": no_memory})
    monkeypatch.setattr(
        gate, "truth", lambda task, x: plain.PROVIDER.bind(task, cases.for_task(x, task, torch.double))()
    )
    rows = head.run(measure.Options(rounds=1, device="cpu"), (hungry, OURS))
    assert {row.metric for row in rows if row.loss == "NextQuill" and row.provider == "ours, torch"} >= {"seconds"}
    assert not any(row.metric == "time" and row.loss == "NextQuill" for row in rows)


def test_an_error_of_a_provider_is_one_line_and_ours_shows_its_traceback(capsys):
    def broken(x, **options):
        raise RuntimeError("a\nb")

    for is_ours in (False, True):
        provider = Provider("p", {"NextQuill": broken}, ours=is_ours)
        with pytest.raises(ProviderError, match=r"^RuntimeError: a b$"):
            provider.bind(NEXTQUILL, cases.for_task(inputs(), NEXTQUILL))()
        assert ("Traceback" in capsys.readouterr().err) is is_ours


def test_the_fastest_variant_is_chosen_and_named(small, monkeypatch):
    slow = {"calls": 0}

    def loss(x, size):
        slow["calls"] += size == 1
        if size == 1:
            measure.time.sleep(0.05)
        return plain.PROVIDER.losses["NextQuill"](x)

    peer = Provider("peer", {"NextQuill": loss}, variants=lambda: ({"size": 1}, {"size": 4}))
    rows = head.run(measure.Options(rounds=1, device="cpu"), (plain.PROVIDER, OURS, peer))
    assert slow["calls"] == 2
    assert {row.note for row in rows if row.provider == "peer" and row.metric == "time"} == {"size=4"}


def test_a_variant_is_chosen_once_per_size_and_loss(small, monkeypatch):
    chosen = []
    monkeypatch.setattr(head, "_fastest", lambda provider, task, inputs: chosen.append(task.loss) or {})
    nll = Task("pair nll", FORWARD)
    plans = [(SHAPE, NEXTQUILL), (SHAPE, TASKS[1]), (SHAPE, TASKS[2]), (SHAPE, nll), (SHAPE, nll)]
    plans += [(replace(SHAPE, sequences=8), NEXTQUILL), (replace(SHAPE, rows=48), NEXTQUILL)]
    monkeypatch.setattr(head, "plan", lambda device, quick: [cases.Step(*each) for each in plans])
    head.run(measure.Options(rounds=1, device="cpu"), (plain.PROVIDER,))
    assert chosen == ["NextQuill", "pair nll", "NextQuill"]


def test_without_time_left_it_says_so(small):
    rows = head.run(measure.Options(rounds=1, device="cpu", budget=1e-9), (plain.PROVIDER, OURS))
    assert {(row.metric, row.note) for row in rows} == {("status", "out of time")}


@pytest.mark.slow
@pytest.mark.skipif(not memory.sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_process_is_what_it_holds():
    shape = Shape("wide", 256, 16, 16384)  # logits of 16 MiB
    frozen = Task("SFT", TRAINING, FROZEN)
    asked = [memory.Request(frozen, name, forward) for name in ("plain", "ours, torch") for forward in (False, True)]
    plain_peak, plain_forward, own_peak, own_forward = (peak / memory.MIB for peak in memory.cpu_peaks(shape, asked))
    assert 32 <= plain_peak < 70  # the logits and their soft-max, at least
    assert 16 <= own_peak < plain_peak
    assert 16 <= plain_forward < plain_peak - 8  # the gradient of the logits comes in the backward
    assert own_forward == pytest.approx(own_peak, abs=2)  # ours has finished by then


def test_gradients_that_a_forward_keeps():
    wide, rows, weight = inputs(dtype=torch.bfloat16), 32 * 16, 96 * 16

    def kept(provider, task):
        return provider.forward_gradients(task, cases.for_task(wide, task))

    assert kept(OURS, NEXTQUILL) == {"d factual": 2 * rows, "d counterfactual": 2 * rows, "d weight": 4 * weight}
    assert kept(OURS, Task("PerCE", TRAINING, FROZEN)) == {"d factual": 2 * rows}
    assert kept(OURS, Task("pair nll", FORWARD)) == {}
    assert kept(liger.PROVIDER, NEXTQUILL) == {"d hidden": 2 * rows, "d weight": 4 * weight}
    assert kept(torch_lce.PROVIDER, NEXTQUILL) == {"d hidden": 2 * rows, "d weight": 2 * weight}
    for task in (Task("PerCE", TRAINING, TRAINABLE), Task("NextQuill", FORWARD)):
        assert kept(liger.PROVIDER, task) == kept(torch_lce.PROVIDER, task) == {}
    assert kept(plain.PROVIDER, NEXTQUILL) == kept(cce.PROVIDER, NEXTQUILL) == {}


def test_transient_is_the_forwards_peak_less_those_gradients(small, monkeypatch):
    def peaks(shape, requests):
        return [memory.MIB * (2 if request.forward else 5) for request in requests]

    monkeypatch.setattr(head, "cpu_peaks", peaks)
    rows = head.run(measure.Options(rounds=1, device="cpu"), (plain.PROVIDER, OURS))
    found = {(row.provider, row.metric): row for row in rows if row.loss == "NextQuill"}
    for name, gradients in (("plain", 0), ("ours, torch", 4 * (2 * 32 * 16 + 96 * 16))):
        assert (found[name, "peak"].value, found[name, "forward_peak"].value) == (5.0, 2.0)
        assert found[name, "transient"].value == pytest.approx(2 - gradients / memory.MIB, rel=1e-4)
    assert found["plain", "transient"].note == "less nothing"
    assert found["ours, torch", "transient"].note == "less d factual 0, d counterfactual 0, d weight 0"


def test_a_forward_alone_holds_what_its_backward_needs():
    (value,) = OURS.bind_forward(NEXTQUILL, cases.for_task(inputs(), NEXTQUILL))()
    assert value.grad_fn is not None
    whole = OURS.bind(NEXTQUILL, cases.for_task(inputs(), NEXTQUILL))()
    assert not whole[0].requires_grad
    assert torch.equal(whole[0], value)
    scores = Task("pair nll", FORWARD)
    assert [each.requires_grad for each in OURS.bind_forward(scores, cases.for_task(inputs(), scores))()] == [False] * 3


def test_on_a_gpu_the_target_comes_first_and_gets_more_time(monkeypatch):
    cuda, total = torch.device("cuda"), {"total_memory": 140 * 2**30}
    monkeypatch.setattr(cases.torch.cuda, "get_device_properties", lambda device: type("Properties", (), total))
    steps = cases.plan(cuda)
    assert [(step.shape, step.task) for step in steps[:5]] == [(cases.TARGET, task) for task in cases.FIRST]
    assert {step.weight for step in steps[:5]} == {6.0}
    assert {step.weight for step in steps[5:]} == {1.0}
    assert {step.task for step in steps if step.shape == cases.TARGET} == set(cases.tasks(cuda))
    long = [step.shape for step in steps if step.shape.sequences == 8]
    assert {str(shape) for shape in long} == {"Qwen3-8B: N=8192, D=4096, V=151936, 8 sequences"}
    assert len(steps) == len(set(steps)) == 5 * len(cases.tasks(cuda)) + len(long)
    shapes = [step.shape for step in steps]
    assert len(set(shapes)) == 1 + sum(one != other for one, other in pairwise(shapes))
    monkeypatch.setitem(total, "total_memory", 40 * 2**30)
    monkeypatch.setattr(cases.torch.cuda, "get_device_properties", lambda device: type("Properties", (), total))
    assert {(step.shape.rows, step.shape.sequences) for step in cases.plan(cuda)} == {(2048, 16), (2048, 2)}


def test_sequences_are_equally_long():
    for shape in (Shape("a", 64, 8, 32), Shape("b", 64, 8, 32, sequences=8)):
        assert inputs(shape).ids.bincount().tolist() == [64 // shape.sequences] * shape.sequences


def test_steps_share_the_time_by_weight(monkeypatch):
    steps = [cases.Step(SHAPE, NEXTQUILL, 6.0), cases.Step(SHAPE, TASKS[1]), cases.Step(SHAPE, TASKS[2])]
    shares = []
    monkeypatch.setattr(head, "plan", lambda device, quick: steps)
    monkeypatch.setattr(head._Suite, "measure", lambda self, shape, task, share: shares.append(share))
    head.run(measure.Options(device="cpu", budget=80.0), (plain.PROVIDER,))
    assert shares == pytest.approx([60, 40, 80], rel=0.02)  # of what is left, and nobody here takes any


def test_the_log_begins_with_what_the_figures_depend_on():
    text = "\n".join(environment.describe(CPU))
    assert f"torch {torch.__version__}" in text
    assert measure.device_name("cpu") in text
    assert "driver: " in text
    assert f"allow_tf32: {torch.backends.cuda.matmul.allow_tf32}" in text
    assert "torch.bfloat16 products into float32: False, accumulated in place: False" in text
    assert "torch.float16 products" in text


def test_a_log_line_that_fails_costs_no_figure(monkeypatch):
    def broken(device, dtype):
        raise RuntimeError("no")

    monkeypatch.setattr(wide, "has_wide_mm", broken)
    assert "cannot be asked (RuntimeError: no)" in environment.describe(CPU)[-1]


@pytest.fixture
def results(small, tmp_path, monkeypatch):
    rows = head.run(measure.Options(rounds=3, device="cpu"), (plain.PROVIDER, OURS, COMPOSED))
    measure.write_csv(rows, tmp_path / "head.csv")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    return tmp_path


def test_table_of_the_cpu_and_of_gpus(results):
    text = table.head_table()
    assert text.endswith(table.NOT_ON_A_GPU)
    header, _, row = text.splitlines()[:3]
    assert header.count("|") == row.count("|")
    assert "time, ours, torch | time, composed | peak memory, ours | plain" in header
    assert row.startswith(f"| {SHAPE} | NextQuill | ")
    assert row.endswith("| 2 MiB | 1 MiB |")
    (results / "head-nvidia-h200.csv").write_bytes((results / "head.csv").read_bytes())
    both = table.head_table()
    assert table.NOT_ON_A_GPU not in both
    assert "TFLOP/s, ours (of GEMM)" in both
    assert both.count("Median [20th, 80th percentile] of 3 rounds") == 2


def test_picture_of_a_file(results, capsys):
    pytest.importorskip("matplotlib")
    assert plot.main(["--csv", str(results / "head.csv"), "--out", str(results / "bench.png")]) == 0
    assert (results / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not list(results.glob(".*tmp"))
    with (results / "head.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert plot.relative(rows)[str(SHAPE), "NextQuill", "ours, torch", "peak"] == 2.0
    with pytest.raises(ValueError, match="found none"):
        plot.draw([row for row in rows if row["head"] == FROZEN], results / "none.png")
