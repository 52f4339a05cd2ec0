"""Measures a model on the sample: every word under three histories, single past texts, and new texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from demos.kit.progress import Progress
from nextquill.data import EncodedExample, HistoryItem, PromptTemplate, Record, read_jsonl
from nextquill.errors import ArgumentError, naming
from nextquill.evaluation.item_effects import leave_one_out
from nextquill.evaluation.metrics.words import Span, copied, phrases
from nextquill.evaluation.scoring import BranchScorer, pad_token, score_examples, token_texts
from nextquill.generation.writer import Writer
from nextquill.models.configs import default_max_length
from nextquill.models.loading import PromptSettings, load_model, load_prompt_settings
from nextquill.report.examples import choose

SAMPLE = Path(__file__).with_name("people.jsonl")
GUIDANCES = (0.0, 0.5, 1.0)
#: A word whose probability changes by more counts as raised or lowered: the threshold of NextQuill's weights.
CLEAR = 0.05
#: A word is said to lean on a past text if it loses at least so many nats without it.
LEAST_LEANING = 0.5


@dataclass(frozen=True)
class PeopleRecipe:
    """The part of the sample to read: `texts` of each of the first `people`, `shown` of them with single past texts.

    The first `pairs` answer a question, in at most `max_new_tokens`.
    """

    people: int = 12
    texts: int = 4
    shown: int = 6
    pairs: int = 2
    max_new_tokens: int = 40


@dataclass(frozen=True)
class ReadText:
    """A person's own text, word by word.

    `own`, `none` and `other` are p(word | words before) under the person's history, under none, and under the history
    of the other person of the pair. `items[past text][word]` is what leaving that past text out adds to the word's nll,
    in nats; `why` says why this text was chosen for it.
    """

    index: int
    user: str
    words: list[str]
    own: list[float]
    none: list[float]
    other: list[float]
    why: str = ""
    items: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """A person's own answer to a question (record `index`), and the model's answers by γ."""

    index: int
    user: str
    own: str
    written: dict[str, str]


@dataclass(frozen=True)
class People:
    """Everything that a run measured; `results.json` holds it."""

    model: str
    texts: list[ReadText]
    answers: list[Answer]

    def to_json(self) -> str:
        """The results as JSON, one text per line."""
        lines = {
            name: ",\n".join(json.dumps(asdict(each), ensure_ascii=False) for each in getattr(self, name))
            for name in ("texts", "answers")
        }
        parts = "".join(f',\n"{name}": [\n{found}\n]' for name, found in lines.items())
        return f'{{"model": {json.dumps(self.model)}{parts}}}\n'

    @classmethod
    def from_json(cls, text: str) -> People:
        """The results that `to_json` wrote."""
        raw = json.loads(text)
        return cls(
            raw["model"], [ReadText(**each) for each in raw["texts"]], [Answer(**each) for each in raw["answers"]]
        )


def sample(recipe: PeopleRecipe) -> list[Record]:
    """The records that a recipe takes; two people of a pair follow each other."""
    records, taken = read_jsonl(str(SAMPLE)), dict[str, list[Record]]()
    for record in records:
        if record.user_id in taken or len(taken) < recipe.people:
            taken.setdefault(record.user_id, []).append(record)
    return [record for each in taken.values() for record in each[: recipe.texts]]


def partners(records: Sequence[Record]) -> dict[str, str]:
    """The other person of each one's pair."""
    users = list(dict.fromkeys(record.user_id for record in records))
    return {user: users[at ^ 1] for at, user in enumerate(users)}


def load_writer(name: str) -> Writer:
    """The model with its prompt settings. One not trained here reads the history first, so that texts share it."""
    device = torch.accelerator.current_accelerator(check_available=True)
    # Probabilities differ little between two histories; a CPU is also slow in half precision.
    model, tokenizer = load_model(name, dtype="auto" if device else "float32")
    settings = load_prompt_settings(name)
    settings = settings or PromptSettings(PromptTemplate(order="history_first"), default_max_length(model))
    return Writer(model.to(device or "cpu"), tokenizer, settings, keep_history=True)


def measure(name: str, recipe: PeopleRecipe, progress: Progress) -> People:
    """Read the sample with a model and let it write.

    Raises:
        UnsupportedModelError, CheckpointError: the model cannot be loaded.
        ArgumentError, BudgetError: its context does not hold a person's history, a question and an answer.
    """
    records = sample(recipe)
    progress("Loading the model", 0, 1)
    writer = load_writer(name)
    examples = _encoded(writer, records)
    texts = []
    for scores in score_examples(writer.model, examples, pad_token(writer.tokenizer)):
        texts.append(_read_text(writer, scores))
        progress("Reading", len(texts), len(records))
    texts.sort(key=lambda text: text.index)
    return People(
        Path(name).name,
        _with_items(writer, records, examples, texts, recipe, progress),
        _answers(writer, records, recipe, progress),
    )


