"""The study: who is trained on and measured, which runs there are, and that a killed study gives the same tables."""

import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.measure import RESULTS
from benchmarks.study import best_of, tables
from benchmarks.study.__main__ import main
from benchmarks.study.folder import RUNS, alone, make_study
from benchmarks.study.methods import (
    BASE,
    LATER,
    METHODS,
    ShuffledWeighting,
    WarmUp,
    WarmWeighting,
    without_copied,
    words_shuffled,
)
from benchmarks.study.people import DEV, SEEN, TEST, Size, Sizes, read_people
from benchmarks.study.picture import PICTURE, picture
from benchmarks.study.plan import PRESETS, BestOf, Decoding, Run, planned
from benchmarks.study.run import Worker
from nextquill.data import Branch, EncodedExample, HistoryItem, Record, load_effects, load_records
from nextquill.errors import ArgumentError, OutputExistsError
from nextquill.evaluation.bootstrap import SeedsResult
from nextquill.evaluation.scoring import ExampleScores, effect_line
from nextquill.models.loading import load_model
from nextquill.outputs import PairNLL
from nextquill.weighting import ClipWeighting

WORDS = [f"word{place}" for place in range(40)]
TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
ROOT = Path(__file__).parents[2]


def texts(user, purpose, count):
    draw = random.Random(f"{user} {purpose}")
    return [" ".join(draw.choices(WORDS[user : user + 4] + WORDS[:8], k=6)) for _ in range(count)]


