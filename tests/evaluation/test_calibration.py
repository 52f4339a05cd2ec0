"""The calibration of response tokens: what the head's rows say, and the measures that follow from it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from nextquill import SFTLoss
from nextquill.data import Branch
from nextquill.errors import ArgumentError
from nextquill.evaluation import calibration as module
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.measures import sum_measures, token_values
from nextquill.evaluation.results import read_examples
from nextquill.evaluation.scoring import effect_line, score_examples
from nextquill.evaluation.token_measures import CONFIDENCE_BINS, TEMPERATURES, token_statistics
from tests.evaluation.evaluation_helpers import RECORDS, contents, evaluate, made_up_lines, without_manifest
from tests.models.model_helpers import random_examples, tiny_model, word_tokenizer

# ---- tokens ------------------------------------------------------------------------------------


def expected(model, branch):
    """Top-1, confidence and NLLs of a response from the model's own logits in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([branch.input_ids])).logits[0].double()[len(branch.prompt_ids) - 1 : -1]
    labels = torch.tensor(branch.response_ids)
    nlls = [torch.nn.functional.cross_entropy(logits / t, labels, reduction="none") for t in TEMPERATURES]
    return logits.argmax(1) == labels, logits.softmax(1).amax(1), torch.stack(nlls, 1)


def with_likely_response(model, example):
    """The example with a response whose first tokens are the most likely ones."""
    prompt, response = example.factual.prompt_ids, list(example.factual.response_ids)
    with torch.no_grad():
        for at in range(min(3, len(response))):
            response[at] = int(model(torch.tensor([prompt + response[:at]])).logits[0, -1].argmax())
    names = ("factual", "counterfactual", "placebo")
    changed = {name: Branch(getattr(example, name).prompt_ids, response) for name in names}
    return dataclasses.replace(example, **changed)


