"""An evaluation: the files in its folder, their contents, and a resume after a stop."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from nextquill.data import ExampleEncoder
from nextquill.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    BudgetError,
    RecordError,
)
from nextquill.evaluation import measures
from nextquill.evaluation.bootstrap import bootstrap_interval
from nextquill.evaluation.measures import place_of
from nextquill.evaluation.metrics import MetricScores, compute
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.predictions import read_predictions
from nextquill.evaluation.results import read_evaluation, read_examples, read_item_effects
from nextquill.evaluation.scoring import score_examples
from nextquill.models.loading import PromptSettings
from tests.evaluation.evaluation_helpers import ALL, FILES, RECORDS, contents, evaluate
from tests.models.model_helpers import TEMPLATE, tiny_model, word_tokenizer

# ---- results -----------------------------------------------------------------------------------


def test_files(whole):
    evaluation, folder = whole
    assert set(contents(folder)) == FILES
    assert read_evaluation(folder) == evaluation
    assert (evaluation.model, evaluation.task, evaluation.num_examples, evaluation.level) == ("tiny", "lamp_4", 6, 0.95)


def test_settings_say_whether_the_chat_template_was_used(whole):
    """Not "if there is one": a trained model's settings say it, and a base model's are compared with them."""
    assert whole[0].settings["template"]["chat"] is False


def test_nll_and_effects_are_those_of_scoring(whole, model):
    evaluation, folder = whole
    encoder = ExampleEncoder(word_tokenizer(), TEMPLATE, 64)
    scored = list(score_examples(model, encoder.encode_all(RECORDS, True, 42)))
    scored.sort(key=lambda each: each.example.index)
    tokens = {
        "nll_factual": [each.nll_factual for each in scored],
        "nll_counterfactual": [each.nll_counterfactual for each in scored],
        "nll_placebo": [each.nll_placebo for each in scored],
        "effect_logprob": [each.effect_logprob for each in scored],
        "effect_placebo": [each.nll_placebo - each.nll_factual for each in scored],
        "effect_prob": [each.effect_prob for each in scored],
        "share_above_threshold": [(each.effect_prob > 0.05).float() for each in scored],
    }
    examples = read_examples(folder)
    for name, values in tokens.items():
        metric, per_example = evaluation.metrics[name], evaluation.metrics[f"{name}_per_example"]
        assert metric.value == pytest.approx(float(torch.cat(values).double().mean()), abs=2e-6), name
        means = [float(each.double().mean()) for each in values]
        assert per_example.value == pytest.approx(np.mean(means), abs=2e-6), name
        assert [example.scores[name] for example in examples] == pytest.approx(means, abs=2e-6), name
        assert (metric.per_example, per_example.per_example) == (None, name)
    assert [example.scores["tokens"] for example in examples] == [len(each.token_ids) for each in scored]
    assert evaluation.metrics["tokens"].value == sum(len(each.token_ids) for each in scored)
    assert (evaluation.metrics["examples"].value, evaluation.metrics["users"].value) == (6, 3)


def test_measures_by_hand():
    lines = [
        {"token_ids": [1, 2], "nll_factual": [1.0, 2.0], "nll_counterfactual": [2.0, 2.0], "nll_placebo": [3.0, 2.0]},
        {"token_ids": [1], "nll_factual": [3.0], "nll_counterfactual": [5.0], "nll_placebo": [4.0]},
    ]
    found, scores = measures.effect_measures(lines)
    value = {name: measure.scores.value for name, measure in found.items()}
    assert (value["nll_factual"], value["nll_counterfactual"]) == (2.0, 3.0)
    assert (value["effect_logprob"], value["effect_placebo"]) == (1.0, 1.0)
    assert value["share_above_threshold"] == pytest.approx(1 / 3), "e^-1 - e^-2 = 0.23, 0, e^-3 - e^-5 = 0.043"
    assert (value["nll_factual_per_example"], value["effect_logprob_per_example"]) == (2.25, 1.25)
    assert (scores[0]["nll_factual"], scores[0]["tokens"], scores[1]["effect_placebo"]) == (1.5, 2.0, 1.0)


def test_intervals_draw_users(whole):
    evaluation, folder = whole
    examples = read_examples(folder)
    users = [example.user_id for example in examples]
    options = {"level": 0.95, "resamples": 50, "seed": 42}
    sizes = [example.scores["tokens"] for example in examples]
    sums = [example.scores["nll_factual"] * size for example, size in zip(examples, sizes, strict=True)]
    expected = bootstrap_interval(MetricScores.ratio_of(sums, sizes), users, **options)
    metric = evaluation.metrics["nll_factual"]
    assert (metric.low, metric.high) == pytest.approx((expected.low, expected.high))
    assert metric.low < metric.value < metric.high
    mean = bootstrap_interval([example.scores["nll_factual"] for example in examples], users, **options)
    metric = evaluation.metrics["nll_factual_per_example"]
    assert (metric.low, metric.high) == pytest.approx((mean.low, mean.high))


def test_examples_are_the_records_and_their_texts_are_scored(whole):
    evaluation, folder = whole
    examples = read_examples(folder)
    for index, (example, record) in enumerate(zip(examples, RECORDS, strict=True)):
        own = (example.index, example.user_id, example.query, example.response, example.history_total)
        assert own == (index, record.user_id, record.query, record.response, len(record.history))
        assert set(example.generated) == {"factual", "counterfactual", "placebo"}
    references = [record.response for record in RECORDS]
    for branch, suffix in (("factual", ""), ("counterfactual", "_counterfactual"), ("placebo", "_placebo")):
        texts = [example.generated[branch] for example in examples]
        for name, scores in compute(["rouge_1", "rouge_l"], references, texts).items():
            assert evaluation.metrics[f"{name}{suffix}"].value == pytest.approx(scores.value)
            assert [example.scores[f"{name}{suffix}"] for example in examples] == pytest.approx(
                list(scores.per_example)
            )
    assert evaluation.metrics["rouge_1_placebo"].label == "ROUGE-1, generated with another's history"
    assert len({example.generated["factual"] for example in examples}) > 2


def test_predictions_are_what_the_tasks_own_scorer_reads(whole):
    _, folder = whole
    found = read_predictions(folder / "predictions.json")
    assert found.task == "LaMP_4"
    assert found.outputs == {str(each.index): each.generated["factual"] for each in read_examples(folder)}


def test_preferences_are_means_of_the_examples(whole):
    evaluation, folder = whole
    examples = read_examples(folder)
    names = [
        f"preference_{kind}{per_token}{suffix}"
        for kind in ("accuracy", "margin")
        for per_token in ("", "_per_token")
        for suffix in ("", "_counterfactual", "_placebo")
    ]
    for name in names:
        metric = evaluation.metrics[name]
        assert metric.value == pytest.approx(np.mean([example.scores[name] for example in examples]))
        assert metric.per_example == name
    assert evaluation.metrics["preference_margin_counterfactual"].value != evaluation.metrics["preference_margin"].value


def test_items_of_the_first_examples_with_history(model, whole, tmp_path):
    _, folder = whole
    assert [each.index for each in read_item_effects(folder)] == [0, 1]
    records = [dataclasses.replace(RECORDS[0], history=()), *RECORDS[1:4]]
    evaluate(model, tmp_path, records, item_effects=2, generate_branches=())
    assert [each.index for each in read_item_effects(tmp_path)] == [1, 2]


def test_only_the_requested_measures(model, tmp_path):
    records = [dataclasses.replace(record, extra={}) for record in RECORDS]
    evaluation = evaluate(model, tmp_path, records, generate_branches=())
    assert set(contents(tmp_path)) == {"evaluation.json", "examples.jsonl", "effects.jsonl"}
    assert not [name for name in evaluation.metrics if name.startswith(("rouge", "preference"))]


def test_some_texts_and_other_measures(model, tmp_path):
    evaluation = evaluate(model, tmp_path, generate_limit=2, metrics=("bleu", "exact_match"))
    examples = read_examples(tmp_path)
    assert [bool(example.generated) for example in examples] == [True, True, False, False, False, False]
    assert evaluation.metrics["bleu"].per_example is None
    assert "rouge_l" not in evaluation.metrics
    assert ["exact_match" in example.scores for example in examples] == [True, True, False, False, False, False]


def test_texts_are_the_best_of_several_samples(model, tmp_path):
    options = {"temperature": 2.0, "max_new_tokens": 5, "generate_branches": ("factual", "counterfactual")}
    one, best = (evaluate(model, tmp_path / str(n), best_of=n, **options) for n in (1, 6))
    texts = [[example.generated for example in read_examples(tmp_path / n)] for n in ("1", "6")]
    assert [each["factual"] for each in texts[0]] != [each["factual"] for each in texts[1]]
    # nothing to compare with
    assert [each["counterfactual"] for each in texts[0]] == [each["counterfactual"] for each in texts[1]]
    assert "best_of" not in one.settings
    assert best.settings["best_of"] == 6


def test_one_user_has_no_placebo_and_no_interval(model, tmp_path):
    records = [dataclasses.replace(record, user_id="only") for record in RECORDS]
    evaluation = evaluate(model, tmp_path, records, generate_branches=())
    assert not [name for name in evaluation.metrics if "placebo" in name]
    assert evaluation.metrics["nll_factual"].low is None
    with pytest.raises(ArgumentError, match="branch: expected examples with a placebo branch"):
        evaluate(model, tmp_path / "other", records, generate_branches=("placebo",))
    assert not (tmp_path / "other").exists()


def test_padded_batches_give_the_same_measures(model, whole, tmp_path):
    evaluation = evaluate(model, tmp_path, **ALL, attention="padded", batch_size=2)
    for name, metric in whole[0].metrics.items():
        assert evaluation.metrics[name].value == pytest.approx(metric.value, abs=1e-4), name


def test_the_model_is_left_as_it_was(model, tmp_path):
    model.train()
    config = model.generation_config
    evaluate(model, tmp_path, item_effects=1)
    assert model.training
    assert model.generation_config is config
    model.eval()


def test_an_adapter_is_measured_with_its_base(tmp_path):
    base = tiny_model(initializer_range=0.6)
    plain = evaluate(base, tmp_path / "base", item_effects=1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = evaluate(get_peft_model(base, config), tmp_path / "adapted", item_effects=1)
    assert adapted.records == plain.records
    for name in ("nll_factual", "preference_margin"):
        assert abs(adapted.metrics[name].value - plain.metrics[name].value) > 1e-3
    texts = [[each.generated for each in read_examples(tmp_path / name)] for name in ("base", "adapted")]
    assert texts[0] != texts[1]


def test_places_of_measures_cover_all(whole):
    evaluation, _ = whole
    without = [name for name in evaluation.metrics if place_of(name) is None]
    assert without == ["examples", "users", "pairs", "tokens"]
    places = [place_of(name) for name in evaluation.metrics if name not in without]
    assert len(set(places)) == len(places)
    assert place_of("rouge_l_placebo") == ("texts", "ROUGE-L", "another's")


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "lamp_33"}, "task: expected one of lamp_1, .*, got 'lamp_33'; did you mean 'lamp_3'"),
        ({"metrics": ("rouge_l", "rogue_l")}, "metrics: .*, got 'rogue_l'; did you mean 'rouge_l'"),
        ({"generate_branches": ("own",)}, "generate_branches: expected one of factual, counterfactual, placebo"),
        ({"generate_branches": ("factual", "factual")}, "generate_branches: expected each name once"),
        ({"metrics": ("bleu",), "generate_branches": ()}, "metrics: bleu measures generated texts, and none are"),
        ({"level": 1.0}, "level: expected a share between 0 and 1"),
        ({"resamples": 0}, "resamples: expected at least 1, got 0"),
        ({"item_effects": -1}, "item_effects: expected at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive number, got 0"),
        ({"attention": "fast"}, "attention: expected one of auto"),
        ({"engine": "tgi"}, "engine: expected one of auto, tree, hf, vllm, got 'tgi'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        EvaluationOptions(**options)


def test_options_have_types():
    with pytest.raises(ArgumentTypeError, match="generate_branches: expected a tuple of names, got 'factual'"):
        EvaluationOptions(generate_branches="factual")
    with pytest.raises(ArgumentTypeError, match=r"seed: expected an integer, got 1\.5"):
        EvaluationOptions(seed=1.5)


LACKING = {
    "labels": ({"task": "lamp_1"}, {}, "record 0: field 'response': lamp_1 expects one of"),
    "ratings": ({"task": "lamp_3"}, {}, "record 0: field 'response': lamp_3 expects a rating"),
    "pairs": ({"task": "preferences"}, {"extra": {}}, "record 2: field 'chosen': preferences needs it"),
    "half": ({}, {"extra": {"chosen": "w1"}}, "record 2: field 'rejected': expected it beside 'chosen'"),
    "ids": ({"task": "lamp_4"}, {"extra": {"id": "1"}}, "record 2: field 'id': expected one of its own for lamp_4"),
}


@pytest.mark.parametrize("what", LACKING)
def test_a_record_without_its_tasks_fields_is_named_before_anything_runs(model, tmp_path, what):
    options, changed, message = LACKING[what]
    records = [*RECORDS[:2], dataclasses.replace(RECORDS[2], **changed)]
    with pytest.raises(RecordError, match=message):
        evaluate(model, tmp_path / "out", records, **options)
    assert not (tmp_path / "out").exists()


def test_the_task_of_pairs_generates_nothing(model, tmp_path):
    evaluation = evaluate(model, tmp_path, task="preferences")
    assert not any(example.generated for example in read_examples(tmp_path))
    assert "preference_accuracy" in evaluation.metrics


def test_texts_that_do_not_fit_are_named_before_anything_runs(model, tmp_path):
    with pytest.raises(BudgetError, match="record 0"):
        evaluate(model, tmp_path / "out", settings=PromptSettings(TEMPLATE, 3))
    wide = [dataclasses.replace(RECORDS[0], extra={"chosen": "w1 " * 30, "rejected": "w2"}), *RECORDS[1:]]
    with pytest.raises(
        BudgetError, match=r"max_tokens: expected at least the \d+ tokens that .* of record 0 take, got 30"
    ):
        evaluate(model, tmp_path / "out", wide, max_tokens=30)
    assert not (tmp_path / "out").exists()


def test_no_records_and_no_vllm(model, tmp_path, monkeypatch):
    with pytest.raises(RecordError, match="records: expected at least one, got none"):
        evaluate(model, tmp_path, [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="engine: 'vllm' needs vLLM"):
        evaluate(model, tmp_path, engine="vllm")
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_is_json(whole):
    _, folder = whole
    json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