def write_records(path, users, purpose, each):
    lines = [
        {"user_id": f"u{user}", "query": f"Write {place}.", "history": texts(user, "history", 3), "response": text}
        for user in users
        for place, text in enumerate(texts(user, purpose, each))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set, a model and general prose."""
    folder = tmp_path_factory.mktemp("world")
    data = folder / "data"
    data.mkdir()
    write_records(data / "train.jsonl", range(16), "train", 4)
    write_records(data / "test_seen.jsonl", range(16), "later", 2)
    write_records(data / "test_unseen.jsonl", range(20, 26), "test", 2)
    (data / "persons.json").write_text(json.dumps({f"u{user}": {"word": WORDS[user]} for user in range(30)}))
    (folder / "prose.txt").write_text(" ".join(random.Random(1).choices(WORDS, k=200)))
    model, tokenizer = load_model("tiny", records=lambda: load_records(data / "train.jsonl"))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "plain")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


def flags(world, out):
    given = {"preset": "smoke", "model": world / "model", "data": f"toy={world / 'data'}", "out": out}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


# ---- people ----------------------------------------------------------------------------------------

SIZES = PRESETS["smoke"].sizes


def users(records):
    return {record.user_id for record in records}


def test_nobody_is_in_two_sets_that_must_differ(world):
    people = read_people("toy", world / "data", SIZES)
    trained, dev, test = users(people.train), users(people.sets[DEV]), users(people.sets[TEST])
    assert not trained & dev
    assert not trained & test
    assert not dev & test
    assert users(people.sets[SEEN]) <= trained
    assert {"train": len(trained), **{name: len(users(each)) for name, each in people.sets.items()}} == {
        "train": 8, DEV: 3, TEST: 4, SEEN: 3,
    }  # fmt: skip
    assert list(people.sets) == [DEV, TEST, SEEN], "the first decides the temperature of the others"
    first = people.sets[TEST][0]
    assert first.extra["personal"] == [WORDS[int(first.user_id[1:])]]
    assert read_people("toy", world / "data", SIZES).digest() == people.digest()
    assert read_people("toy", world / "data", dataclasses.replace(SIZES, dev=Size(2, 2))).digest() != people.digest()


def test_all_first_texts_come_before_any_second(world):
    people = read_people("toy", world / "data", dataclasses.replace(SIZES, test=Size(4, 7)))
    names = [record.user_id for record in people.sets[TEST]]
    assert len(names) == 7
    assert len(set(names[:4])) == 4


def test_a_person_in_both_files_is_refused(world, tmp_path):
    for path in (world / "data").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_records(tmp_path / "test_unseen.jsonl", [3, 20, 21], "test", 1)
    with pytest.raises(ArgumentError, match=r"data: toy: 'u3' is in train.jsonl and in test_unseen.jsonl"):
        read_people("toy", tmp_path, SIZES)


def test_too_few_people_and_a_missing_file_are_refused(world, tmp_path):
    with pytest.raises(ArgumentError, match="data: expected at least 10 test people in toy, got 6"):
        read_people("toy", world / "data", Sizes(*(Size(9, 9),) * 4, least=10))
    with pytest.raises(ArgumentError, match=r"data: expected toy=.* to hold train.jsonl, which is not there"):
        read_people("toy", tmp_path, SIZES)


# ---- plan ------------------------------------------------------------------------------------------


def names(preset, data, scores):
    return [run.name for run in planned(PRESETS[preset], data, scores.get)]


def test_the_untrained_model_comes_first_and_rates_are_tried_by_all_methods_alike():
    found = names("cpu", ["a", "b"], {})
    assert found[0] == "a-base"
    for start in (1, 4, 7):
        rates = {name.split("-", 2)[2] for name in found[start : start + 3]}
        assert len(rates) == 1, "a study that stops here has compared all methods at the same rates"
    assert found[10:] == ["b-base"], "what depends on a rate waits until all rates are tried"


def test_the_rate_with_the_lowest_nll_is_chosen_for_a_method_and_its_children():
    rates = {"sft": 3e-4, "perce": 1e-3, "nextquill_detached": 3e-3}
    scores = {
        f"a-{name}-{rate:g}-seed1": 2.0 if rate == best else 3.0
        for name, best in rates.items()
        for rate in PRESETS["cpu"].rates
    }
    scores |= {"a-sft-0.0001-seed1": 2.5, "a-nextquill_detached-0.01-seed1": 2.5}
    runs = list(planned(PRESETS["cpu"], ["a", "b"], scores.get))
    chosen = {}
    for run in runs[12:]:
        chosen.setdefault(run.method, set()).add(run.rate)
    for name, method in METHODS.items():
        if name in LATER:  # no rate is known yet
            assert chosen.get(name, set()) == (set(PRESETS["cpu"].rates) if method.parent is None else set())
        else:
            assert chosen[name] == ({0.0} if name == BASE else {rates[method.parent or name]})
    assert len({run.name for run in runs}) == len(runs)
    timed = next(run for run in runs if run.method == "sft_time")
    assert timed.needs == ("a-perce-0.001-seed1", "a-sft-0.0003-seed1")
    seeds = [run.seed for run in runs if run.method == "perce" and run.data == "a" and run.rate == 1e-3]
    assert seeds == [1, 2, 3]


@pytest.mark.parametrize("preset", PRESETS)
def test_methods_that_joined_later_change_no_run_before_theirs(preset):
    """A study that has begun resumes: its settings are the same, and the new runs come last."""
    rates = dict.fromkeys((*PRESETS[preset].main, *LATER), PRESETS[preset].rates[0])
    scores = {
        f"a-{name}-{rate:g}-seed1": float(rate != rates[name]) for name in rates for rate in PRESETS[preset].rates
    }
    scores |= {f"a-{name}-{rate:g}-seed1": 9.0 for name in rates for rate in PRESETS[preset].beyond or ()}
    known = dataclasses.replace(PRESETS[preset], later=())
    before, after = ([run.name for run in planned(each, ["a", "b"], scores.get)] for each in (known, PRESETS[preset]))
    assert after[: len(before)] == before
    added = after[len(before) :]
    first = [tuple(name.split("-", 2)[1:]) for name in added if name.startswith("a-") and name.endswith("seed1")]
    tuned = [name for name in LATER if METHODS[name].parent is None]
    tried = [(name, f"{rate:g}-seed1") for rate in PRESETS[preset].rates for name in tuned]
    assert first[: len(tried)] == tried, "with rates of their own"
    assert {name for name, _ in first} == set(LATER)
    assert known.to_dict() == PRESETS[preset].to_dict()
    assert not set(LATER) & {*known.others, *known.main}


def test_a_method_with_an_unexpected_result_is_trained_again():
    """And nothing else changes: a study that has begun resumes."""
    rates = dict.fromkeys(PRESETS["cpu"].main, PRESETS["cpu"].rates[0])
    scores = {f"a-{name}-{rate:g}-seed1": float(rate != rates[name]) for name in rates for rate in PRESETS["cpu"].rates}
    known = dataclasses.replace(PRESETS["cpu"], repeated=())
    before, after = ([run.name for run in planned(each, ["a", "b"], scores.get)] for each in (known, PRESETS["cpu"]))
    assert PRESETS["cpu"].repeated == ("nextquill",)
    added = [f"{data}-nextquill-0.001-seed{seed}" for data, seed in (("a", 2), ("a", 3), ("b", 1))]
    assert [name for name in after if name not in added] == before
    assert len(after) == len(before) + len(added) == len(set(after))
    assert known.to_dict() == PRESETS["cpu"].to_dict()


def test_a_method_whose_best_rate_is_at_an_end_tries_the_next():
    """And waits for it before other seeds; a method whose best rate is in the middle has tried both neighbours."""
    best = {"sft": 3e-3, "perce": 1e-3, "nextquill_detached": 3e-4}
    scores = {
        f"a-{name}-{rate:g}-seed1": 2.0 if rate == best[name] else 3.0 for name in best for rate in PRESETS["cpu"].rates
    }
    found = names("cpu", ["a"], scores)
    assert found[10:12] == ["a-sft-0.01-seed1", "a-nextquill_detached-0.0001-seed1"]
    assert [name for name in found[12:] if "seed2" in name] == ["a-perce-0.001-seed2"]
    found = names("cpu", ["a"], scores | {"a-sft-0.01-seed1": 1.0, "a-nextquill_detached-0.0001-seed1": 4.0})
    second = [name for name in found if "seed2" in name]
    kinds = ("sft-0.01", "perce-0.001", "nextquill_detached-0.0003", "nextquill-0.0003")
    assert second == [f"a-{kind}-seed2" for kind in kinds]


def test_every_method_says_what_is_expected_of_it():
    assert all(method.hypothesis.endswith(".") and method.label for method in METHODS.values())
    for method in METHODS.values():
        assert method.parent is None or METHODS[method.parent].parent is None
        assert method.kind is None or method.loss(100) is not None
    assert METHODS["nextquill_log_v"].loss(100).objective.alpha == pytest.approx(0.1 / 4.60517)


# ---- methods ---------------------------------------------------------------------------------------


def test_shuffled_weights_are_the_same_ones_elsewhere():
    torch.manual_seed(1)
    pair = PairNLL(torch.rand(30), torch.rand(30) * 8, None)
    own, shuffled = ClipWeighting()(pair), ShuffledWeighting()(pair)
    assert not torch.equal(own, shuffled)
    assert torch.equal(own.sort().values, shuffled.sort().values)
    assert torch.equal(shuffled, ShuffledWeighting()(pair)), "a resumed run must repeat them"


def test_weights_warm_up_for_a_third_of_the_steps():
    weighting, state = WarmWeighting(), type("State", (), {"max_steps": 6, "global_step": 0})()
    pair, seen = PairNLL(torch.zeros(2), torch.tensor([1.0, 9.0]), None), []
    for state.global_step in range(6):
        WarmUp(weighting).on_step_begin(None, state, None)
        seen.append(weighting(pair).tolist())
    assert seen == [[1.0, 1.0]] * 2 + [[1.0, 5.0]] * 4


def test_words_of_a_history_change_places_alike_in_all_records_of_a_person():
    history = (HistoryItem("one two three four five six", "title", 3.0), HistoryItem("alone"))
    record = Record("u1", "q", "r", history)
    mixed = words_shuffled(record, 1)
    assert mixed.history[0].text != history[0].text
    assert sorted(mixed.history[0].text.split()) == sorted(history[0].text.split())
    assert (mixed.history[0].title, mixed.history[0].timestamp, mixed.history[1]) == ("title", 3.0, history[1])
    assert words_shuffled(dataclasses.replace(record, response="other"), 1).history == mixed.history
    assert words_shuffled(record, 2).history != mixed.history


def test_a_token_that_continues_a_phrase_of_the_history_has_no_effect(tmp_path):
    branch = Branch([1, 2, 3, 4, 9], [2, 3, 4, 5, 3, 4])
    example = EncodedExample("u", 0, branch, branch, None, 1, 1)
    nlls = torch.tensor([[1.0] * 6, [3.0] * 6])
    line = effect_line(ExampleScores(example, branch.response_ids, *nlls, None), _Tokens())
    file = tmp_path / "effects.jsonl"
    file.write_text(json.dumps(without_copied(example, line)) + "\n")
    (found,) = load_effects(file, [example])
    # Only "2 3 4" is a run of three tokens of the prompt, and its last token the one that continues a phrase.
    assert found.effects.tolist() == [[1.0] * 6, [3.0, 3.0, 1.0, 3.0, 3.0, 3.0]]


class _Tokens:
    def decode(self, ids):
        return "".join(map(chr, ids))


# ---- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """The folder of a study with two finished runs, made in this process."""
    out = tmp_path_factory.mktemp("study") / "out"
    study = make_study(out, "smoke", str(world / "model"), {"toy": world / "data"}, str(world / "prose.txt"))
    study.open()
    for run in study.runs()[:3]:
        study.path(run.name).write_text(json.dumps(Worker(study, run).perform()))
    return out


def test_a_result_follows_the_run(results):
    base, sft = (json.loads((results / RUNS / f"toy-{name}.json").read_text()) for name in ("base", "sft-0.001-seed1"))
    assert base["loss"] is None
    assert sft["run"] == {"data": "toy", "method": "sft", "seed": 1, "rate": 0.001}
    assert sft["steps"] == PRESETS["smoke"].steps
    assert sft["dev_score"] == sft["sets"][DEV]["values"]["nll_at_temperature"]
    assert sft["sets"][TEST]["values"]["nll_factual"] != base["sets"][TEST]["values"]["nll_factual"]
    assert set(sft["texts"]["decodings"]) == {"γ=0", "γ=1"}
    assert {"nll_prose", "auc_effect_prob_placebo", "ece", "effect_placebo"} <= set(sft["sets"][TEST]["values"])
    assert "right_person_lm" in base["texts"]["decodings"]["reference"]["values"]


@pytest.mark.parametrize("name", LATER)
def test_a_method_that_samples_is_trained_and_measured_like_the_others(name, world, tmp_path):
    study = make_study(tmp_path / "out", "smoke", str(world / "model"), {"toy": world / "data"}, None)
    worker = Worker(study, Run("toy", name, 1, 1e-3))
    model, costs = worker.train(*worker.start())
    assert costs["steps"] == PRESETS["smoke"].steps
    assert costs["examples"] == PRESETS["smoke"].steps * PRESETS["smoke"].batch_size
    assert any(bool(p.any()) for key, p in model.named_parameters() if "lora_B" in key)
    assert (worker.folder / "training" / "sampled_responses.jsonl").is_file()


def test_measures_are_rebuilt_from_a_result(results):
    found = tables.Results(results)
    for result in found.all:
        for measure in ("nll_factual", "nll_at_temperature", "top1", "effect_placebo"):
            rows, _ = result.scores(measure)
            assert tables.rebuilt(rows).value == pytest.approx(result.value(measure), rel=1e-4), measure
        for measure in ("rouge_l", "copied", "length_ratio", "right_person"):
            rows, _ = result.scores(measure, "γ=0")
            assert tables.rebuilt(rows).value == pytest.approx(result.value(measure, "γ=0"), abs=1e-4), measure


def test_tables_hold_every_method_and_its_difference_from_sft(results, capsys):
    assert tables.main(["--out", str(results)]) == 0
    shown = capsys.readouterr().out
    assert "| no training | – | 1 |" in shown
    assert "| SFT | 0.001 | 1 |" in shown
    assert "minus SFT, toy, γ=0" in shown
    assert "| known personal tokens found, toy | AUC, probability |" in shown
    assert "| frontier over γ, toy | area, right person | minus SFT |" in shown
    rows = (results / "study.csv").read_text().splitlines()
    assert rows[0] == ",".join(tables._COLUMNS)
    assert len(rows) > 100


def test_a_variant_is_compared_with_its_parent_of_the_same_seed(results):
    found = tables.Results(results)
    perce = next(result for result in found.all if result.key[1] == "perce")
    raw = copy.deepcopy(perce.raw)
    raw["run"]["method"] = "perce_random"
    nlls = raw["sets"]["test"]["rows"]["nll_factual"]
    nlls[:] = [[2 * total, tokens] for total, tokens in nlls]
    found.all.append(tables.Result(raw))
    (row,) = tables.variants_table(found, "toy").splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "PerCE, weights shuffled, minus PerCE"
    assert cells[1].startswith(f"{perce.value('nll_factual'):+.2f} [")
    assert all(cell.startswith("+0.00 [+0.00, +0.00]") for cell in cells[2:])
    raw["run"]["seed"] = 2
    assert tables.variants_table(found, "toy") == "", "its parent has no run of that seed"


def a_run(method="sft", processor="a", seconds=1.0, texts=(), seed=1):
    """A result with one text of each person; `texts` are its ROUGE-L and right person by decoding."""
    rows = {
        name: {"rows": {"rouge_l": [[faithful, 1.0]] * 2, "right_person": [[personal, 1.0]] * 2}}
        for name, (faithful, personal) in texts
    }
    run = {"data": "toy", "method": method, "seed": seed, "rate": 0.1}
    return tables.Result(
        {"run": run, "processor": processor, "seconds": seconds, "texts": {"users": ["u", "v"], "decodings": rows}}
    )


def test_the_area_is_the_best_rouge_l_that_reaches_each_level():
    run = a_run(texts=[("γ=0", (0.4, 0.5)), ("γ=0.5", (0.1, 0.2)), ("γ=1", (0.2, 0.75)), ("γ=0, T=0.8", (0.9, 0.9))])
    area = tables.frontier(run, "right_person")
    assert area.value == pytest.approx(0.5 * 0.4 + 0.25 * 0.2), "a dominated γ and samples add nothing"
    assert area.from_sums(area.statistics).tolist() == [area.value] * 2, "for each drawn sum of its own"


def test_a_cost_compares_runs_of_one_processor(results):
    found = tables.Results(results)
    found.all = [
        a_run("sft", "a", 2.0),
        a_run("sft", "a", 4.0, seed=2),
        a_run("perce", "a", 6.0),
        a_run("perce", "b", 9),
    ]
    assert found.cost("toy", "perce") == 2.0
    assert found.cost("toy", "sft") == 1.0
    assert found.cost("toy", "base") is None


def test_the_answer_shows_a_difference_in_bold_only_after_correction(results):
    said = tables.answer(tables.Results(results))
    assert said.startswith("| toy | seeds | author found | with γ=1 |")
    assert "| no training | 1 | " in said
    assert "| PerCE | 1 | " in said
    found = SeedsResult(0.3, 0.1, 0.5, 0.01, 10, 0.01, (3, 3))
    assert tables._interval((found, 0.04), 2) == "**+0.30 [+0.10, +0.50]**"
    assert tables._interval((found, 0.06), 2) == "+0.30 [+0.10, +0.50]"
    assert tables._interval((dataclasses.replace(found, low=-0.1), 0.01), 2) == "+0.30 [-0.10, +0.50]"


def test_a_brief_answer_leaves_out_variants(results, monkeypatch):
    monkeypatch.setitem(tables.METHODS, "perce", dataclasses.replace(tables.METHODS["perce"], parent="sft"))
    assert "| PerCE |" in tables.answer(tables.Results(results))
    assert "| PerCE |" not in tables.answer(tables.Results(results), brief=True)


def test_a_frontier_that_moves_is_named(results, monkeypatch):
    moved = SeedsResult(0.3, 0.1, 0.5, 0.01, 10, 0.01, (3, 3)), 0.01
    assert "No loss is shown to be more personal" in tables.answer(tables.Results(results))
    frontiers = tables._frontiers
    monkeypatch.setattr(tables, "_frontiers", lambda *a: {**frontiers(*a), "perce": moved})
    assert "More personal at the same ROUGE-L than SFT under some guidance: PerCE (toy)." in tables.answer(
        tables.Results(results)
    )


def test_committed_figures_are_those_of_the_committed_results():
    folder = RESULTS / "study-cpu"
    results = tables.Results(folder)
    assert (folder / "study.csv").read_text() == tables.as_csv(results)
    assert PICTURE.read_text() == picture(results)


def test_runs_are_matched_by_their_seeds(results, monkeypatch):
    seen = []
    monkeypatch.setattr(tables, "paired_over_seeds", lambda *sides, **options: seen.append(options["matched"]))
    base, sft = (next(each for each in tables.Results(results).all if each.key[1] == name) for name in (BASE, "sft"))
    for ours, others in (([sft], [sft]), ([sft], [base]), ([sft, sft], [sft])):
        tables.difference(ours, others, "nll_factual", tables.OWN)
    assert seen == [True, False, False]


def test_the_picture_has_a_curve_for_each_method_and_panel(results):
    drawn = picture(tables.Results(results))
    found = ElementTree.fromstring(drawn)
    curves = [each for each in found.iter("{http://www.w3.org/2000/svg}path") if "curve" in each.get("class")]
    assert [each.get("class") for each in curves] == ["curve base", "curve sft", "curve perce"] * 2
    assert "SFT, from what is not copied: γ=0 " in found.get("aria-label")
    assert "4 greedy texts of 4 people never trained on. Seeds: SFT: 1; PerCE: 1." in drawn


# ---- the best of n samples ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def best_study(results, world, tmp_path_factory):
    """A study of the best of three samples, where the study of losses wrote half of the test texts."""
    losses = make_study(results, "smoke", str(world / "model"), {"toy": world / "data"}, str(world / "prose.txt"))
    losses = dataclasses.replace(losses, preset=dataclasses.replace(losses.preset, generated=2))
    decodings = (Decoding(1.0), Decoding(1.0, 0.8), Decoding(0.0, 0.8), BestOf(0.0, 0.8, best_of=3))
    return best_of.BestOfStudy(tmp_path_factory.mktemp("best") / "out", losses, best_of.Rule(decodings))


def test_the_rule_meets_texts_that_the_study_did_not_write(best_study, world):
    run = best_study.runs()[0]
    assert [each.name for each in best_study.runs()] == ["toy-sft", "toy-perce"]
    result = best_of.BestOfWorker(best_study, run).perform()
    written = best_study.losses.people("toy").sets[TEST][2:]
    assert result["texts"]["users"] == [record.user_id for record in written]
    assert list(result["texts"]["decodings"]) == ["γ=1", "γ=1, T=0.8", "γ=0, T=0.8", "best of 3"]
    best_study.path(run.name).parent.mkdir(parents=True)
    best_study.path(run.name).write_text(json.dumps(result))
    shown = best_of.markdown(best_study.folder)
    assert "Finished runs: 1. toy: 2 texts of 2 people." in shown
    assert "| SFT, toy | best of 3 |" in shown
    assert "| best of 3, minus γ=1 | copied | right person |" in shown
    assert "| best of 3, minus γ=1, T=0.8 | copied | right person |" in shown


def test_the_rule_needs_finished_runs_of_the_study(best_study, tmp_path):
    empty = dataclasses.replace(best_study, losses=dataclasses.replace(best_study.losses, folder=tmp_path))
    with pytest.raises(ArgumentError, match="losses: expected a finished run of sft on toy in"):
        empty.runs()


def test_a_study_with_other_settings_is_refused(results, world):
    other = make_study(results, "smoke", str(world / "model"), {"toy": world / "data"}, None)
    with pytest.raises(OutputExistsError, match=r"holds a study with another prose: there '.*', here None"):
        other.open()


def test_bad_flags_are_named(world, tmp_path, capsys):
    assert main(["--preset", "smoke", "--model", str(world / "model"), "--out", str(tmp_path / "a")]) == 1
    assert "data: expected at least one data set, NAME=FOLDER, got none" in capsys.readouterr().err
    given = ["--preset", "smoke", "--data", f"toy={world / 'data'}", "--out", str(tmp_path / "a")]
    assert main([*given, "--model", str(world / "plain")]) == 1
    assert "model: expected a tokenizer with a chat template, got none in" in capsys.readouterr().err
    assert tables.main(["--out", str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().err


def test_one_at_a_time_is_inside(tmp_path):
    """A lock is of an open file, so two threads exclude each other as two processes do."""
    entered = threading.Event()

    def enter():
        with alone(tmp_path / "x"):
            entered.set()

    other = threading.Thread(target=enter)
    with alone(tmp_path / "x"):
        other.start()
        assert not entered.wait(1.5), "the other waits"
    assert entered.wait(60)
    other.join()


def start(world, out):
    words = [sys.executable, "-m", "benchmarks.study", *flags(world, out), "--workers", "2"]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=log)


def table(out):
    """The study's figures, without those of the machine."""
    return [line.rsplit(",", 4)[0] for line in tables.as_csv(tables.Results(out)).splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_killed_anywhere_gives_the_same_tables(world, tmp_path):
    assert start(world, tmp_path / "whole").wait() == 0, (tmp_path / "whole.log").read_text()
    draw, kills = random.Random(0), 0
    while True:
        study = start(world, tmp_path / "killed")
        try:
            # Longer each time, as a busy machine may need all of it to load its libraries.
            assert study.wait(draw.uniform(4, 16) * 1.5**kills) == 0, (tmp_path / "killed.log").read_text()
            break
        except subprocess.TimeoutExpired:
            os.killpg(study.pid, signal.SIGKILL)
            kills += 1
            study.wait()
            time.sleep(0.2)
    assert kills >= 2
    assert len(table(tmp_path / "whole")) > 500
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "work").glob("toy-*seed*"))
