"""The public tasks: the metrics that each is reported in, and the form of its right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics import METRICS, MetricScores, compute
from nextquill.evaluation.metrics.answers import read_rating
from nextquill.evaluation.metrics.scores import Reference


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: its key in `TASKS`.
        label: its name in tables.
        metrics: names of the metrics it is reported in.
        answer: the form of a reference: free text, one of `labels`, a rating as text, or a pair of responses, which a
            model scores and does not write.
        labels: every possible answer, for a task of labels.
        file_names: its names in prediction files, the first for writing; empty for a task without such files.
        source: the paper and code that define the task.
    """

    name: str
    label: str
    metrics: tuple[str, ...]
    answer: Literal["text", "label", "rating", "pair"] = "text"
    labels: tuple[str, ...] | None = None
    file_names: tuple[str, ...] = ()
    source: str = ""

    @property
    def generates(self) -> bool:
        """Whether a model writes answers, which are compared with references."""
        return self.answer != "pair"

    def read_reference(self, response: str, where: str) -> str:
        """A record's response as a reference: labels and ratings without surrounding white space, texts unchanged.

        Args:
            response: the record's response.
            where: the record's name in an error.

        Raises:
            ArgumentError: the response is not a label of the task, or not a rating.
        """
        expected = None
        if self.answer == "label" and response.strip() not in (self.labels or ()):
            expected = f"one of {', '.join(self.labels or ())}"
        elif self.answer == "rating" and read_rating(response) is None:
            expected = "a rating such as '4'"
        if expected is not None:
            raise ArgumentError(f"{where}: field 'response': {self.name} expects {expected}, got {response!r:.80}")
        return response.strip() if self.answer in ("label", "rating") else response

    def compute(
        self, references: Sequence[Reference], predictions: Sequence[str], metrics: Sequence[str] | None = None
    ) -> dict[str, MetricScores]:
        """Scores of the predictions in the task's metrics, or in those named instead; see `metrics.compute`.

        The task's metrics that look for the person are left out, because they need records: see `text_measures`.

        Raises:
            ArgumentError: as in `metrics.compute`; or models write no answers in this task.
        """
        if not self.generates and metrics is None:
            raise ArgumentError(f"task: {self.name} is measured by the scores of pairs, not by texts")
        if metrics is None:
            metrics = [name for name in self.metrics if not METRICS[name].needs_authors]
        return compute(metrics, references, predictions, labels=self.labels)


_MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic", "psychology",
    "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
_NEWS_CATEGORIES = (
    "food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime", "science & technology",
    "culture & arts", "entertainment", "politics", "women", "style & beauty", "healthy living",
)  # fmt: skip
_LABELS, _ROUGE = ("accuracy", "f1_macro"), ("rouge_1", "rouge_l")
_LONG = (*_ROUGE, "meteor")
_PERSON = ("right_person", "right_person_uncopied", "copied", "distinct", "length_ratio")
_LAMP = "LaMP, arXiv 2304.11406; eval/evaluation.py of github.com/LaMP-Benchmark/LaMP"
_LONGLAMP = "LongLaMP, arXiv 2407.11016; README.md of github.com/LongLaMP-benchmark/LongLaMP-Benchmark"

_TASKS = (
    Task("lamp_1", "LaMP-1: citation", _LABELS, "label", ("[1]", "[2]"), ("LaMP_1",), _LAMP),
    Task("lamp_2", "LaMP-2: movie tag", _LABELS, "label", _MOVIE_TAGS, ("LaMP_2", "LaMP_2M"), _LAMP),
    # The benchmark's first release had news instead of movies, under the same name.
    Task("lamp_2_news", "LaMP-2: news category", _LABELS, "label", _NEWS_CATEGORIES, ("LaMP_2", "LaMP_2N"), _LAMP),
    Task("lamp_3", "LaMP-3: product rating", ("mae", "rmse"), "rating", None, ("LaMP_3",), _LAMP),
    Task("lamp_4", "LaMP-4: news headline", _ROUGE, file_names=("LaMP_4",), source=_LAMP),
    Task("lamp_5", "LaMP-5: scholarly title", _ROUGE, file_names=("LaMP_5",), source=_LAMP),
    Task("lamp_6", "LaMP-6: email subject", _ROUGE, file_names=("LaMP_6",), source=_LAMP),
    Task("lamp_7", "LaMP-7: tweet paraphrase", _ROUGE, file_names=("LaMP_7",), source=_LAMP),
    # Names on the hub; LongLaMP's evaluation scripts, and the names they expect, were never released.
    Task("longlamp_abstract", "LongLaMP: abstract", _LONG, file_names=("abstract_generation",), source=_LONGLAMP),
    Task("longlamp_review", "LongLaMP: product review", _LONG, file_names=("product_review",), source=_LONGLAMP),
    Task("longlamp_topic", "LongLaMP: topic writing", _LONG, file_names=("topic_writing",), source=_LONGLAMP),
    Task("amazon_reviews", "Amazon reviews", (*_LONG, "bleu"), source="eval-basic.py of github.com/SnowCharmQ/DPL"),
    Task("preferences", "Preferences", ("preference_accuracy",), "pair"),
    Task("text", "Text", ("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", *_PERSON)),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in TASKS:
        raise ArgumentError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def task_of_file(name: str) -> Task:
    """The task that has that name in prediction files; "LaMP_2" is the movie tags of the current release.

    Raises:
        ArgumentError: there is none.
    """
    found = next((task for task in _TASKS if name in task.file_names), None)
    if found is None:
        known = ", ".join(dict.fromkeys(each for task in _TASKS for each in task.file_names))
        raise ArgumentError(f"task: expected one of {known}, got {name!r}")
    return found
