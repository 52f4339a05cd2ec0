"""Suite `step` does not time wrong providers, counts per example, and measures memory in separate processes."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import measure, run, step, step_cases, step_memory, step_peers, table
from benchmarks.step_cases import (
    LLAMA,
    QWEN,
    REASONS,
    REVIEWS,
    SHORT,
    Case,
    build_model,
    cases,
    make_examples,
    pretrained_case,
    shrunken,
)
from nextquill.errors import UnsupportedModelError
from nextquill.models import tiny_models

CPU = torch.device("cpu")
TINY = shrunken(Case(LLAMA, REVIEWS))
#: With so many tokens no two queries begin alike by chance.
PLAIN = replace(TINY, model=replace(TINY.model, vocabulary=4096))
#: As a pretrained model is measured: with LoRA, queries of different lengths, and TRL.
LORA = shrunken(Case(replace(LLAMA, lora=16), REASONS, groups=(1, 8)))
TRL = ("SFT, TRL, padded", "SFT, TRL, padding-free")


def only(label, case=TINY):
    return {label: step_peers.providers(case)[label]}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The folder of a tiny pretrained chat model."""
    folder = tmp_path_factory.mktemp("model") / "Chat"
    tokenizer = tiny_models.build_tokenizer(["a person and a reason"], 300)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    tiny_models.build_model(tiny_models.ScratchSize(300, 64, 2, 2, 96), 0).save_pretrained(folder)
    return folder


# ---- cases -------------------------------------------------------------------------------------------


def test_examples_are_one_users_and_their_counterfactuals_lack_the_history():
    examples = make_examples(Case(LLAMA, REVIEWS))
    first, second = (example.factual.prompt_ids for example in examples[:2])
    assert first[:1800] == second[:1800]
    assert first[1800:] != second[1800:]
    assert len(first) == 50 + 1750 + 160
    for example in examples:
        assert example.counterfactual.prompt_ids[:50] == first[:50]
        assert example.counterfactual.prompt_ids[52:] == example.factual.prompt_ids[1800:]
        assert example.counterfactual.response_ids == example.factual.response_ids
        assert len(example.factual.response_ids) == 300


def test_queries_of_different_lengths_have_the_stated_mean():
    examples = make_examples(Case(LLAMA, REASONS))
    lengths = [len(example.factual.prompt_ids) - 20 - 250 for example in examples]
    assert (lengths[0], sum(lengths) / 8, lengths[-1]) == (90, 110, 130)
    assert {len(example.factual.response_ids) for example in examples} == {18}, "TRL's mean over tokens is another one"
    assert step.tokens_of(Case(LLAMA, REASONS), "SFT") == 20 + 250 + 110 + 18
    assert step.tokens_of(Case(LLAMA, REASONS), "SFT", 1) == 20 + 250 + 90 + 18


def test_a_pretrained_model_is_measured_with_its_own_weights_and_lora(chat_model):
    case = pretrained_case(str(chat_model), CPU)
    assert str(case) == "Chat, LoRA: 2 layers, D=64, V=300"
    assert case.lengths == REASONS
    model, saved = build_model(case.model, CPU), tiny_models.build_model(tiny_models.ScratchSize(300, 64, 2, 2, 96), 0)
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2, "A and B of seven linear layers in each of two layers"
    assert all("lora_" in name for name in trained)
    small = shrunken(case)
    assert (small.model.place, small.model.lora) == ("", 16)
    assert len({len(example.factual.prompt_ids) for example in make_examples(small)}) > 1, "the gate needs padding"


@pytest.mark.parametrize(("model", "billions"), [(QWEN[0], 0.494), (QWEN[1], 3.086)], ids=["0.5B", "3B"])
def test_shapes_of_the_gpu_cases_are_those_of_the_published_models(model, billions):
    parameters = build_model(model, torch.device("meta")).parameters()
    assert sum(parameter.numel() for parameter in parameters) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_a_case_travels_to_another_process_as_json():
    assert all(Case.from_json(case.to_json()) == case for case in (*cases(torch.device("cuda")), LORA))


# ---- the gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [shrunken(Case(LLAMA, REVIEWS)), shrunken(Case(QWEN[0], REVIEWS)), LORA],
    ids=["llama", "qwen2", "llama with LoRA, and TRL"],
)
def test_gate_passes(case):
    assert step.gate(case, CPU) == {}


