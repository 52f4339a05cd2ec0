"""Evaluates one model, from records to a folder of results; the command line and comparisons call this.

    1. each response's nll with, without and under another user's history      effects.jsonl
    2. chosen against rejected responses, for records that hold both           preferences.jsonl, until 5
    3. the effect of each history item, for a few examples                     item_effects.jsonl
    4. texts that the model generates                                          generated.jsonl, until 5
    5. measures with intervals                                                 examples.jsonl, evaluation.json

The model runs in stages 1 to 4, which keep each line as it is made. A stopped evaluation resumes when it is called
again with the same model, records and options, and gives the same files, to the byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextquill.data import ExampleEncoder, Record
from nextquill.errors import ArgumentError, BudgetError, RecordError, naming
from nextquill.evaluation.identity import model_identity, records_digest
from nextquill.evaluation.item_effects import item_effects
from nextquill.evaluation.measures import (
    PROMPTS,
    TOKENS,
    LabelledScores,
    effect_measures,
    measure_name,
    preference_measures,
    sum_measures,
)
from nextquill.evaluation.metrics import METRICS, compute
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.personal_tokens import known_tokens, personal_strings, read_marks
from nextquill.evaluation.predictions import Id, is_id, write_predictions
from nextquill.evaluation.preferences import PreferencePair, encode_pairs, has_pair, preference_scores
from nextquill.evaluation.results import (
    EFFECTS_FILE,
    GENERATED_FILE,
    ITEM_EFFECTS_FILE,
    PREDICTIONS_FILE,
    PREFERENCES_FILE,
    EvaluatedExample,
    Evaluation,
    EvaluationFolder,
    MetricValue,
    Progress,
)
from nextquill.evaluation.scoring import BranchScorer, effect_line, pad_token, score_examples
from nextquill.evaluation.tasks import TASKS, Task
from nextquill.generation import check_engine, generation_engine, make_prompts
from nextquill.models.configs import check_vocabulary
from nextquill.models.loading import PromptSettings
from nextquill.storage.resumable_jsonl import PartialFile

# The lines of a stage: as they are made, and all of them.
Lines = Iterator[Mapping[str, Any]]
Stage = Sequence[Mapping[str, Any]]


def evaluate_model(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    settings: PromptSettings,
    options: EvaluationOptions,
    folder: Path,
    *,
    model_name: str,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on records, and write the results into a folder.

    Args:
        model, tokenizer: a causal language model, also a PEFT model, and its tokenizer. It is used in eval mode and
            left as it was.
        records: at least one.
        settings: how its prompts are made.
        options: which measures are taken, and how.
        folder: the folder of the results; created if it is missing.
        model_name: the model's name in the results, and the name that vLLM loads it by.
        progress: `progress(things, total=..., desc=..., initial=...)` is iterated instead of things that take time;
            `tqdm` fits.

    Returns:
        The evaluation, as `read_evaluation` reads it back from the folder.

    Raises:
        OutputExistsError, CheckpointError: the folder holds something else; see `EvaluationFolder`.
        RecordError, BudgetError: a record lacks something that a measure needs, or does not fit.
        ArgumentError, BackendUnavailableError, UnsupportedModelError: the model cannot be measured with these options.
    """
    check_vocabulary(model, tokenizer)
    check_engine(options.generation(), model, model_name)
    work = _Work(model, tokenizer, list(records), settings, options, model_name, progress)
    run = {**model_identity(model, tokenizer, settings), "content of the records": records_digest(work.records)}
    run |= work.identity
    with EvaluationFolder(Path(folder), run, overwrite=options.overwrite, progress=progress) as place:
        pair_indices, item_indices = ([each.index for each in found] for found in (work.pairs, work.itemised))
        effects = place.stage(EFFECTS_FILE, range(len(work.records)), work.effect_lines, "Scoring")
        pairs = place.stage(PREFERENCES_FILE, pair_indices, work.preference_lines, "Comparing pairs")
        place.stage(ITEM_EFFECTS_FILE, item_indices, work.item_lines, "Leaving items out")
        texts = place.stage(GENERATED_FILE, range(len(work.prompts)), work.text_lines, "Generating")
        evaluation, examples = work.results(effects, pairs, texts)
        work.texts.write_predictions(place.folder / PREDICTIONS_FILE, [each.generated for each in examples])
        place.finish(evaluation, examples)
    return evaluation


