"""`nextquill evaluate`: measures how a model uses the history, and how close its texts are to the references."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nextquill.cli.evaluation_tables import print_differences, print_evaluation
from nextquill.cli.flags import claim_output_file, dry_run_option, option
from nextquill.cli.load_and_score import Loaded, check_files, eval_records
from nextquill.cli.main import OK
from nextquill.cli.options import DecodingOptions, ModelOptions, PromptOptions, ScoreFiles
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import bar, say, say_skipped
from nextquill.data import Record
from nextquill.data.skipped import SkippedRecords
from nextquill.data.templates import BRANCHES
from nextquill.errors import RecordError, naming
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.identity import records_digest
from nextquill.evaluation.metrics import METRICS
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.personal_tokens import read_marks
from nextquill.evaluation.results import Evaluation, check_folder, read_evaluation, read_examples
from nextquill.evaluation.tasks import TASKS
from nextquill.evaluation.token_measures import TEMPERATURES
from nextquill.generation import ENGINES, check_engine
from nextquill.ranks import is_first
from nextquill.report.text import plain
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.checkpoints import trained_users

DESCRIPTION = (
    "Measure a model on records: the nll (negative log-likelihood) of the responses with the user's history, without "
    "it and with another user's (placebo); the effects, which are their differences; and generated texts, by the "
    "measures of the task. For records with chosen and rejected, also which of the two the model prefers. Intervals "
    "are over users. With --output_dir the same command resumes a stopped evaluation."
)


@dataclass
class Measures:
    """Measures: what is taken of each record."""

    task: str = option("The records' task, which decides the measures of generated texts.", "text", choices=list(TASKS))
    metrics: list[str] | None = option(
        f"Measures of generated texts, instead of the task's: {', '.join(METRICS)}.", None, metavar="NAME ..."
    )
    generate: bool = option("Generate responses and score them; false: only NLLs and effects.", True)
    generate_limit: int | None = option("Generate only for the first INT records.", None)
    item_effects: int = option("Number of records for which to measure what leaving out each history item changes.", 0)
    level: float = option("Confidence level of the intervals.", 0.95)
    resamples: int = option("Resamples of each interval.", 2000)


@dataclass
class EvaluateTexts(DecodingOptions):
    """Texts: how they are generated."""

    generate_branches: list[str] = option(
        "Prompts to generate for: with history, without, with another user's.", ["factual"], choices=list(BRANCHES)
    )
    engine: str = option(
        "Generate with shared prefixes (tree), with transformers' own generate (hf) or with vLLM; auto: tree where the "
        "model allows it, else hf.", "auto", choices=list(ENGINES),
    )  # fmt: skip


@dataclass
class EvaluateOptions:
    """Output: what is written, and the evaluation to compare with."""

    output_dir: str | None = option(
        "Write everything here: evaluation.json, examples.jsonl, effects.jsonl. report and --baseline read it.", None
    )
    output_file: str | None = option("Also write the metrics here, as JSON.", None, metavar="FILE")
    overwrite: bool = option("Replace an existing output file, and the evaluation in --output_dir.", False)
    baseline: str | None = option(
        "The --output_dir of another evaluation of the same records; paired differences to it are shown.", None,
        metavar="DIR",
    )  # fmt: skip
    judge_model: str | None = option(
        "An untrained model as judge: it picks the author of every generated text among several people.", None,
        metavar="NAME",
    )  # fmt: skip
    judge_candidates: int = option("Number of people the judge chooses from, 2 to 8, the author included.", 8)
    prose_file: str | None = option(
        "Also measure the nll of the first 20,000 tokens of this plain text, which shows how much general language "
        "training has cost.", None, metavar="FILE",
    )  # fmt: skip
    score_temperature: float | None = option(
        f"Measure the nll at this temperature ({', '.join(f'{t:g}' for t in TEMPERATURES)}), chosen on other records; "
        "by default at the best one for these records.", None,
    )  # fmt: skip
    personal_from: str | None = option(
        "The --output_dir of another evaluation of these records, such as the untrained model's. It decides which "
        "tokens are personal, and nll and accuracy are shown for these and for the others.", None, metavar="DIR",
    )  # fmt: skip
    skip_bad: bool = option("Leave out and count records that cannot be read.", False)
    dry_run: bool = dry_run_option()


OPTIONS = (ModelOptions, ScoreFiles, PromptOptions, Measures, EvaluateTexts, EvaluateOptions)
FLAGS = {"folder": "output_dir", "records": "eval_file", "branch": "generate_branches"}


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    model_options, files, prompt_options, measures, texts, options = parse("evaluate", DESCRIPTION, OPTIONS, arguments)
    check_files(files)
    measured = evaluation_options(**vars(files), **vars(measures), **vars(texts), **vars(options))
    target = None
    if options.output_file is not None:
        target = claim_output_file(options.output_file, overwrite=options.overwrite)
    check_engine(measured.generation())
    kept = None if options.output_dir is None else Path(options.output_dir)
    if kept is not None:
        check_folder(kept, overwrite=options.overwrite)
    skipped = SkippedRecords() if options.skip_bad else None
    records = eval_records(files, skipped)
    if skipped is not None and skipped.total:
        say_skipped(skipped)
    baseline = None if options.baseline is None else _baseline(Path(options.baseline), records)
    if options.personal_from is not None:
        with naming("personal_from"):
            read_marks(Path(options.personal_from), records)
    loaded = Loaded(model_options, prompt_options, records)
    _say_prompts(loaded, baseline)
    if options.dry_run:
        from nextquill.cli import dry_run

        name = model_options.model
        dry_run.show([("model", name), *dry_run.evaluation_rows(loaded, measured, name)])
        return OK
    with TemporaryDirectory(prefix="nextquill-") if kept is None else nullcontext(kept) as folder:
        evaluation = _evaluate(loaded, measured, Path(folder), model_options.model, kept is not None)
        if not is_first():
            return OK
        print_evaluation(evaluation)
        if baseline is not None:
            draws: dict[str, Any] = {name: getattr(measured, name) for name in ("level", "resamples", "seed")}
            there = Path(options.baseline)
            differences = compare_evaluations(Path(folder), there, **draws)
            print_differences(differences, evaluation, baseline, str(there))
    if kept is not None:
        print(plain(f"Results: {kept}"))
    if target is not None:
        metrics = {name: metric.value for name, metric in evaluation.metrics.items()}
        write_whole(target, json.dumps(metrics, indent=2) + "\n")
    return OK


def evaluation_options(**flags: Any) -> EvaluationOptions:
    """The flags that are options of `evaluate_model`."""
    if not flags["generate"]:
        flags["generate_branches"] = ()
    names = {each.name for each in fields(EvaluationOptions)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in flags.items() if name in names
    }
    return EvaluationOptions(**values)


def _say_prompts(loaded: Loaded, baseline: Evaluation | None) -> None:
    """Say, before any work, that figures of other prompts cannot be compared with these."""
    own = _prompt(asdict(loaded.settings))
    if loaded.stored is None:
        made = f"{own['order']} order, at most {own['max_length']} tokens"
        say(f"the model's folder has no prompt settings; flags and nextquill's defaults decide the prompts ({made})")
        say("--prompt_from RUN measures with the prompts of a run, so that the two can be compared")
    if baseline is not None:
        there = _prompt(baseline.settings)
        unlike = [
            f"{name} is {there.get(name)} there, {own[name]} here" for name in own if there.get(name) != own[name]
        ]
        if unlike:
            say(f"--baseline has other prompts: {'; '.join(unlike)}; measure both with the same --prompt_from RUN")


def _prompt(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation that decide its prompts."""
    lengths = {name: settings.get(name) for name in ("max_length", "max_response_length")}
    return {**lengths, **settings["template"]}


def _evaluate(loaded: Loaded, options: EvaluationOptions, folder: Path, name: str, kept: bool) -> Evaluation:
    from nextquill.evaluation.evaluate import evaluate_model

    try:
        return evaluate_model(
            loaded.model, loaded.tokenizer, loaded.records, loaded.settings, options, folder,
            model_name=name, trained_users=trained_users(name), progress=bar,
        )  # fmt: skip
    except KeyboardInterrupt:
        if kept:
            say(f"the finished part is in {folder}; the same command resumes")
        raise


def _baseline(folder: Path, records: list[Record]) -> Evaluation:
    """The evaluation that a folder holds; RecordError unless it is a complete one of these records."""
    with naming("baseline"):
        other = read_evaluation(folder)
        read_examples(folder)
    if other.records != records_digest(records):
        raise RecordError(
            f"baseline: {folder} is an evaluation of other records ({other.num_examples}) than --eval_file "
            f"({len(records)}), so they cannot be paired"
        )
    return other