@pytest.mark.parametrize("attention", ["auto", "padded"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_calibration_is_that_of_the_models_own_logits(kind, attention, monkeypatch):
    monkeypatch.setattr(module, "_LOGIT_BYTES", 2 * 4 * 96 * 4)  # four rows at a time
    monkeypatch.setattr(module, "_WEIGHT_ROWS", 40)
    options = {"logits_scaling": 3.0} if kind == "granite" else {"final_logit_softcapping": 2.0}
    model, examples = tiny_model(kind, **({} if kind == "llama" else options)), random_examples(5)
    examples[0] = with_likely_response(model, examples[0])
    scored = list(score_examples(model, examples, attention=attention, calibrated=True))
    assert any(scores.calibration.top1.any() for scores in scored)
    for scores in scored:
        top1, confidence, nlls = expected(model, scores.example.factual)
        assert torch.equal(scores.calibration.top1, top1)
        torch.testing.assert_close(scores.calibration.confidence.double(), confidence, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scores.calibration.nll_by_temperature.double(), nlls, rtol=1e-4, atol=1e-5)
        at_one = scores.calibration.nll_by_temperature[:, TEMPERATURES.index(1.0)]
        torch.testing.assert_close(at_one, scores.nll_factual, rtol=1e-4, atol=1e-5)


def test_a_half_precision_head_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (7, 50))
    bias, labels = torch.randn(50, generator=generator).bfloat16(), torch.arange(7)
    state, loss = module.HeadState(rows[None], weight, bias), SFTLoss(softcap=5.0, logit_scale=0.5)
    found = module.calibration(rows, state, labels, loss)
    logits = 5 * (0.5 * (rows.double() @ weight.double().T + bias.double()) / 5).tanh()
    torch.testing.assert_close(found.confidence.double(), logits.softmax(1).amax(1), rtol=1e-5, atol=0)
    nll = torch.nn.functional.cross_entropy(logits / TEMPERATURES[0], labels, reduction="none")
    torch.testing.assert_close(found.nll_by_temperature[:, 0].double(), nll, rtol=1e-5, atol=1e-6)


def test_scores_without_calibration_are_as_before():
    (plain,), (calibrated,) = (
        list(score_examples(tiny_model(), random_examples(1), calibrated=each)) for each in (False, True)
    )
    assert plain.calibration is None
    assert torch.equal(plain.nll_factual, calibrated.nll_factual)
    line, more = (effect_line(each, word_tokenizer()) for each in (plain, calibrated))
    assert line.pop("digest") != more.pop("digest")
    assert {name: more[name] for name in line} == line
    assert more.keys() - line.keys() == {"top1", "confidence", "nll_by_temperature"}
    assert len(more["nll_by_temperature"]) == len(TEMPERATURES)
    assert set(more["top1"]) <= {0, 1}


# ---- measures ----------------------------------------------------------------------------------


def test_measures_by_brute_force():
    lines = made_up_lines()
    confidence, right = (np.array([each for line in lines for each in line[name]]) for name in ("confidence", "top1"))
    ece = 0.0
    for k in range(CONFIDENCE_BINS):
        inside = (confidence > k / CONFIDENCE_BINS) & (confidence <= (k + 1) / CONFIDENCE_BINS)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    nlls = np.array([line["nll_by_temperature"] for line in lines]).sum(0) / len(right)
    measures, _ = sum_measures(lines)
    value = {name: measure.scores.value for name, measure in measures.items()}
    assert ece > 0.05
    assert value["ece"] == pytest.approx(ece, abs=1e-6)
    assert value["temperature"] == TEMPERATURES[nlls.argmin()]
    assert nlls.argmin() not in (0, len(nlls) - 1)
    assert value["nll_at_temperature"] == pytest.approx(nlls.min())
    fixed, _ = sum_measures(lines, 1.8)
    assert fixed["nll_at_temperature"].scores.value == pytest.approx(nlls[TEMPERATURES.index(1.8)])
    assert fixed["temperature"].scores.value == value["temperature"]
    labels = [each["nll_at_temperature"].label for each in (measures, fixed)]
    assert labels == ["nll at the best temperature", "nll at temperature 1.8"]


def test_splitting_the_records_changes_no_sum():
    lines = made_up_lines()
    whole, parts = sum_measures(lines)[0], [sum_measures(part)[0] for part in (lines[:13], lines[13:])]
    for name, measure in whole.items():
        sums = [part[name].scores.statistics.sum(0) for part in parts]
        np.testing.assert_allclose(measure.scores.statistics.sum(0), sum(sums), atol=1e-9, err_msg=name)


def test_lines_of_earlier_versions_have_no_calibration():
    line = made_up_lines(2)[1]
    old = {name: value for name, value in line.items() if name not in ("top1", "confidence", "nll_by_temperature")}
    assert token_statistics(old, token_values(old)) == {}
    assert sum_measures([old])[0] == {}


def test_an_evaluation_holds_them_and_its_examples_the_sums(whole, tmp_path, model):
    evaluation, folder = whole
    lines = [json.loads(line) for line in (folder / "effects.jsonl").read_text().splitlines()]
    measures, rows = sum_measures(lines)
    for name, measure in measures.items():
        assert evaluation.metrics[name].value == measure.scores.value
        assert evaluation.metrics[name].low <= evaluation.metrics[name].high
    assert [example.statistics for example in read_examples(folder)] == rows
    right = [each for line in lines for each in line["top1"]]
    assert evaluation.metrics["top1"].value == pytest.approx(np.mean(right))
    # Some of them scored alone give the same lines up to rounding.
    evaluate(model, tmp_path, RECORDS[:2], generate_branches=())
    alone = json.loads((tmp_path / "effects.jsonl").read_text().splitlines()[0])
    assert alone["nll_by_temperature"] == pytest.approx(lines[0]["nll_by_temperature"], abs=1e-4)


def test_evaluations_are_paired(whole, model, tmp_path):
    evaluation, folder = whole
    other = evaluate(tiny_model(initializer_range=0.6, seed=1), tmp_path / "b", generate_branches=())
    found = compare_evaluations(folder, tmp_path / "b")
    for name in ("top1", "ece", "temperature", "nll_at_temperature"):
        difference = evaluation.metrics[name].value - other.metrics[name].value
        assert found[name].difference == pytest.approx(difference, abs=1e-6), name
        assert found[name].low <= difference + 1e-6, name
        assert found[name].num == 6


def test_an_evaluation_of_an_earlier_version_is_still_compared(whole, tmp_path):
    _, folder = whole
    for name, content in contents(folder).items():
        (tmp_path / name).write_bytes(content)
    without_manifest(tmp_path)
    raw = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("top1", "top1_per_example", "ece", "temperature", "nll_at_temperature"):
        del raw["metrics"][name]
    (tmp_path / "evaluation.json").write_text(json.dumps(raw))
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    for line in lines:
        del line["statistics"], line["scores"]["top1"]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_evaluations(folder, tmp_path)
    assert "nll_factual" in found
    assert not {"top1", "ece", "temperature"} & found.keys()


def test_a_fixed_temperature(model, tmp_path):
    evaluation = evaluate(model, tmp_path, generate_branches=(), score_temperature=2.0)
    lines = [json.loads(line) for line in (tmp_path / "effects.jsonl").read_text().splitlines()]
    total = sum(line["nll_by_temperature"][TEMPERATURES.index(2.0)] for line in lines)
    assert evaluation.metrics["nll_at_temperature"].value == pytest.approx(total / evaluation.metrics["tokens"].value)
    assert evaluation.settings["score_temperature"] == 2.0
    with pytest.raises(ArgumentError, match=r"score_temperature: expected one of 0\.7, 0\.8, .*, got 1\.3"):
        evaluate(model, tmp_path / "no", score_temperature=1.3)