def test_another_projects_trainer_with_a_wrong_gradient_is_left_out_with_the_reason(monkeypatch):
    right = step_peers.providers(LORA)

    def build(model, case, examples):
        micros = right[TRL[0]].build(model, case, examples)
        return [lambda: 0.999 * (loss := micros[0]()) + 0.001 * loss.detach()]

    monkeypatch.setattr(
        step, "providers", lambda case: {TRL[0]: replace(right[TRL[0]], build=build), TRL[1]: right[TRL[1]]}
    )
    reasons = step.gate(LORA, CPU)
    assert list(reasons) == [TRL[0]]
    assert reasons[TRL[0]].startswith("gradient of model.")


def test_another_projects_trainer_that_is_not_installed_gets_a_row_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(step, "providers", lambda case: only("SFT, unpadded", LORA) | only(TRL[1], LORA))
    monkeypatch.setattr(step, "cpu_peaks", lambda case, labels: {})
    rows = []
    step.measure(LORA, CPU, measure.Options(rounds=1), rows, None)
    assert [row.provider for row in rows] == ["unpadded"] * 5 + ["TRL, padding-free"]
    assert rows[-1].metric == "status"
    assert "trl" in rows[-1].note


def test_gate_refuses_a_wrong_loss(monkeypatch):
    right = step_peers.nextquill_objective
    monkeypatch.setattr(step_peers, "nextquill_objective", lambda *arguments: 1.0001 * right(*arguments))
    reasons = step.gate(TINY, CPU)
    assert list(reasons) == ["NextQuill, two passes"]
    assert reasons["NextQuill, two passes"].startswith("loss ")


def test_a_provider_of_ours_that_fails_is_left_out_and_fails_the_suite_at_its_end(monkeypatch):
    def build(model, case, examples):
        raise RuntimeError("CUDA error:\n an illegal memory access")

    broken = replace(only("SFT, ours, K=8")["SFT, ours, K=8"], build=build)
    monkeypatch.setattr(step, "providers", lambda case: only("SFT, unpadded") | {"SFT, ours, K=8": broken})
    monkeypatch.setattr(step, "cpu_peaks", lambda case, labels: {})
    monkeypatch.setattr(step, "cases", lambda device, quick: (TINY,))
    saved = []
    options = measure.Options(rounds=1, device="cpu", save=lambda rows: saved.append(list(rows)))
    with pytest.raises(measure.GateError, match=r"not timed: SFT, ours, K=8, .* illegal memory access"):
        step.run(options)
    assert {row.provider for row in saved[-1] if row.metric == "seconds"} == {"unpadded"}
    (status,) = (row for row in saved[-1] if row.metric == "status")
    assert status.note == "RuntimeError: CUDA error: an illegal memory access"


@pytest.mark.parametrize("label", ["NextQuill, official", "PerCE, ours, K=4", "SFT, unpadded"])
def test_gate_refuses_a_wrong_gradient(monkeypatch, label):
    right = step_peers.providers(TINY)[label]

    def build(model, case, examples):
        micros = right.build(model, case, examples)
        return [*micros[:-1], lambda: 0.999 * (last := micros[-1]()) + 0.001 * last.detach()]

    monkeypatch.setattr(step, "providers", lambda case: {label: replace(right, build=build)})
    assert re.match(r"gradient of model\.\S+ is off by", step.gate(TINY, CPU)[label])


def test_gate_refuses_examples_whose_tokens_all_weigh_the_same(monkeypatch):
    monkeypatch.setattr(step, "share_above_threshold", lambda model, examples: 0.0)
    with pytest.raises(measure.GateError, match=r"0\.0% of the gate's tokens"):
        step.gate(TINY, CPU)


def test_losses_are_checked_at_full_size_too(monkeypatch):
    entrants = only("NextQuill detached, ours, K=8")
    right = entrants["NextQuill detached, ours, K=8"]
    wrong = replace(right, build=lambda *given: [lambda: 1.001 * sum(micro() for micro in right.build(*given))])
    label = "NextQuill detached, ours, K=8"
    computed, reasons = step.check_full_size(build_model(TINY.model, CPU), TINY, {label: wrong})
    assert not computed
    assert reasons[label].startswith("loss ")


