"""`nextquill popi evaluate`: measures how often the generator prefers its user's choice, and what the summary adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nextquill.cli.evaluation_tables import new_table, show
from nextquill.cli.flags import check_file, check_positive, claim_output_file, option
from nextquill.cli.load_and_score import device
from nextquill.cli.main import OK
from nextquill.cli.options import attention_option
from nextquill.cli.parsing import parse
from nextquill.cli.popi_options import (
    PopiFormat,
    PopiRunOptions,
    PopiSignals,
    check_not_read,
    loaded_run,
    read_settings,
)
from nextquill.cli.terminal import bar, say
from nextquill.errors import RecordError, naming
from nextquill.evaluation.bootstrap import check_draws
from nextquill.models.loading import find_tokenizer, load_model
from nextquill.popi.prompts import GeneratorPrompts
from nextquill.popi.summaries import Summary, SummaryFile, signals_hash, summarize
from nextquill.popi.users import Draw
from nextquill.ranks import is_first
from nextquill.report.numbers import counted, in_words, p_value
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.checkpoints import trained_users, user_digest

if TYPE_CHECKING:
    from nextquill.popi.evaluation import PairEvaluation, PairMeasures
    from nextquill.popi.roles import Role
    from nextquill.popi.saved_run import SavedRun

DESCRIPTION = (
    "Measure on held-out pairs how often the generator prefers the user's choice: without context, with the user's "
    "signals, with the user's summary and, as placebo, with another user's. A user's first pairs are the signals, the "
    "others are held out. Intervals are over users."
)
#: The measures whose intervals are shown, below the values to fit 80 characters.
_HEADINGS = {"accuracy": "accuracy", "logprob_accuracy": "of log p", "margin": "margin r"}


@dataclass
class PopiPairs:
    """Data: pairs and summaries."""

    eval_file: list[str] = option(
        "Pairs of users who were not trained on.", aliases=["test_file", "records_file"], metavar="PATH"
    )
    summaries_file: str | None = option(
        "Summaries from summarize --held_out, edited or not; by default the model writes them.", None, ["summaries"],
        metavar="FILE",
    )  # fmt: skip


@dataclass
class PopiEvaluateOptions:
    """Measures and output."""

    transfer_model: list[str] | None = option(
        "Other generators, not trained with POPI, to measure with the same contexts.", None, metavar="MODEL"
    )
    reference_model: str | None = option(
        "The generator before training, if it was a whole model (for adapters: their base).", None, metavar="MODEL"
    )
    output_file: str | None = option("Also write the results here, as JSON.", None, metavar="FILE")
    overwrite: bool = option("Replace an existing output file.", False)
    batch_size: int = option("Summaries written at a time.", 16)
    attention: str = attention_option()
    max_tokens: int | None = option("Most tokens of one forward pass; shared tokens count once, padding counts.", None)
    seed: int = option("Seed of the placebos and of the intervals' resamples.", 0)
    level: float = option("Confidence level of the intervals.", 0.95)
    resamples: int = option("Resamples of each interval.", 2000)

    def check(self) -> None:
        """Raise ArgumentError for values that do not fit."""
        check_positive(self, ("batch_size", "max_tokens"))
        check_draws(self.level, self.resamples, self.seed)


OPTIONS = (PopiRunOptions, PopiPairs, PopiFormat, PopiSignals, PopiEvaluateOptions)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    models, files, form, shown, options = parse("popi evaluate", DESCRIPTION, OPTIONS, arguments)
    from nextquill.popi.evaluation import PairEvaluation

    models.check()
    options.check()
    shown.check()
    target = None
    if options.output_file is not None:
        target = claim_output_file(options.output_file, overwrite=options.overwrite)
        check_not_read(target, [*files.eval_file, *([] if files.summaries_file is None else [files.summaries_file])])
    config = read_settings(models.model)[0]
    held = shown.hold_out("eval_file", form.users("eval_file", files.eval_file), config)
    new_users = _new_users(models.model, held.draws)
    known = None if files.summaries_file is None else _read(files.summaries_file, held.draws)
    saved = loaded_run(models)
    _check_prompts(saved, held.draws, options, 0 if known else config.max_summary_tokens)
    if known is not None:
        _warn_of_other_writers(known, saved)
        summaries = {user: summary.summary for user, summary in known.items()}
    else:
        summaries = _written(saved, held.draws, options.batch_size)
    generator = saved.roles.generator
    if options.reference_model is not None:
        generator = generator.against(_loaded("reference_model", options.reference_model, models)[0])
    if generator.is_what_it_was and not config.freeze_generator:
        say(
            "the folder does not hold the untrained generator, so the trained one without context is the reference; "
            "--reference_model gives the untrained one"
        )
    measured, sees = partial(_measured, saved, held.draws, summaries, options), config.reference_sees_summary
    evaluation = PairEvaluation(
        model=models.model,
        generator=measured(generator, saved.generator_prompts, sees=sees),
        transfer={name: measured(*_untrained(name, saved, models), sees=False) for name in _others(options)},
        empty_summaries=sum(not text.strip() for text in summaries.values()),
        left_out=held.left_out,
        new_users=new_users,
        settings={
            "signals_per_user": shown.signals_per_user or config.signals_per_user,
            "max_pairs": shown.max_pairs,
            "summaries": files.summaries_file,
            **{name: getattr(config, name) for name in ("objective", "beta", "reference_sees_summary")},
            **{name: getattr(options, name) for name in ("reference_model", "seed", "level", "resamples")},
        },
    )
    _print(evaluation, options.level)
    if target is not None and is_first():
        write_whole(target, evaluation.to_json())
    return OK


def _others(options: PopiEvaluateOptions) -> list[str]:
    return list(dict.fromkeys(options.transfer_model or ()))


def _read(path: str, draws: Sequence[Draw]) -> dict[str, Summary]:
    """Summaries of exactly these signals, as a summary of more signals may have seen a held-out pair."""
    check_file("summaries_file", path)
    with naming("summaries_file"):
        known = SummaryFile(path).read()
    other = [
        d.user_id for d in draws if d.user_id not in known or known[d.user_id].signals_hash != signals_hash(d.signals)
    ]
    if other:
        raise RecordError(
            f"summaries_file: {len(other)} of {len(draws)} users have no summary of exactly these signals, such as "
            f"{other[0]!r}; write them with summarize --held_out and the same --signals_per_user and --max_pairs"
        )
    return {draw.user_id: known[draw.user_id] for draw in draws}


def _new_users(folder: str, draws: Sequence[Draw]) -> int | None:
    """The number of users who were in no training data, None if not known; warns of the others."""
    if (trained := trained_users(folder)) is None:
        return None
    both = [draw.user_id for draw in draws if user_digest(draw.user_id) in trained]
    if both:
        say(
            f"{len(both)} of {len(draws)} users were trained on, if the same id is the same user, such as {both[0]!r}; "
            "their pairs are not held out"
        )
    return len(draws) - len(both)


def _warn_of_other_writers(known: Mapping[str, Summary], saved: SavedRun) -> None:
    """Print a warning where another model wrote summaries; edited ones are meant to differ."""
    other = [user for user, summary in known.items() if not summary.edited and not summary.is_by(saved.writer())]
    if other:
        say(
            f"summaries by another model than {saved.writer()}, or with other settings: {len(other)}, such as that of "
            f"{other[0]!r}, by {known[other[0]].model}"
        )


def _check_prompts(saved: SavedRun, draws: Sequence[Draw], options: PopiEvaluateOptions, summary_tokens: int) -> None:
    """Check that all models exist and all pairs fit, before anything is written or scored."""
    prompts = [("eval_file", "", saved.generator_prompts)]
    for name in _others(options):
        with naming("transfer_model", "model_name_or_path"):
            tokenizer = find_tokenizer(name)
        each = GeneratorPrompts(tokenizer, saved.templates, max_length=saved.config.max_length)
        prompts.append(("transfer_model", f"{name}: ", each))
    for flag, name, each in prompts:
        with naming(flag):
            for draw in draws:
                for pair in draw.pairs:
                    each.check(pair, summary_tokens, f"{name}user {draw.user_id!r}")


def _written(saved: SavedRun, draws: Sequence[Draw], batch_size: int) -> dict[str, str]:
    written = summarize(
        saved.roles.inference,
        saved.inference_prompts,
        {draw.user_id: draw.signals for draw in draws},
        max_new_tokens=saved.config.max_summary_tokens,
        batch_size=batch_size,
    )
    return {each.user_id: each.text for each in bar(written, total=len(draws), desc="Summarizing", unit=" users")}


def _loaded(flag: str, name: str, models: PopiRunOptions) -> tuple[Any, Any]:
    with naming(flag, "model_name_or_path"):
        model, tokenizer = load_model(name, **models.loading())
    return model.to(device()), tokenizer


def _untrained(name: str, saved: SavedRun, models: PopiRunOptions) -> tuple[Role, GeneratorPrompts]:
    """A transfer model as a generator, which is its own reference."""
    from nextquill.popi.roles import GENERATOR, Role

    model, tokenizer = _loaded("transfer_model", name, models)
    prompts = GeneratorPrompts(tokenizer, saved.templates, max_length=saved.config.max_length)
    return Role.untrained(GENERATOR, model, tokenizer), prompts


def _measured(
    saved: SavedRun,
    draws: Sequence[Draw],
    summaries: Mapping[str, str],
    options: PopiEvaluateOptions,
    generator: Role,
    prompts: GeneratorPrompts,
    *,
    sees: bool,
) -> PairMeasures:
    from nextquill.popi.evaluation import measure, score_pairs

    scores = score_pairs(
        generator,
        prompts,
        draws,
        summaries,
        loss=saved.config.loss,
        reference_sees_context=sees,
        seed=options.seed,
        attention=options.attention,
        max_tokens=options.max_tokens,
        progress=bar,
    )
    return measure(scores, level=options.level, resamples=options.resamples, seed=options.seed)


# ---- the tables ------------------------------------------------------------------------------------


def _print(evaluation: PairEvaluation, level: float) -> None:
    found = evaluation.generator
    _print_contexts(evaluation.model, found)
    for name, each in evaluation.transfer.items():
        _print_contexts(f"transfer: {name}", each)
    known = "" if evaluation.new_users is None else f" ({evaluation.new_users} never trained on)"
    show(f"{counted(found.pairs, 'pair')} of {counted(found.users, 'user')}{known}.")
    show(f"[low, high]: {level:.0%} intervals over users.")
    show("Accuracy: share of pairs with a margin r (nats, against the reference) above 0; of log p: without reference.")
    if evaluation.transfer:
        show("A transfer model is its own reference: its r is the context's effect, and 0 without context.")
    if found.token_ratio is not None:
        show(f"Signals take {found.token_ratio:.1f} times the tokens of summaries.")
    if "placebo" not in found.contexts:
        show("No placebo: it needs two users with a summary.")
    if evaluation.empty_summaries:
        say(f"empty summaries, which give no context: {evaluation.empty_summaries}")


def _print_contexts(title: str, found: PairMeasures) -> None:
    table = new_table("context", *_HEADINGS.values(), "loss", "tokens")
    table.columns[0].no_wrap = True
    table.padding, table.pad_edge = (0, 1, 0, 0), False  # 80 characters hold three intervals with two digits before
    for name, each in found.contexts.items():
        cells = [in_words(*each.measures[column], gap="\n") for column in _HEADINGS]
        table.add_row(name, *cells, in_words(each.measures["loss"].value), f"{each.context_tokens:.1f}")
    show(title)
    show(table)
    if not found.differences:
        return
    table = new_table("difference", "accuracy", "p", "margin r", "p")
    for name, differences in found.differences.items():
        cells = []
        for result in (differences["accuracy"], differences["margin"]):
            cells.append(in_words(result.difference, result.low, result.high, sign="+", gap="\n"))
            cells.append(p_value(result.p_value))
        table.add_row(f"summary - {name}", *cells)
    show(table)