@dataclass(frozen=True)
class TaskTexts:
    """A task on some records.

    Attributes:
        task: the task.
        metrics: names of the metrics of generated texts; empty if nothing is generated.
        branches: the branches whose prompts texts are generated from.
        references: the right text of each record that texts are generated for.
        ids: those records' names in the task's prediction files; None if it has no such files, or a record has no `id`.
    """

    task: Task
    metrics: tuple[str, ...]
    branches: tuple[str, ...]
    references: list[str]
    ids: list[Id] | None = None

    @classmethod
    def of(cls, records: Sequence[Record], options: EvaluationOptions) -> TaskTexts:
        """The task that the options name, on these records.

        Raises:
            RecordError: a record has no answer that the task can score.
            BackendUnavailableError: a library that a metric needs is not installed.
        """
        task, metrics = TASKS[options.task], options.text_metrics()
        if not task.generates:
            for index, record in enumerate(records):
                if not has_pair(record, index):
                    problem = f"{task.name} needs it, with 'rejected'; got none"
                    raise RecordError(f"record {index}: field 'chosen': {problem}", argument="records")
        if not (metrics and options.generate_branches):
            return cls(task, (), (), [])
        try:
            shown = records[: options.generate_limit]
            references = [task.read_reference(record.response, f"record {i}") for i, record in enumerate(shown)]
            # Scoring empty answers finds references that cannot be scored, before hours of generation.
            compute(metrics, references, [""] * len(references), labels=task.labels)
        except ArgumentError as error:
            raise RecordError(str(error), argument=error.argument or "records") from error
        return cls(task, metrics, options.generate_branches, references, _ids(task, shown))

    def measures(self, generated: Sequence[Mapping[str, str]]) -> dict[str, LabelledScores]:
        """Measures of every record's generated texts, which are given by branch."""
        measures = dict[str, LabelledScores]()
        for branch in self.branches:
            members = [index for index, texts in enumerate(generated) if branch in texts]
            right = [self.references[index] for index in members]
            texts = [generated[index][branch] for index in members]
            for kind, scores in compute(self.metrics, right, texts, labels=self.task.labels).items():
                metric, name = METRICS[kind], measure_name(kind, branch)
                label = f"{metric.label}, generated {PROMPTS[branch]}"
                better = metric.higher_is_better if branch == "factual" else None
                own = None if scores.per_example is None else name
                measures[name] = LabelledScores(label, scores, members, metric.unit, better, own)
        return measures

    def write_predictions(self, path: Path, generated: Sequence[Mapping[str, str]]) -> None:
        """Write the texts generated with history as the task's own scorers read them, if the records have ids."""
        if self.ids is not None and "factual" in self.branches:
            texts = [generated[index]["factual"] for index in range(len(self.ids))]
            write_predictions(path, self.task, zip(self.ids, texts, strict=True))