def _encoded(writer: Writer, records: Sequence[Record]) -> list[EncodedExample]:
    others, histories = partners(records), {record.user_id: record.history for record in records}
    with naming("model_name_or_path"):
        found = [
            writer.encoder.encode(record, index, placebo_history=histories[others[record.user_id]])
            for index, record in enumerate(records)
        ]
    for example in found:
        if example.history_kept < example.history_total:
            raise ArgumentError(
                f"model_name_or_path: expected a context that holds the {example.history_total} past texts of a person "
                f"of the sample and a question; its {writer.settings.max_length} tokens hold {example.history_kept}"
            )
    return found


def _read_text(writer: Writer, scores: Any) -> ReadText:
    words, starts = split_words(token_texts(writer.tokenizer, response_ids(writer, scores.token_ids)))
    branches = (scores.nll_factual, scores.nll_counterfactual, scores.nll_placebo)
    own, none, other = (
        [float(f"{p:.4g}") for p in (-by_word(nll, starts).double()).exp().tolist()] for nll in branches
    )
    return ReadText(scores.example.index, scores.example.user_id, words, own, none, other)


def response_ids(writer: Writer, ids: list[int]) -> list[int]:
    """A response's tokens without those that end it."""
    return ids[: -len(writer.encoder.renderer.end_ids)]


def split_words(pieces: Sequence[str]) -> tuple[list[str], list[int]]:
    """Tokens' texts as words, and the token that each word starts with; a space belongs to the word behind it."""
    starts = [at for at, piece in enumerate(pieces) if at == 0 or piece[:1].isspace()]
    ends = [*starts[1:], len(pieces)]
    return ["".join(pieces[start:end]) for start, end in zip(starts, ends, strict=True)], [*starts, len(pieces)]


def by_word(values: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    """[..., tokens] -> [..., words], summed: the nll of a word is that of its tokens together."""
    return torch.stack([values[..., a:b].sum(-1) for a, b in pairwise(starts)], -1)


def effect(text: ReadText) -> list[float]:
    """p(word) under the person's own history minus p(word) under the other person's."""
    return [own - other for own, other in zip(text.own, text.other, strict=True)]


def by_effect(people: People) -> list[ReadText]:
    """The texts whose single past texts were measured, from the largest effect on."""
    return sorted((text for text in people.texts if text.items), key=lambda text: -sum(effect(text)))


def strongest(text: ReadText) -> tuple[int, int, float] | None:
    """The past text, and the word that loses most without it, of those that the own history raises; and the nats.

    None if it raises no word, or no such word loses half a nat without a single past text.
    """
    raised = [word for word, change in enumerate(effect(text)) if change > CLEAR]
    found = [(item, word, row[word]) for item, row in enumerate(text.items) for word in raised]
    largest = max(found, key=lambda each: each[2], default=(0, 0, 0.0))
    return largest if largest[2] >= LEAST_LEANING else None


def _with_items(
    writer: Writer, records: Sequence[Record], examples: Sequence[EncodedExample], texts: Sequence[ReadText],
    recipe: PeopleRecipe, progress: Progress,
) -> list[ReadText]:  # fmt: skip
    """The texts; some of them have the effect of every single past text."""
    chosen = choose({text.index: sum(effect(text)) for text in texts}, recipe.shown)
    found = list(texts)
    with BranchScorer(writer.model, pad_token(writer.tokenizer)) as scorer:
        for done, (index, why) in enumerate(chosen.items(), 1):
            example = examples[index]
            nats = leave_one_out(scorer, writer.encoder.renderer, records[index], example)
            pieces = token_texts(writer.tokenizer, response_ids(writer, example.factual.response_ids))
            items = [[round(nat, 3) for nat in row] for row in by_word(nats, split_words(pieces)[1]).tolist()]
            found[index] = replace(texts[index], why=why, items=items)
            progress("Leaving out past texts", done, len(chosen))
    return found


def _answers(writer: Writer, records: Sequence[Record], recipe: PeopleRecipe, progress: Progress) -> list[Answer]:
    """The first question of each of the first pairs, answered for both people by the model at every γ."""
    first = {record.user_id: (index, record) for index, record in reversed(list(enumerate(records)))}
    found = list[Answer]()
    for user in list(partners(records))[: 2 * recipe.pairs]:
        index, record = first[user]
        written = {
            f"{guidance:g}": writer.write(
                record.query, record.history, guidance=guidance, max_new_tokens=recipe.max_new_tokens
            )[0].strip()
            for guidance in GUIDANCES
        }
        found.append(Answer(index, user, record.response, written))
        progress("Writing", len(found), 2 * recipe.pairs)
    return found


def copied_from(text: str, history: Sequence[HistoryItem]) -> tuple[int, int, list[Span]]:
    """The number of a text's word triples that occur in a past text, their total, and the places of the copies."""
    return copied(text, {phrase for past in history for phrase in phrases(past.text)})


def copied_share(texts: Sequence[tuple[str, Answer]], records: Sequence[Record]) -> float:
    """The share of word triples that stand in the writer's history."""
    counts = [copied_from(text, records[answer.index].history) for text, answer in texts]
    return sum(found for found, _, _ in counts) / max(1, sum(total for _, total, _ in counts))
