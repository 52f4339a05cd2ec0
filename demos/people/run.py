"""`run_demo`: a real model on the shipped sample of real texts, as a page, a picture and a terminal view."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import rich.table
from rich.console import Console
from rich.text import Text

from demos.kit.progress import Progress, phase_bars
from demos.kit.run import make_folder
from demos.people.measuring import (
    CLEAR,
    GUIDANCES,
    People,
    PeopleRecipe,
    ReadText,
    by_effect,
    copied_from,
    copied_share,
    effect,
    measure,
    sample,
    strongest,
)
from demos.people.picture import picture
from nextquill.data import Record
from nextquill.evaluation.bootstrap import bootstrap_interval
from nextquill.report.data import GeneratedText, LeftOutItem, Page, ResponseVariant, ResponseView, TokenEffect
from nextquill.report.html import render_page
from nextquill.report.numbers import in_words
from nextquill.report.terminal import copied_legend, copied_text, effect_legend, effect_text
from nextquill.storage.atomic_files import write_whole

_PRINTED = 3
_QUICK = PeopleRecipe(people=2, texts=2, shown=1, pairs=1, max_new_tokens=4)


def run_demo(
    output_dir: str | Path,
    model_name_or_path: str,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    console: Console | None = None,
) -> People:
    """Read the sample with a model, which is not trained, and write what was found.

    Args:
        output_dir: receives `demo.html`, `people.svg` and `results.json`, at the end of the run. Made if absent.
        model_name_or_path: a causal language model: a folder, a run's too, or a name on the Hugging Face hub.
        quick: two people and two texts of each, which shows the machinery.
        progress: called as `progress(what, done, at_most)`. Default: a tqdm bar on a terminal's stderr.
        console: where the results are printed. Default: stdout.

    Raises:
        OutputExistsError: `output_dir` is a file.
        UnsupportedModelError, CheckpointError, ArgumentError, BudgetError: see `measure`.
    """
    folder, recipe, start = make_folder(output_dir), _QUICK if quick else PeopleRecipe(), time.perf_counter()
    with phase_bars(progress) as shown:
        people = measure(model_name_or_path, recipe, shown)
    records = sample(recipe)
    found = findings(people, records)
    contents = {
        "demo.html": render_page(page(people, records, found)),
        "people.svg": picture(people, records),
        "results.json": people.to_json(),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    out = console or Console(highlight=False)
    _print(people, found, records, out)
    written = ", ".join(str(folder / name) for name in contents)
    out.print(f"\nThe run took {time.perf_counter() - start:.0f} s. Written: {written}", soft_wrap=True)
    return people


# ---- what follows from the figures ------------------------------------------------------------------


def findings(people: People, records: Sequence[Record]) -> list[tuple[str, str]]:
    """Heading and text of each finding; all figures are the run's."""
    return [_worth(people), _words(people), *_past_text(people, records), _voices(people, records)]


def _worth(people: People) -> tuple[str, str]:
    gains = [
        statistics.fmean(math.log(own / other) for own, other in zip(text.own, text.other, strict=True))
        for text in people.texts
    ]
    users = [text.user for text in people.texts]
    value, low, high = bootstrap_interval(gains, users)
    verdict = "The model reads who is writing" if low > 0 else "No clear use of a person's own history"
    figures = (
        f"A word of a person's later texts is worth {in_words(value, low, high, 'nats')} more under their "
        f"own history than under another person's (95% interval over {len(set(users))} people, {len(users)} texts). "
    )
    return verdict, figures + "The demo does not train the model."


def _words(people: People) -> tuple[str, str]:
    changes = [change for text in people.texts for change in effect(text)]
    up, down = (sum(sign * change > CLEAR for change in changes) / len(changes) for sign in (1, -1))
    heading = f"{up:.0%} of the words become clearly more likely, {down:.0%} less"
    text = (
        f"Clearly: by more than {CLEAR:g} in probability, own history against another person's; {len(changes)} words."
    )
    return heading, text


