"""`nextquill popi summarize`: writes one summary for every user into a file that people can read and edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nextquill.cli.flags import check_output_file, check_positive, option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse
from nextquill.cli.popi_options import PopiFormat, PopiRunOptions, PopiSignals, loaded_run, read_settings
from nextquill.cli.terminal import bar, say
from nextquill.data import HistoryItem
from nextquill.errors import ArgumentError, RecordError, naming
from nextquill.popi.summaries import Summary, SummaryFile, all_signals, signals_hash, summarize
from nextquill.popi.users import LEAST_SIGNALS, User
from nextquill.ranks import is_first, on_first

if TYPE_CHECKING:
    from nextquill.popi.saved_run import SavedRun

DESCRIPTION = (
    "Write one summary for every user into a JSONL file. A summary is written again only if the user's signals, the "
    "model or its settings have changed; an edited one stays. Summaries are saved as they are written, and the same "
    "command resumes a stopped run."
)
# Summaries per write, as each write replaces the whole file.
_KEPT_TOGETHER = 64
Signals = Mapping[str, tuple[HistoryItem, ...]]


@dataclass
class PopiSummarizeOptions:
    """Summaries: selection, sampling and file."""

    output_file: str = option("The file of summaries, JSONL; it may exist already.", metavar="FILE")
    held_out: bool = option("Read only the users' first pairs, because evaluate judges summaries by the others.", False)
    again: bool = option("Also replace summaries that are up to date.", False)
    force: bool = option("Also replace summaries that a person has edited.", False)
    max_new_tokens: int | None = option("Most tokens of a summary (default: as in training).", None)
    temperature: float = option("Sampling temperature; 0: greedy.", 0.0)
    seed: int = option("Seed of sampling.", 0)
    batch_size: int = option("Summaries written at a time.", 16)

    def writer(self, saved: SavedRun) -> str:
        """The name of the model and its settings, which each summary holds."""
        return saved.writer(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)

    def check(self) -> None:
        """Raise ArgumentError for values that do not fit."""
        check_positive(self, ("max_new_tokens", "batch_size"))
        if not 0 <= self.temperature < float("inf"):
            raise ArgumentError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")


@dataclass
class PopiSignalFiles:
    """Data: the users' records."""

    records_file: list[str] = option("Users' records: pairs and past texts.", aliases=["signals_file"], metavar="PATH")


OPTIONS = (PopiRunOptions, PopiSignalFiles, PopiFormat, PopiSignals, PopiSummarizeOptions)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    models, files, form, shown, options = parse("popi summarize", DESCRIPTION, OPTIONS, arguments)
    models.check()
    options.check()
    shown.check()
    if shown.max_pairs is not None and not options.held_out:
        raise ArgumentError("max_pairs: expected --held_out with it")
    file = SummaryFile(check_output_file(options.output_file, overwrite=True))
    with naming("output_file"):
        file.read()
    config = read_settings(models.model)[0]
    users = form.users("records_file", files.records_file, need_pairs=False)
    if options.held_out:
        draws = shown.hold_out("records_file", users, config).draws
        signals: Signals = {draw.user_id: draw.signals for draw in draws}
    else:
        signals = _signals(users, shown.signals_per_user or config.signals_per_user)
    saved = loaded_run(models)
    hashes = {user: signals_hash(own) for user, own in signals.items()}
    known = on_first(file.read)
    edited = [user for user, summary in known.items() if summary.edited and user in hashes]
    stale = on_first(lambda: file.missing(hashes, options.writer(saved)))
    wanted = set(hashes if options.again or options.force else stale)
    todo = [user for user in hashes if user in wanted and (options.force or user not in edited)]
    _write(saved, file, {user: signals[user] for user in todo}, options)
    _report(file, hashes, len(todo), [] if options.force else edited)
    return OK


def _signals(users: Sequence[User], most: int) -> Signals:
    """The signals of users with enough of them; the others are counted on stderr."""
    found = {user.user_id: all_signals(user, num_signals=most) for user in users}
    least = min(LEAST_SIGNALS, most)
    few = [user for user, own in found.items() if len(own) < least]
    if len(few) == len(found):
        raise RecordError(f"records_file: expected users with at least {least} signals, got none of {len(found)}")
    if few:
        say(f"users left out with too few signals: {len(few)}, such as {few[0]!r}")
    return {user: own for user, own in found.items() if len(own) >= least}


def _write(saved: SavedRun, file: SummaryFile, signals: Signals, options: PopiSummarizeOptions) -> None:
    """Write the summaries of these users; if stopped, save the finished ones."""
    written = summarize(
        saved.roles.inference,
        saved.inference_prompts,
        signals,
        max_new_tokens=options.max_new_tokens or saved.config.max_summary_tokens,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    kept, writer = list[Summary](), options.writer(saved)
    try:
        for each in bar(written, total=len(signals), desc="Summarizing", unit=" users"):
            own = signals[each.user_id]
            made = {"summary": each.text, "tokens": each.tokens, "cut": not each.ended}
            kept.append(Summary.made_now(each.user_id, own, model=writer, **made))
            if len(kept) >= _KEPT_TOGETHER:
                _put(file, kept, options)
                kept = []
    finally:
        _put(file, kept, options)


def _put(file: SummaryFile, summaries: Sequence[Summary], options: PopiSummarizeOptions) -> None:
    if is_first():
        file.put(*summaries, force=options.force)


def _report(file: SummaryFile, hashes: Mapping[str, str], written: int, edited: Sequence[str]) -> None:
    known = file.read()
    empty = [user for user in hashes if user in known and not known[user].summary.strip()]
    cut = [user for user in hashes if user in known and known[user].cut]
    outdated = file.outdated_edits(hashes)
    kept = f"{len(hashes) - written} kept" + (f" ({len(edited)} edited by a person)" if edited else "")
    say(f"{file.path}: {written} written, {kept}")
    if empty:
        say(f"empty summaries: {len(empty)}, such as that of {empty[0]!r}")
    if cut:
        say(f"summaries cut at the limit of tokens: {len(cut)}, such as that of {cut[0]!r}; see --max_new_tokens")
    if outdated:
        named = f"{len(outdated)}, such as that of {outdated[0]!r}"
        say(f"edited summaries whose signals have changed: {named}; --force replaces them")
