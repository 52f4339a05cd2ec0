"""`run_demo` end to end in its quick form, and the basis of its figures."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nextquill.evaluation.bootstrap import PairedResult

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from demos.kit.run import DemoResult
from demos.kit.training import own_randomness
from demos.popi.findings import BETTER, UNCLEAR, WORSE, find, verdict
from demos.popi.measuring import (
    BEFORE,
    CONTEXTS,
    NONE,
    PLACEBO,
    SIGNALS,
    SUMMARY,
    TRUTH,
    WRITTEN,
    ContextResult,
    PopiFigures,
    Share,
    figures,
)
from demos.popi.recipe import PopiRecipe
from demos.popi.run import run_demo
from demos.popi.training import Prompts
from demos.popi.world import (
    ASPECT_OF,
    ASPECTS,
    BLAND,
    VALUES,
    PreferenceWorld,
    all_texts,
    draw_pairs,
    most_shown,
    shown_values,
    stated_share,
    write_summary,
)
from nextquill.popi.users import draw, held_out

FILES = {"demo.png", "demo.html", "results.json"}
PREFERENCES = {"tone": "formal", "image": "music"}


# ---- the world --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> PreferenceWorld:
    return PreferenceWorld(3, PopiRecipe())


def test_test_users_have_preferences_that_no_training_user_has(world: PreferenceWorld) -> None:
    train, test = ({tuple(each.preferences.items()) for each in users} for users in (world.train, world.test))
    assert len(train) == 36
    assert len(test) == 12
    assert not train & test
    for users in (world.train, world.test):
        assert {value for each in users for value in each.preferences.values()} == set(VALUES)


def test_a_chosen_answer_has_both_preferred_values_and_the_rejected_lacks_one(world: PreferenceWorld) -> None:
    for each in world.test:
        wanted = set(each.preferences.values())
        for pair in each.user.pairs:
            assert wanted <= set(shown_values(pair.chosen))
            assert not wanted <= set(shown_values(pair.rejected))


def test_signals_give_no_pair_away_and_none_is_dropped(world: PreferenceWorld) -> None:
    recipe = PopiRecipe()
    for each in world.train[:20]:
        drawn = draw(each.user, num_pairs=recipe.pairs_per_user, num_signals=recipe.signals, seed=1)
        assert (len(drawn.pairs), len(drawn.signals)) == (recipe.pairs_per_user, recipe.signals)
    for each in world.test[:20]:
        held = held_out(each.user, num_signals=recipe.signals)
        assert (len(held.pairs), len(held.signals)) == (recipe.test_pairs - recipe.signals, recipe.signals)


def test_chosen_answers_of_a_few_signals_tell_the_preferences_most_of_the_time() -> None:
    rng = random.Random(0)
    found = [
        set(most_shown([pair.chosen for pair in draw_pairs(PREFERENCES, 5, rng)], rng)) == {"formal", "music"}
        for _ in range(200)
    ]
    assert sum(found) > 180  # ties with the aspect that the user does not care about are broken by chance


@pytest.mark.parametrize(
    ("summary", "share"),
    [
        ("likes formal and music", 1.0),
        ("likes music and formal", 1.0),
        ("likes formal and food", 0.5),
        (write_summary(BLAND), 0.0),
        ("", 0.0),
        (" ".join(VALUES), 0.0),
        ("likes formal and formal", 0.5),
    ],
)
def test_share_of_preferences_that_a_summary_states(summary: str, share: float) -> None:
    assert stated_share(summary, ("formal", "music")) == share


def test_words_show_one_value_each_and_every_text_reads_back() -> None:
    words = [word for values in ASPECTS.values() for each in values.values() for word in each]
    assert len(set(words)) == len(words)
    assert set(ASPECT_OF) == set(VALUES)
    prompts = Prompts()
    tokenizer = prompts.tokenizer
    for text in all_texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    pairs = draw_pairs(PREFERENCES, 3, random.Random(0))
    ids, kept = prompts.inference.ids([pair.as_item() for pair in pairs])
    assert kept == 3
    assert tokenizer.unk_token_id not in ids
    branch, _ = prompts.generator.branches(pairs[0], summary=write_summary(("formal", "music")))
    assert tokenizer.unk_token_id not in branch.input_ids


# ---- a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult[Any, Any], str, list[tuple[str, int, int]]]:
    printed, calls = io.StringIO(), list[tuple[str, int, int]]()
    folder = tmp_path_factory.mktemp("demo") / "made" / "by run_demo"
    console = Console(file=printed, width=80)
    result = run_demo(folder, seed=7, quick=True, console=console, progress=lambda *call: calls.append(call))
    return result, printed.getvalue(), calls


def test_quick_run_writes_exactly_its_files_and_says_that_it_compares_nothing(quick: Any) -> None:
    result, printed, calls = quick
    folder = result.paths["demo.png"].parent
    assert {path.name for path in folder.iterdir()} == FILES == set(result.paths)
    assert result.paths["demo.png"].read_bytes().startswith(b"\x89PNG")
    assert "compares nothing" in result.paths["demo.html"].read_text(encoding="utf-8")
    assert "compares nothing" in printed
    assert max(len(line) for line in printed.splitlines() if "Written" not in line) <= 80
    last = {what: (done, at_most) for what, done, at_most in calls}
    assert list(last) == [f"seed 7, {what}" for what in ("base model", "POPI", "generator of raw signals")]
    assert all(done == at_most for done, at_most in last.values())


def test_results_hold_every_context_on_the_same_pairs(quick: Any) -> None:
    result, _, _ = quick
    run = result.runs[0]
    assert tuple(run.scores) == CONTEXTS == tuple(figures(result.runs).contexts)
    places = [[(score.user_id, score.index) for score in scores] for scores in run.scores.values()]
    assert all(each == places[0] for each in places)
    assert len(run.history) == result.recipe.steps
    contexts = figures(result.runs).contexts
    assert contexts[NONE].context_tokens == 0
    assert contexts[SIGNALS].context_tokens > 10 * contexts[TRUTH].context_tokens
    record = json.loads(result.paths["results.json"].read_text(encoding="utf-8"))
    assert list(record["contexts"]) == list(CONTEXTS)
    assert list(record["stated"]) == list(WRITTEN)
    assert record["seeds"][0]["users"][0]["summaries"].keys() == set(WRITTEN)


@pytest.mark.slow
def test_same_seed_same_figures_whatever_the_global_state(quick: Any, tmp_path: Path) -> None:
    result, _, _ = quick
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    random.seed(5)
    states = torch.random.get_rng_state(), random.getstate()
    again = run_demo(tmp_path, seed=7, quick=True, console=Console(file=io.StringIO()))
    assert figures(again.runs) == figures(result.runs)
    assert [run.users for run in again.runs] == [run.users for run in result.runs]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_randomness_comes_back_after_an_error() -> None:
    def draws_and_fails() -> None:
        with own_randomness(1):
            random.seed(99)
            raise KeyError

    before = random.getstate()
    with pytest.raises(KeyError):
        draws_and_fails()
    assert random.getstate() == before


# ---- what follows -----------------------------------------------------------------------------------


def difference(value: float, half: float = 0.05) -> PairedResult:
    return PairedResult(value, value - half, value + half, 0.01, 100)


def share(*by_seed: float) -> Share:
    mean = sum(by_seed) / len(by_seed)
    return Share(mean, mean - 0.03, mean + 0.03, by_seed)


def measured(*, summary: float, signals: float, truth: float = 0.99, stated: float = 0.8) -> PopiFigures:
    values = dict.fromkeys(CONTEXTS, 0.5) | {SUMMARY: summary, SIGNALS: signals, TRUTH: truth}
    tokens = dict.fromkeys(CONTEXTS, 5.0) | {NONE: 0.0, SIGNALS: 100.0}
    return PopiFigures(
        {name: ContextResult(share(value, value), tokens[name]) for name, value in values.items()},
        {name: difference(summary - value) for name, value in values.items() if name != SUMMARY},
        {BEFORE: share(0.1, 0.1), SUMMARY: share(stated, stated), PLACEBO: share(0.15, 0.15)},
        difference(stated - 0.1),
    )


@pytest.mark.parametrize(
    ("own", "other", "gap", "expected"),
    [
        ((0.9, 0.8), (0.5, 0.6), difference(0.3), BETTER),
        ((0.5, 0.6), (0.9, 0.8), difference(-0.3), WORSE),
        ((0.9, 0.5), (0.5, 0.6), difference(0.15), UNCLEAR),  # another sign in the second seed
        ((0.9, 0.8), (0.5, 0.6), difference(0.3, half=0.4), UNCLEAR),  # the interval holds 0
    ],
)
def test_a_difference_counts_with_one_sign_in_every_seed_and_an_interval_without_0(
    own: tuple[float, ...], other: tuple[float, ...], gap: PairedResult, expected: str
) -> None:
    assert verdict(own, other, gap) == expected


def test_findings_say_what_the_figures_say() -> None:
    good = find(measured(summary=0.85, signals=0.97), PopiRecipe())
    assert good[0].heading.startswith("Training on preferences alone makes summaries state")
    assert good[1].heading.startswith("A summary tells the generator")
    assert good[2].heading.startswith("With raw signals more pairs are judged rightly than with summaries")
    assert good[2].heading.endswith("the signals take 20 times the tokens")
    assert good[3].heading.startswith("Better summaries would bring more")
    bad = find(measured(summary=0.5, signals=0.4, stated=0.1), PopiRecipe())
    assert "no clearly different share" in bad[0].heading
    assert "clearly ahead of nothing" in bad[1].heading
    assert bad[2].heading.startswith("With summaries more pairs are judged rightly")


def test_a_generator_that_reads_nothing_leaves_only_that_to_be_said() -> None:
    found = find(measured(summary=0.85, signals=0.97, truth=0.6), PopiRecipe())
    assert "did not learn to read summaries" in found[0].heading
    assert len(found) == 2


def test_quick_recipe_is_small_and_says_so() -> None:
    recipe = PopiRecipe.of(seed=2, seeds=None, quick=True)
    assert recipe.quick
    assert recipe.seed_values == range(2, 3)
    assert PopiRecipe.of(seed=0, seeds=None) == PopiRecipe()
