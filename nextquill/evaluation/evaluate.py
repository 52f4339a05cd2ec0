"""Evaluates one model, from records to a folder of results; the command line and comparisons call this.

    1. each response's nll with, without and under another user's history      effects.jsonl
    2. chosen against rejected responses, for records that hold both           preferences.jsonl, until 7
    3. the effect of each history item, for a few examples                     item_effects.jsonl
    4. texts that the model generates                                          generated.jsonl, until 7
    5. their likelihood under several people's histories, by a judge           judged.jsonl, until 7
    6. the nll of general prose                                                prose.jsonl
    7. measures with intervals                                                 examples.jsonl, evaluation.json

A model runs in stages 1 to 6, which keep each line as it is made. A stopped evaluation resumes when it is called
again with the same model, records and options, and gives the same files, to the byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from nextquill.data import EncodedExample, ExampleEncoder, Record
from nextquill.errors import ArgumentError, BudgetError, RecordError, naming
from nextquill.evaluation.identity import model_digest, model_identity, records_digest
from nextquill.evaluation.item_effects import item_effects
from nextquill.evaluation.judge import PersonJudge
from nextquill.evaluation.measures import (
    JUDGE,
    NEW_USERS,
    PAIRS,
    PROMPTS,
    RIGHT_PERSON_LM,
    TOKENS,
    LabelledScores,
    effect_measures,
    kind_and_branch,
    measure_name,
    preference_measures,
    sum_measures,
    text_measure,
)
from nextquill.evaluation.metrics import METRICS, Authors, compute
from nextquill.evaluation.metrics.words import Span
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.personal_tokens import known_tokens, personal_strings, read_marks
from nextquill.evaluation.predictions import Id, is_id, write_predictions
from nextquill.evaluation.preferences import PreferencePair, encode_pairs, has_pair, preference_scores
from nextquill.evaluation.prose import Prose, prose_measures
from nextquill.evaluation.results import (
    EFFECTS_FILE,
    GENERATED_FILE,
    ITEM_EFFECTS_FILE,
    JUDGED_FILE,
    PREDICTIONS_FILE,
    PREFERENCES_FILE,
    PROSE_FILE,
    EvaluatedExample,
    Evaluation,
    EvaluationFolder,
    MetricValue,
    Progress,
)
from nextquill.evaluation.scoring import BranchScorer, effect_line, pad_token, score_examples
from nextquill.evaluation.tasks import TASKS, Task
from nextquill.evaluation.text_measures import REFERENCE, authors_of, reference_scores, usable
from nextquill.generation import check_engine, generation_engine, make_prompts
from nextquill.models.configs import check_vocabulary
from nextquill.models.loading import PromptSettings
from nextquill.ranks import SharedFile, deal, on_first
from nextquill.storage.checkpoints import user_digest
from nextquill.storage.fingerprints import fingerprint

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
    trained_users: Collection[str] | None = None,
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
        trained_users: digests of the users in the training data, as `storage.checkpoints.trained_users` reads them, to
            count the others among the records'.
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
    work = _Work(model, tokenizer, list(records), settings, options, model_name, trained_users, progress)
    run = {**model_identity(model, tokenizer, settings), "content of the records": records_digest(work.records)}
    run |= work.identity()
    with EvaluationFolder(Path(folder), run, overwrite=options.overwrite, progress=progress) as place:
        pair_indices, item_indices = ([each.index for each in found] for found in (work.pairs, work.itemised))
        groups = () if work.judge is None else work.judge.groups
        windows = () if work.prose is None else work.prose.windows
        effects = place.stage(EFFECTS_FILE, range(len(work.records)), work.effect_lines, "Scoring")
        pairs = place.stage(PREFERENCES_FILE, pair_indices, work.preference_lines, "Comparing pairs")
        place.stage(ITEM_EFFECTS_FILE, item_indices, work.item_lines, "Leaving items out")
        texts = place.stage(GENERATED_FILE, range(len(work.prompts)), work.text_lines, "Generating")
        judged = place.stage(JUDGED_FILE, range(len(groups)), partial(work.judge_lines, texts), "Judging")
        prose = place.stage(PROSE_FILE, range(len(windows)), work.prose_lines, "Reading prose")

        def finish() -> Evaluation:
            evaluation, examples = work.results(effects, pairs, texts, judged, prose)
            work.texts.write_predictions(place.folder / PREDICTIONS_FILE, [each.generated for each in examples])
            place.finish(evaluation, examples)
            return evaluation

        return on_first(finish)


@dataclass(frozen=True)
class TaskTexts:
    """A task on some records.

    Attributes:
        task: the task.
        metrics: names of the metrics of generated texts; empty if nothing is generated.
        branches: the branches whose prompts texts are generated from.
        references: the right text of each record that texts are generated for.
        authors: those records' users and histories, and all records' people; None if nothing is generated.
        ids: those records' names in the task's prediction files; None if it has no such files, or a record has no `id`.
    """

    task: Task
    metrics: tuple[str, ...]
    branches: tuple[str, ...]
    references: list[str]
    authors: Authors | None = None
    ids: list[Id] | None = None

    @classmethod
    def of(cls, records: Sequence[Record], options: EvaluationOptions) -> TaskTexts:
        """The task that the options name, on these records.

        Raises:
            RecordError: a record has no answer that the task can score, or a metric needs histories of several people.
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
            authors = authors_of(shown, among=records, seed=options.seed)
            if options.metrics is None:
                metrics = usable(metrics, authors)
            compute(metrics, references, [""] * len(references), labels=task.labels, authors=authors)
        except ArgumentError as error:
            raise RecordError(str(error), argument=error.argument or "records") from error
        return cls(task, metrics, options.generate_branches, references, authors, _ids(task, shown))

    def measures(self, generated: Sequence[Mapping[str, str]]) -> dict[str, LabelledScores]:
        """Measures of every record's generated texts, which are given by branch."""
        measures = dict[str, LabelledScores]()
        for branch in self.branches:
            texts = [each[branch] for each in generated[: len(self.references)]]
            found = compute(self.metrics, self.references, texts, labels=self.task.labels, authors=self.authors)
            for kind, scores in found.items():
                metric, name = METRICS[kind], measure_name(kind, branch)
                label = f"{metric.label}, generated {PROMPTS[branch]}"
                better = metric.higher_is_better if branch == "factual" else None
                measures |= text_measure(name, label, scores, metric.unit, better)
        if self.authors is not None:
            for name, scores in reference_scores(self.metrics, self.references, self.authors).items():
                measures |= text_measure(name, f"{METRICS[kind_and_branch(name)[0]].label}, the person's own", scores)
        return measures

    def copied(self, index: int, response: str, generated: Mapping[str, str]) -> dict[str, list[Span]]:
        """The places of phrases of its history in the texts of a record, by branch; texts without any are left out."""
        if self.authors is None or index >= len(self.references):
            return {}
        texts = {**generated, REFERENCE: response}
        found = {branch: self.authors.copied(index, text)[1] for branch, text in texts.items()}
        return {branch: spans for branch, spans in found.items() if spans}

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
    trained_users: Collection[str] | None
    progress: Progress | None

    def __post_init__(self) -> None:
        if not self.records:
            raise RecordError("records: expected at least one, got none")
        options = self.options
        self.texts = TaskTexts.of(self.records, options)  # before anything is tokenised
        self.marks = None
        if options.personal_from is not None:
            with naming("personal_from"):
                self.marks = read_marks(Path(options.personal_from), self.records)
        self.strings = [personal_strings(record, index) for index, record in enumerate(self.records)]
        self.encoder = ExampleEncoder(self.tokenizer, **vars(self.settings))
        with naming("records"):
            self.pairs = encode_pairs(self.encoder, self.records, options.seed)
            self.examples = self.encoder.encode_all(self.records, True, options.seed, self.progress)
        if self.marks is not None:
            self.marks.check(self.examples)
        for pair in self.pairs:
            _check_budget(pair, options.max_tokens)
        against = options.guidance_against if options.generation().needs_against else None
        shown = self.examples[: options.generate_limit]
        self.prompts = make_prompts(shown, self.texts.branches, options.seed, against)
        self.prose = None
        if options.prose_file is not None:
            self.prose = Prose(options.prose_file, self.model, self.tokenizer, options.max_tokens)
        self.judge = self._judge()
        self.itemised = [example for example in self.examples if example.history_kept][: options.item_effects]

    def _judge(self) -> PersonJudge | None:
        options, authors = self.options, self.texts.authors
        if options.judge_model is None or authors is None:
            return None
        if options.max_tokens is not None and options.max_tokens < self.settings.max_length:
            raise BudgetError(
                f"max_tokens: expected at least max_length={self.settings.max_length} with judge_model, got "
                f"{options.max_tokens}"
            )
        shown, device = self.records[: len(authors.users)], next(self.model.parameters()).device
        return PersonJudge.load(
            options.judge_model, device, shown, self.records, authors, self.settings, options.judge_candidates
        )

    def identity(self) -> dict[str, Any]:
        """The settings that the results depend on besides the model and the records, by name; JSON."""
        return {
            **self.options.identity(),
            "personal_from": None if self.marks is None else self.marks.digest,
            "content of judge_model": None if self.judge is None else model_digest(self.judge.model),
            "content of prose_file": None if self.prose is None else fingerprint([self.prose.text]),
        }

    def effect_lines(self, done: SharedFile) -> Lines:
        options, pad = self.options, pad_token(self.tokenizer)
        for scores in score_examples(
            self.model, self.examples, pad, options.batch_size,
            attention=options.attention, max_tokens=options.max_tokens, skip=len(done), calibrated=True,
        ):  # fmt: skip
            yield effect_line(scores, self.tokenizer)

    def preference_lines(self, done: SharedFile) -> Lines:
        left = (pair for pair in self.pairs if pair.index not in done)
        with self._scorer() as scorer:
            yield from deal(left, lambda pair: [{"index": pair.index, "scores": preference_scores(scorer, pair)}])

    def item_lines(self, done: SharedFile) -> Lines:
        renderer, left = self.encoder.renderer, (each for each in self.itemised if each.index not in done)
        with self._scorer() as scorer:

            def lines(each: EncodedExample) -> list[dict[str, Any]]:
                found = item_effects(scorer, renderer, self.tokenizer, self.records[each.index], each)
                return [dataclasses.asdict(found)]

            yield from deal(left, lines)

    def text_lines(self, done: SharedFile) -> Lines:
        options = self.options.generation()
        with generation_engine(self.model, self.tokenizer, self.examples, options, self.model_name) as engine:
            for index, text in engine.generate(self.prompts, done):
                yield {"index": index, "text": text}

    def judge_lines(self, texts: Stage, done: SharedFile) -> Lines:
        assert self.judge is not None
        shown = zip(self._generated(texts), self.records, strict=True)
        judged = [[*own.values(), record.response] for own, record in islice(shown, len(self.texts.references))]
        return self.judge.lines(judged, done, **self._passes())

    def prose_lines(self, done: SharedFile) -> Lines:
        assert self.prose is not None
        return self.prose.lines(self.model, self.tokenizer, done, **self._passes())

    def _passes(self) -> dict[str, Any]:
        return {"attention": self.options.attention, "max_tokens": self.options.max_tokens}

    def _scorer(self) -> BranchScorer:
        return BranchScorer(self.model, pad_token(self.tokenizer), **self._passes())

    def results(
        self, effects: Stage, pairs: Stage, texts: Stage, judged: Stage, prose: Stage
    ) -> tuple[Evaluation, list[EvaluatedExample]]:
        """The evaluation and its examples; they follow from the lines of the stages."""
        measures, scores = effect_measures(effects)
        compared = {line["index"]: line["scores"] for line in pairs}
        measures |= preference_measures(compared)
        generated = self._generated(texts)
        measures |= self.texts.measures(generated)
        if self.judge is not None:
            labels = {
                measure_name(RIGHT_PERSON_LM, branch): f"{JUDGE.label}, generated {PROMPTS[branch]}"
                for branch in self.texts.branches
            }
            labels[f"{RIGHT_PERSON_LM}_{REFERENCE}"] = f"{JUDGE.label}, the person's own"
            measures |= self.judge.measures(judged, labels)
        measures |= prose_measures(prose)
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
                generated[index], own, self.texts.copied(index, record.response, generated[index]), rows,
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
        if self.trained_users is not None:
            new = [user for user in set(users) if user_digest(user) not in self.trained_users]
            metrics[NEW_USERS] = MetricValue("users never trained on", float(len(new)))
        if self.pairs:
            metrics[PAIRS] = MetricValue("pairs", float(len(self.pairs)))
        metrics[TOKENS] = MetricValue("response tokens", float(sum(own[TOKENS] for own in scores)))
        prompts = self.settings.with_chat(self.encoder.renderer.uses_chat)
        settings = {**dataclasses.asdict(prompts), **self.identity(), "dtype": str(self.model.dtype)}
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
