"""Tasks: their measures exist, and they read references as their benchmarks do."""

from __future__ import annotations

import pytest

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics import METRICS
from nextquill.evaluation.tasks import TASKS, task_named, task_of_file


def test_every_task_is_measured():
    expected = {f"lamp_{i}" for i in range(1, 8)} | {f"longlamp_{what}" for what in ("abstract", "review", "topic")}
    assert expected | {"amazon_reviews", "preferences", "text"} <= TASKS.keys()
    for name, task in TASKS.items():
        assert task.name == name
        assert task.metrics
        assert METRICS.keys() >= set(task.metrics)
        assert (task.labels is not None) == (task.answer == "label")
        assert all(METRICS[metric].score is not None for metric in task.metrics) == task.generates


def test_measures_are_those_of_the_benchmarks():
    assert TASKS["lamp_2"].metrics == ("accuracy", "f1_macro")
    assert TASKS["lamp_3"].metrics == ("mae", "rmse")
    assert TASKS["lamp_4"].metrics == ("rouge_1", "rouge_l")
    assert TASKS["longlamp_topic"].metrics == ("rouge_1", "rouge_l", "meteor")
    assert TASKS["amazon_reviews"].metrics == ("rouge_1", "rouge_l", "meteor", "bleu")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.generates])
def test_every_task_scores_its_right_answers_best(name):
    task = TASKS[name]
    right = {"label": (task.labels or ("",))[0], "rating": "5", "text": "a warm day in the sun"}[task.answer]
    wrong = {"label": "nonsense", "rating": "nonsense", "text": "nothing"}[task.answer]
    good, bad = (task.compute([right], [answer]) for answer in (right, wrong))
    for metric in (name for name in good if METRICS[name].higher_is_better is not None):
        sign = 1 if METRICS[metric].higher_is_better else -1
        assert sign * good[metric].value > sign * bad[metric].value, metric


def test_labels_that_no_reference_has_count_in_f1():
    assert TASKS["lamp_2"].compute(["comedy"], ["comedy"])["f1_macro"].value == pytest.approx(1 / 15)


def test_other_measures_may_be_asked_for():
    assert list(TASKS["lamp_3"].compute(["4"], ["4"], ["exact_match"])) == ["exact_match"]


def test_references_are_read():
    assert TASKS["lamp_1"].read_reference(" [1]\n", "record 0") == "[1]"
    assert TASKS["lamp_3"].read_reference("4 ", "record 0") == "4"
    assert TASKS["text"].read_reference(" as it is\n", "record 0") == " as it is\n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: task_named("lamp_8"), "task: expected one of lamp_1, .*, got 'lamp_8'"),
        (lambda: task_of_file("LaMP_8"), "task: expected one of LaMP_1, .*, got 'LaMP_8'"),
        (
            lambda: TASKS["lamp_1"].read_reference("[3]", "record 7"),
            r"record 7: field 'response': lamp_1 expects one of \[1\], \[2\], got '\[3\]'",
        ),
        (
            lambda: TASKS["lamp_3"].read_reference("good", "record 7"),
            "record 7: field 'response': lamp_3 expects a rating such as '4', got 'good'",
        ),
        (lambda: TASKS["preferences"].compute(["a"], ["b"]), "task: preferences is measured by the scores of pairs"),
        (
            lambda: TASKS["lamp_1"].compute(["[4]"], ["[1]"]),
            r"references\[0\]: expected one of \[1\], \[2\], got '\[4\]'",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_files_names_lead_to_tasks():
    assert task_of_file("LaMP_2").name == task_of_file("LaMP_2M").name == "lamp_2"
    assert task_of_file("LaMP_2N").name == "lamp_2_news"
    assert task_of_file("product_review").name == "longlamp_review"