def test_what_the_official_scheme_pads_with_changes_nothing():
    model, examples = build_model(TINY.model, CPU), make_examples(TINY)[:1]
    longer = replace(TINY, lengths=replace(SHORT, padded=SHORT.padded + 40))
    short, long = (step_peers.official(model, case, examples)[0]().item() for case in (TINY, longer))
    assert long == pytest.approx(short, rel=1e-5)


# ---- what a step does --------------------------------------------------------------------------------


def test_tokens_that_go_through_the_model_are_counted():
    model, entrants = build_model(PLAIN.model, CPU), step_peers.providers(PLAIN)
    own = SHORT.query + SHORT.response
    factual, counterfactual = SHORT.system + SHORT.history + own, SHORT.system + SHORT.none + own
    computed, _ = step.check_full_size(model, PLAIN, entrants)
    assert computed["NextQuill, official"] == 2 * SHORT.padded
    assert computed["NextQuill, two passes"] == factual + counterfactual
    assert computed["NextQuill, ours, K=1"] == factual + counterfactual - SHORT.system
    shared = SHORT.system + SHORT.history + SHORT.none
    assert computed["NextQuill, ours, K=8"] == shared / 8 + 2 * own
    assert computed["PerCE, ours, K=8"] == (shared + SHORT.system) / 8 + 2 * own
    assert computed["SFT, ours, K=4"] == (SHORT.system + SHORT.history) / 4 + own
    assert computed["SFT, unpadded"] == factual == step.tokens_of(PLAIN, "SFT")
    assert step.tokens_of(PLAIN, "PerCE") == factual + counterfactual
    assert not model.get_input_embeddings()._forward_hooks


def test_trl_pads_to_the_longest_example_or_joins_them():
    computed, _ = step.check_full_size(
        build_model(LORA.model, CPU), LORA, {label: only(label, LORA)[label] for label in TRL}
    )
    mean = SHORT.system + SHORT.history + SHORT.query + SHORT.response
    assert computed == dict(zip(TRL, (mean + 3, mean), strict=True))


@pytest.mark.parametrize(
    ("case", "label"), [*((TINY, label) for label in step_peers.providers(TINY)), *((LORA, label) for label in TRL)]
)
def test_a_step_changes_the_parameters_and_leaves_the_model_to_the_next_provider(case, label):
    model = build_model(case.model, CPU)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step_peers.step(optimiser, step_memory.bind(model, case, step_peers.providers(case)[label]))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)


def test_figures_are_per_example():
    entrants = step_peers.providers(TINY)
    seconds = {"NextQuill, official": [10.0], "NextQuill, ours, K=8": [16.0], "SFT, unpadded": [8.0]}
    rows = step._time_rows(TINY, CPU, entrants, seconds, dict.fromkeys(seconds, 7.0))
    found = {(row.provider, row.metric): row.value for row in rows}
    assert found["official", "seconds"] == 10
    assert found["ours, K=8", "seconds"] == 2
    assert found["ours, K=8", "examples"] == 5
    assert found["ours, K=8", "time"] == 2
    assert found["ours, K=8", "rate"] == 0.5
    assert found["unpadded", "tokens"] == SHORT.system + SHORT.history + SHORT.query + SHORT.response
    assert found["official", "time"] == 10


@pytest.mark.slow
def test_suite_runs_and_saves_the_times_before_it_measures_memory(monkeypatch):
    monkeypatch.setattr(
        step, "cpu_peaks", lambda case, labels: {label: step_memory.Peak(2**30, 2**20) for label in labels}
    )
    saved = []
    rows = step.run(measure.Options(rounds=1, quick=True, device="cpu", save=lambda rows: saved.append(len(rows))))
    assert saved == [15 * 6, 15 * 8]
    assert len(rows) == 15 * 8
    assert [row.provider for row in rows[:16]] == ["official"] * 8 + ["two passes"] * 8
    assert {row.value for row in rows if row.metric == "step_peak"} == {1.0}


