"""The verdict claims what the figures show and no more, and the forest plot begins with the placebo."""

from __future__ import annotations

from nextquill.evaluation.results import MetricValue
from nextquill.report.headline import (
    Change,
    Subject,
    comparison_verdict,
    few_people,
    forest,
    of_people,
    trainer_metrics,
    verdict,
)

NATS = "nats per token"


def effect(value: float, low: float | None, high: float | None) -> MetricValue:
    return MetricValue("effect", value, low, high, NATS)


def subject(label: str, placebo: MetricValue, nll: float, changes: dict[str, Change] | None = None) -> Subject:
    metrics = {
        "nll_factual": MetricValue("nll with history", nll, nll - 0.1, nll + 0.1, NATS, False),
        "effect_logprob": effect(0.6, 0.5, 0.7),
        "effect_placebo": placebo,
        "bleu": MetricValue("BLEU, generated with history", 8.0, 7.0, 9.0, "of 100", True),
        "rouge_l": MetricValue("ROUGE-L, generated with history", 0.2, 0.1, 0.3, "", True),
        "rouge_l_counterfactual": MetricValue("ROUGE-L, generated without history", 0.2, 0.1, 0.3),
    }
    return Subject(label, metrics, changes or {}, "98 responses of 49 people", texts=12)


BASE = subject("base", effect(0.28, 0.2, 0.36), 3.57)
CLEAR, WORSE = Change(0.13, 0.1, 0.2, 0.001, True), Change(-0.63, -0.7, -0.5, 0.001, True)
NOT = Change(0.01, -0.1, 0.1, 0.6, False)


def test_a_clear_gain_is_said_with_its_figures() -> None:
    changes = {"effect_placebo": CLEAR, "nll_factual": WORSE, "rouge_l": NOT, "bleu": NOT}
    run = subject("a", effect(0.41, 0.33, 0.5), 2.94, changes)
    assert verdict(run, BASE, 0.95) == (
        "On 98 responses of 49 people, a's own history is worth 0.41 nats per token [0.33, 0.50] more than another "
        "person's, against 0.28 in base (clearly higher, by 0.13); nll 2.94 against 3.57 (clearly lower, by 0.63); "
        "texts: no clear change (12 generated)."
    )


def test_people_are_called_new_only_where_it_is_known() -> None:
    assert of_people("8 pairs", 3, None) == "8 pairs of 3 people"
    assert of_people("8 pairs", 3, 3) == "8 pairs of 3 people never trained on"
    assert of_people("8 pairs", 3, 1) == "8 pairs of 3 people, 1 of them never trained on"
    assert of_people("8 pairs", 1, 0) == "8 pairs of 1 person, all of them trained on"
    assert of_people("8 pairs", None, None) == "8 pairs"


def test_a_change_that_the_figures_do_not_show_is_not_claimed() -> None:
    tiny = Change(5e-6, 3e-6, 7e-6, 0.001, True)
    said = verdict(subject("a", effect(0.28, 0.2, 0.36), 3.57, {"nll_factual": tiny}), BASE, 0.95)
    assert "nll 3.57 against 3.57 (the same to these digits)" in said


def test_an_interval_around_zero_is_no_gain() -> None:
    said = verdict(subject("a", effect(0.02, -0.03, 0.06), 3.0), None, 0.95)
    worth = "a's own history is not clearly worth more than another person's"
    assert f"{worth}: 0.020 nats per token [-0.030, 0.060]; nll" in said
    assert "; nll 3.00 [2.90, 3.10]; ROUGE-L of 12 texts 0.20 [0.10, 0.30]." in said


def test_a_loss_is_said_as_one() -> None:
    said = verdict(subject("a", effect(-0.2, -0.3, -0.1), 3.0, {"nll_factual": NOT}), BASE, 0.95)
    assert "is worth 0.20 nats per token [0.10, 0.30] less than another person's" in said
    assert "in base (not tested); nll 3.00 against 3.57 (no clear change)" in said


def test_without_a_placebo_nothing_is_called_personal() -> None:
    run = Subject("a", {"effect_logprob": effect(0.5, None, None)})
    said = "a's own history is worth 0.50 nats per token more than none, without an interval"
    assert verdict(run, None, 0.95) == f"{said} (another person's was not tried, so it need not be personal)."


def test_texts_are_corrected_for_the_number_of_their_measures() -> None:
    def texts(p_value: float) -> str:
        changes = {"rouge_l": Change(0.1, 0.05, 0.15, p_value, True), "bleu": Change(-1, -2, -0.5, 0.001, True)}
        return verdict(subject("a", effect(0.4, 0.3, 0.5), 3.0, changes | {"nll_factual": NOT}), BASE, 0.95)

    assert "texts: clearly better in ROUGE-L; clearly worse in BLEU (12 generated)" in texts(0.04)
    changes = {name: Change(0.1, 0.05, 0.15, 0.04, True) for name in ("rouge_l", "bleu")}
    said = verdict(subject("a", effect(0.4, 0.3, 0.5), 3.0, changes), BASE, 0.95)
    assert "texts: no clear change" in said, "two tests at 0.04 are 0.08"


def test_the_forest_begins_with_the_placebo_and_has_four_measures() -> None:
    found = forest([BASE, subject("a", effect(0.41, 0.33, 0.5), 2.94, {"effect_placebo": CLEAR})], "base")
    assert [measure.title for measure in found] == [
        "Own history against another person's", "Own history against none", "nll with history",
        "ROUGE-L, generated with history",
    ]  # fmt: skip
    assert [measure.with_zero for measure in found] == [True, True, False, False]
    assert [row.note for row in found[0].rows] == ["", "+0.13 [0.10, 0.20] against base, clear"]
    assert found[3].hint == "of 12 texts; higher is better"


def test_arms_that_differ_clearly_are_named_and_others_are_not() -> None:
    arms = [
        subject("no training", effect(0.1, 0.0, 0.2), 4.0, {"effect_placebo": NOT, "nll_factual": NOT}),
        subject("PerCE", effect(0.1, 0.0, 0.2), 4.0, {"effect_placebo": NOT, "nll_factual": WORSE}),
    ]
    assert comparison_verdict(arms, "SFT", "9 responses of 3 people") == (
        "On 9 responses of 3 people, compared with SFT. Own history against another person's: no clear change; "
        "nll with history: PerCE clearly lower, by 0.63; ROUGE-L: no clear change."
    )


def test_few_people_are_warned_of() -> None:
    assert few_people(20) == []
    assert few_people(19)[0].startswith("Only 19 people.")
    assert "no intervals and no tests" in few_people(1)[0]


def test_a_trainer_s_measures_have_the_names_of_an_evaluation_s() -> None:
    found = trainer_metrics({"eval_effect_placebo": 0.3, "eval_loss": 2.0})
    assert {name: (metric.value, metric.low) for name, metric in found.items()} == {"effect_placebo": (0.3, None)}
