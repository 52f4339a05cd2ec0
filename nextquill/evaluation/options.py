"""The options of an evaluation: which measures it takes, and how. They hold neither a model nor records."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextquill.data._checks import check_integer
from nextquill.data.templates import BRANCHES
from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.evaluation.bootstrap import check_draws
from nextquill.evaluation.metrics import METRICS
from nextquill.evaluation.metrics.authors import CANDIDATES
from nextquill.evaluation.tasks import TASKS
from nextquill.evaluation.token_measures import TEMPERATURES
from nextquill.generation import PLAUSIBILITY, GenerationOptions
from nextquill.models import ATTENTIONS


@dataclass(frozen=True)
class EvaluationOptions:
    """Which measures are taken, and how. NLLs and effects are always measured.

    Args:
        task: name of a task in `nextquill.evaluation.tasks.TASKS`; it decides the metrics of texts and what a record
            needs.
        metrics: metrics of generated texts, instead of the task's.
        generate_branches: the prompts that responses are generated for: "factual", "counterfactual", "placebo"; empty
            for no generation.
        max_new_tokens, temperature, top_p, best_of, engine, guidance, plausibility: as in `GenerationOptions`.
        guidance_against: the branch that gives p0 to responses of the factual branch, with `guidance` or `best_of`.
        batch_size: records at a time; by default as for `score_examples`, and 8 prompts.
        generate_limit: generate for only the first so many records.
        score_temperature: the temperature of `nll_at_temperature`, one of `TEMPERATURES`, chosen on other records; by
            default the best on these records, which makes the nll look too good.
        personal_from: the folder of another evaluation of the same records, with the same tokenizer, such as that of
            the untrained model. Tokens are personal where its p(own history) - p(another's) is above 0.05.
        item_effects: measure the effect of each history item for the first so many records with a history.
        judge_model: a folder or hub name of an untrained language model that picks the author of every generated text
            among several people; None for no such judge.
        judge_candidates: the number of people that it chooses from, the author included: 2 to 8.
        prose_file: a plain UTF-8 text whose nll is measured, its first 20,000 tokens; None for none.
        seed: decides whose history is the placebo, whom a judge chooses from, the samples, and the draws of the
            intervals.
        resamples: draws of each interval.
        level: confidence level of the intervals.
        attention, max_tokens: as for `score_examples`.
        overwrite: delete an evaluation that the folder holds.

    Raises:
        ArgumentError: a value is out of range, or two do not go together.
        ArgumentTypeError: a value has the wrong type.
    """

    task: str = "text"
    metrics: tuple[str, ...] | None = None
    generate_branches: tuple[str, ...] = ("factual",)
    max_new_tokens: int = 128
    batch_size: int | None = None
    generate_limit: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    engine: str = "auto"
    guidance: float = 0.0
    guidance_against: str = "counterfactual"
    plausibility: float = PLAUSIBILITY
    best_of: int = 1
    score_temperature: float | None = None
    personal_from: Path | str | None = None
    item_effects: int = 0
    judge_model: str | None = None
    judge_candidates: int = CANDIDATES
    prose_file: str | None = None
    seed: int = 42
    resamples: int = 2000
    level: float = 0.95
    attention: str = "auto"
    max_tokens: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check_name("task", self.task, TASKS)
        _check_names("generate_branches", self.generate_branches, BRANCHES)
        _check_name("guidance_against", self.guidance_against, BRANCHES[1:])
        if self.metrics is not None:
            _check_names("metrics", self.metrics, METRICS)
        _check_name("attention", self.attention, ATTENTIONS)
        check_draws(self.level, self.resamples, self.seed)
        check_integer("item_effects", self.item_effects, least=0)
        check_integer("judge_candidates", self.judge_candidates, least=2)
        if self.judge_candidates > CANDIDATES:
            raise ArgumentError(f"judge_candidates: expected at most {CANDIDATES}, got {self.judge_candidates}")
        if self.judge_model is not None and not (self.generate_branches and TASKS[self.task].generates):
            raise ArgumentError("judge_model: it judges generated texts, and none are generated")
        for name in ("batch_size", "generate_limit", "max_tokens"):
            check_integer(name, getattr(self, name), least=1, or_none=True)
        if self.score_temperature is not None and self.score_temperature not in TEMPERATURES:
            known = ", ".join(f"{each:g}" for each in TEMPERATURES)
            raise ArgumentError(f"score_temperature: expected one of {known}, got {self.score_temperature!r}")
        reading = [name for name in self.metrics or () if METRICS[name].score is not None]
        if reading and not self.generate_branches:
            raise ArgumentError(f"metrics: {reading[0]} measures generated texts, and none are generated")
        self.generation()

    def generation(self) -> GenerationOptions:
        """How responses are generated."""
        names = {each.name for each in dataclasses.fields(GenerationOptions)}
        values = {name: value for name, value in vars(self).items() if name in names}
        return GenerationOptions(**{**values, "batch_size": self.batch_size or GenerationOptions.batch_size})

    def text_metrics(self) -> tuple[str, ...]:
        """The metrics of generated texts: those asked for, or the task's, before the records are known."""
        names = TASKS[self.task].metrics if self.metrics is None else self.metrics
        return tuple(name for name in names if METRICS[name].score is not None)

    def identity(self) -> dict[str, Any]:
        """The settings that must agree for an evaluation to resume, by name; JSON. Paths are not among them."""
        values = dataclasses.asdict(self)
        # The prose and the other evaluation are compared by their content, not by their paths.
        for name in ("overwrite", "prose_file", "personal_from"):
            del values[name]
        if self.best_of == 1:
            del values["best_of"]  # evaluations from before there was such an option resume
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_names(argument: str, names: Any, known: Any) -> None:
    if not isinstance(names, tuple):
        raise ArgumentTypeError(f"{argument}: expected a tuple of names, got {names!r}")
    for name in names:
        _check_name(argument, name, known)
    if len(set(names)) < len(names):
        raise ArgumentError(f"{argument}: expected each name once, got {', '.join(map(str, names))}")


def _check_name(argument: str, name: Any, known: Any) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), list(known), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ArgumentError(f"{argument}: expected one of {', '.join(known)}, got {name!r}{hint}")