def _past_text(people: People, records: Sequence[Record]) -> list[tuple[str, str]]:
    leaning = [(found, text) for text in by_effect(people) if (found := strongest(text)) is not None]
    if not leaning:
        return []
    (item, word, nats), text = max(leaning, key=lambda each: each[0][2])
    said = (
        f"The clearest below: {text.user} wrote “{text.words[word].strip()}”. Without the one past text "
        f"“{records[text.index].history[item].text}” it is {nats:.1f} nats less likely, although the "
        f"{len(text.items) - 1} others stay in view."
    )
    return [("Words lean on single past texts", said)]


def _voices(people: People, records: Sequence[Record]) -> tuple[str, str]:
    answers = people.answers
    shares = {
        guidance: copied_share([(answer.written[guidance], answer) for answer in answers], records)
        for guidance in answers[0].written
    }
    own = copied_share([(answer.own, answer) for answer in answers], records)
    said = ", ".join(f"{share:.0%} at γ = {guidance}" for guidance, share in shares.items())
    text = (
        "γ strengthens what the own history adds to each next word, in part by copying. Of the three-word sequences in "
        f"the model's answers, {said} stand in the person's history; of those in the people's own answers, {own:.0%} "
        f"({len(answers)} answers each)."
    )
    return "What guidance does", text


# ---- page -------------------------------------------------------------------------------------------


def page(people: People, records: Sequence[Record], found: Sequence[tuple[str, str]]) -> Page:
    """The page of a run."""
    return Page(
        title=f"What {people.model} takes from a person's own words",
        lead=(
            "Real people read two arguments and wrote which convinces more. The model reads their later texts: once "
            "after the person's own twelve earlier texts, once after those of another person."
        ),
        findings=found,
        responses=[
            *(_read_view(text, records[text.index]) for text in by_effect(people)),
            *_answer_views(people, records),
        ],
        responses_lead=(
            "Colour: p(word) under the person's own history minus p(word) under the other person's. First texts by "
            "their effect, a third each of the largest, middle and smallest; then one question, answered for two "
            "people."
        ),
        footer=(
            "Texts: a sample of UKPConvArg1 (Habernal and Gurevych, ACL 2016), CC BY 4.0; worker ids replaced, "
            "arguments shortened. γ decoding: arXiv 2305.14739, candidates with p ≥ a tenth of the largest."
        ),
    )


def _read_view(text: ReadText, record: Record) -> ResponseView:
    columns = zip(text.words, text.own, text.none, text.other, strict=True)
    items = [LeftOutItem("", past.text, row) for past, row in zip(record.history, text.items, strict=True)]
    words = ResponseVariant("the person's own text", [TokenEffect(*each) for each in columns], "", items, True)
    return ResponseView(f"{text.user} wrote", [("Question", record.query), ("Shown for", text.why)], [words])


def _answer_views(people: People, records: Sequence[Record]) -> list[ResponseView]:
    pairs = zip(people.answers[::2], people.answers[1::2], strict=True)
    return [
        ResponseView(
            f"One question, two people: {one.user} and {two.user}",
            [("Question", records[one.index].query), *((f"{each.user} wrote", each.own) for each in (one, two))],
            [],
            [
                _written(f"as {each.user}, γ = {guidance}", text, records[each.index])
                for each in (one, two)
                for guidance, text in each.written.items()
            ],
        )
        for one, two in pairs
    ]


def _written(label: str, text: str, record: Record) -> GeneratedText:
    found, total, spans = copied_from(text, record.history)
    note = f"{found} of {total} three-word sequences from the history" if total else ""
    return GeneratedText(label, text, note, spans)


# ---- terminal ---------------------------------------------------------------------------------------


def _print(people: People, found: Sequence[tuple[str, str]], records: Sequence[Record], out: Console) -> None:
    for heading, text in found:
        out.print(Text.assemble((heading, "bold"), "\n", text, "\n"))
    out.print(Text.assemble("Own history against another person's: ", effect_legend(), "\n"))
    for each in by_effect(people)[:_PRINTED]:
        out.print(Text.assemble((f"{each.user}  ", "dim"), effect_text(each.words, effect(each))))
    out.print()
    table = rich.table.Table("", *(f"γ = {guidance:g}" for guidance in GUIDANCES), title="One question, two people")
    for answer in people.answers[:2]:
        history = records[answer.index].history
        marked = (copied_text(text, copied_from(text, history)[2]) for text in answer.written.values())
        table.add_row(answer.user, *marked)
    out.print(table)
    out.print(copied_legend())