def test_quick_run_of_a_pretrained_model(chat_model, tmp_path, monkeypatch):
    peaks = dict.fromkeys(step_peers.providers(LORA), step_memory.Peak(2**30, 2**20))
    monkeypatch.setattr(step, "cpu_peaks", lambda case, labels: {label: peaks[label] for label in labels})
    monkeypatch.setattr(measure, "device_name", lambda kind: "AMD EPYC")
    given = ["--suite", "step", "--quick", "--rounds", "1", "--device", "cpu", "--model", str(chat_model)]
    assert run.main([*given, "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    rows = table.read("real-step-cpu-amd-epyc.csv")
    assert {row["case"] for row in rows} == {"Chat, LoRA: 2 layers, D=64, V=300"}
    assert {row["head"] for row in rows} == {"frozen"}
    assert list(dict.fromkeys(f"{row['loss']}, {row['provider']}" for row in rows)) == list(peaks)
    assert len(rows) == 8 * len(peaks)
    assert table.TABLES["real_step"]().count("\n| ") == len(peaks)
    assert table.TABLES["step_all"]() == table.NOT_MEASURED


def test_a_model_that_does_not_load_is_one_line(tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    given = ["--suite", "step", "--quick", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert run.main([*given, "--model", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"--model: no model in {folder}: no config.json or adapter_config.json\n"
    assert not captured.out
    assert not (tmp_path / "out").exists()


def test_a_model_whose_parts_have_other_names_is_refused(monkeypatch):
    from transformers import AutoModelForCausalLM, GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    monkeypatch.setattr(step_cases, "load_model", lambda place: (model, None))
    with pytest.raises(UnsupportedModelError, match="like Llama, got one without model, num_key_value_heads, inter"):
        pretrained_case("gpt2", CPU)


def test_a_model_with_an_adapter_is_refused(monkeypatch):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build_model(TINY.model, CPU), LoraConfig(target_modules="all-linear"))
    monkeypatch.setattr(step_cases, "load_model", lambda place: (adapted, None))
    with pytest.raises(UnsupportedModelError, match="expected a model without an adapter"):
        pretrained_case("adapter", CPU)


# ---- memory ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_process():
    """The official scheme holds logits of every position; ours holds those of a few rows, without padding."""
    case = replace(TINY, model=replace(TINY.model, vocabulary=20000), lengths=replace(SHORT, padded=512), examples=4)
    peaks = step_memory.cpu_peaks(case, ["NextQuill, official", "NextQuill, ours, K=4", "no such provider"])
    logits = 512 * 20000 * 4
    assert set(peaks) == {"NextQuill, official", "NextQuill, ours, K=4"}
    official, ours = peaks.values()
    assert 4 * logits < official.of_step < 20 * logits
    assert ours.of_step < 2 * logits
    assert 100 * 2**20 < ours.total - ours.of_step < 2**30


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_with_a_pretrained_model(chat_model):
    case = replace(pretrained_case(str(chat_model), CPU), lengths=replace(REASONS, history=1000))
    peaks = step_memory.cpu_peaks(case, [*TRL, "SFT, ours, K=8"])
    assert list(peaks) == [*TRL, "SFT, ours, K=8"]
    assert peaks[TRL[0]].of_step > 2 * peaks["SFT, ours, K=8"].of_step, "eight histories in place of one"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_measuring_process_that_takes_too_long_leaves_no_figures():
    assert step_memory.cpu_peaks(TINY, ["SFT, unpadded"], timeout=0.5) == {}


def test_who_does_not_fit_on_a_gpu_takes_no_part(monkeypatch):
    held = iter(range(100, 10**6, 100))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(held))
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)

    def too_large(model, case, examples):
        if case.lengths == SHORT:
            return step_peers.official(model, case, examples)
        raise torch.OutOfMemoryError

    case = replace(TINY, lengths=replace(SHORT, padded=65))
    entrants = only("SFT, unpadded") | only("NextQuill, ours, K=8")
    entrants["NextQuill, official"] = replace(only("NextQuill, official")["NextQuill, official"], build=too_large)
    model, reasons = build_model(TINY.model, CPU), {}
    peaks = step._cuda_peaks(model, step_memory.make_optimiser(model), case, entrants, reasons)
    assert peaks == {"SFT, unpadded": (200, 100), "NextQuill, ours, K=8": (400, 100)}
    assert list(entrants) == list(peaks)
    assert reasons == {"NextQuill, official": "out of memory"}


# ---- the table ---------------------------------------------------------------------------------------


METRICS = ("time", "computed", "peak", "step_peak", "examples")


def rows_of(case, figures, note="", device="CPU"):
    base = {"suite": "step", "case": case, "rounds": "3", "device": device, "threads": "2", "torch": "2.13"}
    base |= {"note": note, "dtype": "float32", "triton": "", "time": "2026-01-02T03:04Z"}
    return [
        base | {"loss": loss, "provider": provider, "metric": metric, "value": str(value)}
        for (loss, provider), own in figures.items()
        for metric, value in own.items()
    ]


def step_table(monkeypatch, folder, **files):
    """The table for a folder of results, given as rows by file name."""
    for name, rows in files.items():
        with (folder / f"{name.replace('_', '-')}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    monkeypatch.setattr(table, "RESULTS", folder)
    return table.step_table().split("\n\n")


def test_table(monkeypatch, tmp_path):
    figures = {
        ("NextQuill", "official"): dict(zip(METRICS, (50.123, 8194.0, 12000.0, 11000.0, 1.0), strict=True)),
        ("NextQuill detached", "ours, K=8"): dict(zip(METRICS, (0.5678, 1145.4, 900.0, 400.4, 88.88), strict=True)),
    }
    rows = rows_of("Llama: 4 layers", figures)
    rows += rows_of("big", {("SFT", "unpadded"): {"status": "nan"}}, "no room")
    rows += rows_of("big", {("NextQuill detached", "ours, K=8"): {"examples": 2.0, "time": 1.0, "computed": 5.0}})
    small, foot, big, _, unmeasured = step_table(monkeypatch, tmp_path, step_cpu_x=rows)
    columns = ("time per example, CPU", "tokens computed per example", "peak memory", "of the step", "examples/s, CPU")
    assert small.splitlines() == [
        f"| {' | '.join(('Llama: 4 layers', *columns))} |",
        "|---|---|---|---|---|---|",
        "| NextQuill, official | 50.1× | 8194 | 11.7 GiB | 10.7 GiB | 1× |",
        "| NextQuill detached, ours, K=8 | 0.568× | 1145 | 900 MiB | 400 MiB | 88.9× |",
    ]
    assert foot.endswith("Median of 3 rounds in one run; CPU, 2 threads, torch 2.13, float32, 2026-01-02.")
    assert big.splitlines()[2] == "| SFT, unpadded | no room | – | – | – | no room |"
    assert big.splitlines()[3] == "| NextQuill detached, ours, K=8 | 1× | 5 | – | – | 2× |"
    assert unmeasured == table.NOT_ON_A_GPU


def test_table_of_two_processors_and_a_gpu(monkeypatch, tmp_path):
    official, ours = ("NextQuill", "official"), ("NextQuill detached", "ours, K=8")
    epyc = {official: dict(zip(METRICS, (24.8, 8194.0, 5753.0, 5217.0, 1.0), strict=True))}
    epyc |= {ours: dict(zip(METRICS, (0.54, 1152.0, 1157.0, 614.0, 46.0), strict=True))}
    xeon = {ours: dict(zip(METRICS, (0.52, 1152.0, 1200.0, 620.0, 26.5), strict=True))}
    gpu = {ours: dict(zip(METRICS, (0.3, 1152.0, 9.0, 8.0, 70.0), strict=True))}
    llama, foot, qwen, gpu_foot = step_table(
        monkeypatch,
        tmp_path,
        step_nvidia_h200=rows_of("Qwen", gpu, device="NVIDIA H200"),
        step_cpu_intel_xeon=rows_of("Llama", xeon, device="Intel(R) Xeon(R) Processor"),
        step_cpu_amd_epyc=rows_of("Llama", epyc, device="AMD EPYC"),
    )
    columns = (
        "time per example, AMD EPYC", "Intel Xeon", "tokens computed per example", "peak memory", "of the step",
        "examples/s, AMD EPYC", "Intel Xeon",
    )  # fmt: skip
    assert llama.splitlines() == [
        f"| {' | '.join(('Llama', *columns))} |",
        "|---|---|---|---|---|---|---|---|",
        "| NextQuill, official | 24.8× | – | 8194 | 5753 MiB | 5217 MiB | 1× | – |",
        "| NextQuill detached, ours, K=8 | 0.54× | 0.52× | 1152 | 1157 MiB | 614 MiB | 46× | 26.5× |",
    ]
    assert "Memory and tokens are those of the AMD EPYC." in foot
    assert foot.endswith(
        "Median of 3 rounds in one run each; AMD EPYC, 2 threads, torch 2.13, float32, 2026-01-02; "
        "Intel Xeon, 2 threads, torch 2.13, float32, 2026-01-02."
    )
    assert qwen.splitlines()[0].startswith("| Qwen | time per example, NVIDIA H200 | tokens")
    assert "Memory and tokens" not in gpu_foot