@dataclass
class _Work:
    """The records, encoded and checked before anything runs; the lines of each stage; and the results."""

    model: Any
    tokenizer: Any
    records: list[Record]
    settings: PromptSettings
    options: EvaluationOptions
    model_name: str
    progress: Progress | None

    def __post_init__(self) -> None:
        if not self.records:
            raise RecordError("records: expected at least one, got none")
        options = self.options
        self.texts = TaskTexts.of(self.records, options)  # before anything is tokenised
        folder, self.marks = options.personal_from, None
        if folder is not None:
            with naming("personal_from"):
                self.marks = read_marks(Path(folder), self.records)
        self.strings = [personal_strings(record, index) for index, record in enumerate(self.records)]
        self.identity = {**options.identity(), "personal_from": self.marks and self.marks.digest}
        self.encoder = ExampleEncoder(self.tokenizer, **vars(self.settings))
        with naming("records"):
            self.pairs = encode_pairs(self.encoder, self.records, options.seed)
            self.examples = self.encoder.encode_all(self.records, True, options.seed, self.progress)
        if self.marks is not None:
            self.marks.check(self.examples)
        for pair in self.pairs:
            _check_budget(pair, options.max_tokens)
        against, examples = (
            options.guidance_against if options.guidance else None,
            self.examples[: options.generate_limit],
        )
        self.prompts = make_prompts(examples, self.texts.branches, options.seed, against)
        self.itemised = [example for example in self.examples if example.history_kept][: options.item_effects]

    def effect_lines(self, done: PartialFile) -> Lines:
        options, pad = self.options, pad_token(self.tokenizer)
        for scores in score_examples(
            self.model, self.examples, pad, options.batch_size,
            attention=options.attention, max_tokens=options.max_tokens, skip=len(done), calibrated=True,
        ):  # fmt: skip
            yield effect_line(scores, self.tokenizer)

    def preference_lines(self, done: PartialFile) -> Lines:
        with self._scorer() as scorer:
            for pair in self.pairs:
                if pair.index not in done:
                    yield {"index": pair.index, "scores": preference_scores(scorer, pair)}

    def item_lines(self, done: PartialFile) -> Lines:
        with self._scorer() as scorer:
            for each in self.itemised:
                if each.index not in done:
                    record = self.records[each.index]
                    yield item_effects(scorer, self.encoder.renderer, self.tokenizer, record, each).to_dict()

    def text_lines(self, done: PartialFile) -> Lines:
        options = self.options.generation()
        with generation_engine(self.model, self.tokenizer, self.examples, options, self.model_name) as engine:
            for index, text in engine.generate(self.prompts, done):
                yield {"index": index, "text": text}

    def _scorer(self) -> BranchScorer:
        options, pad = self.options, pad_token(self.tokenizer)
        return BranchScorer(self.model, pad, attention=options.attention, max_tokens=options.max_tokens)

    def results(self, effects: Stage, pairs: Stage, texts: Stage) -> tuple[Evaluation, list[EvaluatedExample]]:
        """The evaluation and its examples; they follow from the lines of the stages."""
        measures, scores = effect_measures(effects)
        compared = {line["index"]: line["scores"] for line in pairs}
        measures |= preference_measures(compared)
        generated = self._generated(texts)
        measures |= self.texts.measures(generated)
        known = [
            None if strings is None else known_tokens(line["tokens"], strings)
            for line, strings in zip(effects, self.strings, strict=True)
        ]
        marked = None if self.marks is None else self.marks.personal
        of_sums, statistics = sum_measures(effects, self.options.score_temperature, marked, known)
        measures |= of_sums
        _add_own_scores(scores, measures)
        examples = [
            EvaluatedExample(
                index, record.user_id, record.query, record.response, encoded.history_kept, encoded.history_total,
                generated[index], own, rows,
            )
            for index, (record, encoded, own, rows) in enumerate(
                zip(self.records, self.examples, scores, statistics, strict=True)
            )
        ]  # fmt: skip
        return self._evaluation(measures, scores), examples

    def _generated(self, lines: Stage) -> list[dict[str, str]]:
        """The texts of each example by branch; the prompts are in the order of the branches."""
        generated: list[dict[str, str]] = [{} for _ in self.examples]
        per_branch = len(self.examples[: self.options.generate_limit])
        for line in lines:
            branch, example = divmod(line["index"], per_branch)
            generated[example][self.texts.branches[branch]] = line["text"]
        return generated

    def _evaluation(self, measures: Mapping[str, LabelledScores], scores: Sequence[Mapping[str, float]]) -> Evaluation:
        options, users = self.options, [record.user_id for record in self.records]
        metrics = {name: measure.with_interval(users, options) for name, measure in measures.items()}
        metrics["examples"] = MetricValue("examples", float(len(users)))
        metrics["users"] = MetricValue("users", float(len(set(users))))
        metrics[TOKENS] = MetricValue("response tokens", float(sum(own[TOKENS] for own in scores)))
        settings = {**dataclasses.asdict(self.settings), **self.identity, "dtype": str(self.model.dtype)}
        return Evaluation(
            model=self.model_name,
            records=records_digest(self.records),
            num_examples=len(users),
            task=options.task,
            level=options.level,
            settings=settings,
            metrics=metrics,
        )


def _add_own_scores(scores: Sequence[dict[str, float]], measures: Mapping[str, LabelledScores]) -> None:
    """Give every example its own score in each measure that is a mean of such scores."""
    for measure in measures.values():
        if measure.per_example is not None and measure.scores.per_example is not None:
            for index, value in zip(measure.members, measure.scores.per_example.tolist(), strict=True):
                scores[index].setdefault(measure.per_example, value)


def _check_budget(pair: PreferencePair, max_tokens: int | None) -> None:
    """Refuse a pair that does not fit into one forward, before anything is computed."""
    longest = max(len(branch.input_ids) for both in pair.branches.values() for branch in both)
    if max_tokens is not None and longest > max_tokens:
        raise BudgetError(
            f"max_tokens: expected at least the {longest} tokens that a prompt and a response of record {pair.index} "
            f"take, got {max_tokens}"
        )


def _ids(task: Task, records: Sequence[Record]) -> list[Id] | None:
    """The records' ids, if all have one and the task has prediction files; RecordError if two have the same."""
    ids = [each for record in records if is_id(each := record.extra.get("id"))]
    if not task.file_names or len(ids) < len(records):
        return None
    first = {each: index for index, each in reversed(list(enumerate(ids)))}
    for index, each in enumerate(ids):
        if first[each] < index:
            problem = f"expected one of its own for {task.name}, got {each!r} again"
            raise RecordError(f"record {index}: field 'id': {problem}", argument="records")
    return ids
