"""Personal tokens, as another evaluation marks them or as records name them, and the measures over them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from nextquill.errors import RecordError
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.measures import sum_measures
from nextquill.evaluation.personal_tokens import known_tokens, read_marks
from nextquill.evaluation.scoring import token_texts
from nextquill.models.tiny_models import build_tokenizer
from tests.evaluation.evaluation_helpers import RECORDS, contents, evaluate, lines_of, made_up_lines, without_manifest
from tests.models.model_helpers import tiny_model

KINDS = ("nll_personal", "nll_generic", "top1_personal", "top1_generic", "share_personal")


def copied(folder, target, change):
    """A copy of an evaluation's folder whose lines of effects are changed."""
    target.mkdir()
    for name, content in contents(folder).items():
        (target / name).write_bytes(content)
    lines = [change(line) for line in lines_of(folder)]
    (target / "effects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line))
    return without_manifest(target)


def assert_splitting_changes_no_sum(lines, names, **tokens):
    (name_of, values), first, rest = *tokens.items(), slice(0, 13), slice(13, None)
    whole = sum_measures(lines, **tokens)[0]
    parts = [sum_measures(lines[part], **{name_of: values[part]})[0] for part in (first, rest)]
    for name in names:
        sums = [part[name].scores.statistics.sum(0) for part in parts]
        np.testing.assert_allclose(whole[name].scores.statistics.sum(0), sum(sums), atol=1e-9, err_msg=name)


# ---- marked by another evaluation --------------------------------------------------------------


@pytest.fixture(scope="module")
def other():
    return tiny_model(initializer_range=0.6, seed=1)


def every_second(line):
    """A line in which every second token is likely under the own history only."""
    size = len(line["token_ids"])
    return line | {"nll_factual": [0.1 + k % 2 for k in range(size)], "nll_placebo": [1.2] * size}


@pytest.fixture(scope="module")
def marking(whole, tmp_path_factory):
    """An evaluation in which every second token is personal."""
    return copied(whole[1], tmp_path_factory.mktemp("marking") / "base", every_second)


@pytest.fixture(scope="module")
def measured(other, marking, tmp_path_factory):
    """Another model's evaluation with these marks."""
    folder = tmp_path_factory.mktemp("marked") / "out"
    return evaluate(other, folder, generate_branches=(), personal_from=marking), folder


def test_measures_over_marked_tokens_by_brute_force():
    lines, rng = made_up_lines(), np.random.default_rng(1)
    marks = [rng.random(len(line["token_ids"])) < 0.2 for line in lines]
    assert not all(each.any() for each in marks)
    measures, _ = sum_measures(lines, marked=marks)
    value = {name: measure.scores.value for name, measure in measures.items()}
    chosen, nll, top1 = (
        np.concatenate([*each])
        for each in (marks, [line["nll_factual"] for line in lines], [line["top1"] for line in lines])
    )
    for whose, those in (("personal", chosen), ("generic", ~chosen)):
        assert value[f"nll_{whose}"] == pytest.approx(nll[those].mean(), abs=1e-6)
        assert value[f"top1_{whose}"] == pytest.approx(top1[those].mean())
    assert value["share_personal"] == pytest.approx(chosen.mean())
    assert_splitting_changes_no_sum(lines, KINDS, marked=marks)


def test_tokens_are_marked_where_the_own_history_makes_them_likelier(measured):
    evaluation, folder = measured
    lines = lines_of(folder)
    nlls = [nll for line in lines for nll in line["nll_factual"][::2]]
    assert evaluation.metrics["nll_personal"].value == pytest.approx(np.mean(nlls), abs=1e-6)
    share = len(nlls) / sum(len(line["token_ids"]) for line in lines)
    assert evaluation.metrics["share_personal"].value == pytest.approx(share)
    assert evaluation.metrics["nll_personal"].label == "nll, personal tokens"
    assert evaluation.metrics["nll_personal"].low < evaluation.metrics["nll_personal"].value


def test_only_the_marks_count_not_where_they_lie(other, marking, measured, tmp_path):
    evaluation, folder = measured
    moved = copied(marking, tmp_path / "elsewhere", lambda line: line | {"nll_placebo": [1.15] * len(line["tokens"])})
    evaluate(other, tmp_path / "out", generate_branches=(), personal_from=str(moved))
    assert contents(tmp_path / "out") == contents(folder)
    unlike = copied(marking, tmp_path / "unlike", lambda line: line | {"nll_placebo": [0.1] * len(line["tokens"])})
    changed = evaluate(other, tmp_path / "b", generate_branches=(), personal_from=unlike)
    assert changed.settings["personal_from"] != evaluation.settings["personal_from"]
    assert changed.metrics["share_personal"].value == 0
    assert "nll_personal" not in changed.metrics


def test_marked_measures_are_paired(whole, model, marking, measured, tmp_path):
    own = evaluate(model, tmp_path / "own", generate_branches=(), personal_from=marking)
    found = compare_evaluations(tmp_path / "own", measured[1])
    for name in KINDS:
        difference = own.metrics[name].value - measured[0].metrics[name].value
        assert found[name].difference == pytest.approx(difference, abs=1e-6), name
    assert found["nll_personal"].difference != 0
    assert found["share_personal"].difference == 0
    assert not set(KINDS) & compare_evaluations(tmp_path / "own", whole[1]).keys()


SPOILT = {
    "no placebo": (lambda line: line.pop("nll_placebo") and line, "field 'nll_placebo': missing; a placebo needs"),
    "short": (lambda line: line | {"nll_placebo": [1.0] * 50}, "line 1: expected 'token_ids', 'nll_factual' and"),
    "no index": (lambda line: line | {"index": "a"}, "line 1: field 'index': expected an integer"),
    "lines": (lambda line: line["index"] != 2 and line, "effects.jsonl: expected a line for each of 6 records"),
    "tokens": (
        lambda line: line | {"token_ids": [9] * len(line["token_ids"])},
        "this tokenizer's tokens, but record 0",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_marks_that_do_not_fit_are_refused_before_anything_runs(whole, model, tmp_path, what):
    change, message = SPOILT[what]
    folder = copied(whole[1], tmp_path / "base", change)
    with pytest.raises(RecordError, match=f"personal_from: .*{message}"):
        evaluate(model, tmp_path / "out", personal_from=folder)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_other_records_is_refused(whole, model, tmp_path):
    with pytest.raises(RecordError, match=r"personal_from: .* of other records \(6\) than these \(4\)"):
        evaluate(model, tmp_path / "out", RECORDS[:4], personal_from=whole[1])
    with pytest.raises(RecordError, match=r"personal_from: .*evaluation\.json: cannot be read"):
        evaluate(model, tmp_path / "out", personal_from=tmp_path)


def test_marks_are_bool_and_of_every_token(whole):
    marks = read_marks(whole[1], RECORDS)
    assert [len(each) for each in marks.personal] == [len(line["token_ids"]) for line in lines_of(whole[1])]
    assert len(marks.digest) == 16


# ---- named by the records ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "strings", "known"),
    [
        (["Sen", ".", " D", "ole", " of", " Dole", "ville"], ["Dole"], [2, 3]),
        (["THE", " dole", "'s", " dole", "-", "out"], ["Dole"], [1, 3]),
        (["North", " Car", "olina", " and", " Carolina"], ["north carolina", "and"], [0, 1, 2, 3]),
        (["a", ".", "b", " a", "b", " a", ".b"], ["a.b"], [0, 1, 2, 5, 6]),
        (["in ", "", "", "東", "", "京", " city"], ["東京"], [1, 2, 3, 4, 5]),
        (["caf", "", "é", "s", " café"], ["Café"], [4]),
        (["Dole", ""], ["Dole"], [0]),
        (["Iowa"], [" Iowa "], [0]),
        (["Iowa"], [], []),
    ],
)
def test_known_tokens_overlap_whole_words(texts, strings, known):
    found = known_tokens(texts, strings)
    assert found.dtype == bool
    assert len(found) == len(texts)
    assert np.flatnonzero(found).tolist() == known


def test_known_tokens_of_a_real_tokenizer():
    tokenizer = build_tokenizer(["the senator of the senate"] * 3, 280)
    ids = tokenizer.encode("Senator Naïve of 東京, naïvely")
    texts = token_texts(tokenizer, ids)
    found = known_tokens(texts, ["naïve", "東京"])
    joined = "".join(text for text, is_known in zip(texts, found, strict=True) if is_known)
    assert joined.replace(" ", "") in ("Naïve東京", "Naïve東京,")
    assert sum(found) >= 10, "the bytes of characters count too"


def area(effects, known):
    """The exact area under the ROC curve, from all pairs."""
    above = effects[known][:, None] - effects[~known][None]
    return ((above > 0) + 0.5 * (above == 0)).mean()


def lines_with_effects(seed, shift, size=60, count=60):
    """Lines whose known tokens have effects larger by `shift` nats; some effects are tiny and some are equal."""
    rng, lines, known = np.random.default_rng(seed), [], []
    for _ in range(count):
        own = rng.random(size) < 0.07
        nll = np.where(rng.random(size) < 0.3, rng.exponential(1e-3, size), rng.gamma(1.0, 2.0, size))
        others = [np.maximum(nll + rng.standard_t(2, size) * 0.3 + shift * own, 0.0) for _ in range(2)]
        nlls = [each.round(6).tolist() for each in (nll, *others)]
        names = ("nll_factual", "nll_counterfactual", "nll_placebo")
        lines.append({"token_ids": [1] * size, **dict(zip(names, nlls, strict=True))})
        known.append(own)
    return lines, known


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_how_well_effects_find_known_tokens_by_brute_force(seed, shift):
    lines, known = lines_with_effects(seed, shift)
    measures, _ = sum_measures(lines, known=known)
    value = {name: measure.scores.value for name, measure in measures.items()}
    truth = np.concatenate(known)
    own, none, other = (
        np.concatenate([line[name] for line in lines]) for name in ("nll_factual", "nll_counterfactual", "nll_placebo")
    )
    for against, suffix in ((none, ""), (other, "_placebo")):
        effect = np.exp(-own) - np.exp(-against)
        assert value[f"auc_effect_prob{suffix}"] == pytest.approx(area(effect, truth), abs=1e-3)
        assert value[f"auc_effect_logprob{suffix}"] == pytest.approx(area(against - own, truth), abs=1e-3)
        found = effect > 0.05
        precision, recall = truth[found].mean(), found[truth].mean()
        assert value[f"precision_effect_prob{suffix}"] == pytest.approx(precision)
        assert value[f"recall_effect_prob{suffix}"] == pytest.approx(recall)
        assert value[f"f1_effect_prob{suffix}"] == pytest.approx(2 * precision * recall / (precision + recall))
    if shift == 3.0:
        assert value["auc_effect_logprob"] > 0.9
    assert_splitting_changes_no_sum(lines, measures, known=known)


def test_measures_without_anything_to_count_are_left_out():
    lines, known = lines_with_effects(0, 1.0, count=2)
    names = sum_measures(lines, known=[np.zeros_like(each) for each in known])[0].keys()
    assert not [name for name in names if name.startswith(("auc", "recall"))]
    assert not [name for name in sum_measures(lines, known=[np.ones_like(each) for each in known])[0] if "auc" in name]
    assert sum_measures(lines, known=[None, None])[0] == {}
    alone = [{name: value for name, value in line.items() if name != "nll_placebo"} for line in lines]
    assert "auc_effect_prob" in sum_measures(alone, known=known)[0]
    assert not [name for name in sum_measures(alone, known=known)[0] if "placebo" in name]


def test_records_that_name_personal_strings(model, whole, tmp_path):
    personal = [record.response.split()[:1] for record in RECORDS]
    records = [
        dataclasses.replace(record, extra={"personal": own} if index < 5 else {})
        for index, (record, own) in enumerate(zip(RECORDS, personal, strict=True))
    ]
    evaluation = evaluate(model, tmp_path / "a", records, generate_branches=())
    other = evaluate(tiny_model(initializer_range=0.6, seed=1), tmp_path / "b", records, generate_branches=())
    effects, known = [], []
    for line, own in zip(lines_of(tmp_path / "a")[:5], personal, strict=False):
        effects += [b - a for a, b in zip(line["nll_factual"], line["nll_placebo"], strict=True)]
        known += [text.strip() == own[0] for text in line["tokens"]]
    value = evaluation.metrics["auc_effect_logprob_placebo"].value
    assert value == pytest.approx(area(np.array(effects), np.array(known)), abs=1e-3)
    found = compare_evaluations(tmp_path / "a", tmp_path / "b")["auc_effect_logprob_placebo"]
    difference = value - other.metrics["auc_effect_logprob_placebo"].value
    assert (found.difference, found.num) == (pytest.approx(difference, abs=1e-9), 5)
    assert difference != 0
    assert "auc_effect_prob" not in whole[0].metrics


@pytest.mark.parametrize("value", ["Dole", [1], [" "], {"a": 1}])
def test_personal_strings_are_checked_before_anything_runs(model, tmp_path, value):
    records = [*RECORDS[:2], dataclasses.replace(RECORDS[2], extra={"personal": value})]
    with pytest.raises(RecordError, match="record 2: field 'personal': expected a list of strings, none of them blank"):
        evaluate(model, tmp_path / "out", records)
    assert not (tmp_path / "out").exists()
