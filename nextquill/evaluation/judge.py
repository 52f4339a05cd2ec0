"""A language model as a judge of whose text it is: the likelihood of a text under several people's histories.

    log p(text | prompt with a candidate's history) = Σ_t log p(text[t] | prompt, text[:t])

The judge picks the candidate with the largest log-probability. It chooses from the same people as the judge of 3-grams.
It should be a model that none of the measured methods has trained, such as their common base. The prompts are those of
the evaluation, with the record's own query, so a text gains nothing by answering the query.

Prompts that begin alike are computed together: those with one history where it comes first, else those of one record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nextquill.data import Branch, ExampleEncoder, HistoryItem, Record
from nextquill.errors import ArgumentError, BudgetError, naming
from nextquill.evaluation.measures import RIGHT_PERSON_LM, LabelledScores, text_measure
from nextquill.evaluation.metrics import Authors, MetricScores
from nextquill.evaluation.metrics.authors import share_of_first
from nextquill.evaluation.scoring import BranchScorer, pad_token
from nextquill.evaluation.text_measures import longest_histories
from nextquill.models.configs import check_vocabulary, context_length
from nextquill.models.loading import PromptSettings, load_model
from nextquill.ranks import deal


class _Case(NamedTuple):
    """A record, by its position, and a candidate, by its place among the record's; the first is the author."""

    record: int
    place: int
    history: tuple[HistoryItem, ...]


class PersonJudge:
    """A language model that picks the author of texts, with everything that it compares.

    Args:
        model, tokenizer: an untrained causal language model and its tokenizer.
        records: the records whose texts are judged.
        among: records of all people that the judge chooses from.
        authors: the users and histories of `records`, and whom each is compared with.
        settings: how prompts are made.
        candidates: the number of people to choose from, the author included.

    Raises:
        ArgumentError: fewer than two people have a history, the judge's context is shorter than the prompts may be, or
            its tokenizer does not fit.
        BudgetError: a record's query and response do not fit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        records: Sequence[Record],
        among: Sequence[Record],
        authors: Authors,
        settings: PromptSettings,
        candidates: int,
    ) -> None:
        self.model, self.tokenizer, self._records, self._settings = model, tokenizer, records, settings
        if not authors.are_several:
            raise ArgumentError(
                f"it picks a person among several, so records need histories of at least two people, got those of "
                f"{len(authors.chosen_from)}"
            )
        check_vocabulary(model, tokenizer)
        longest = context_length(model)
        if longest is not None and longest < settings.max_length:
            raise ArgumentError(
                f"expected a context of at least max_length={settings.max_length} tokens, got {longest}"
            )
        self._encoder = ExampleEncoder(tokenizer, **vars(settings))
        self._rooms = [self._room(index) for index in range(len(records))]
        everyone, template = longest_histories(among), settings.template
        shares_history = template.order == "history_first" and template.prompt_jinja is None
        groups: dict[object, list[_Case]] = {}
        for index, record in enumerate(records):
            others = authors.others(index)[: candidates - 1]
            if record.history and others:
                histories = (record.history, *(everyone[user].history for user in others))
                for place, history in enumerate(histories):
                    key = history if shares_history else index
                    groups.setdefault(key, []).append(_Case(index, place, history))
        #: What is computed together, in order; each is a line of the stage.
        self.groups = list(groups.values())

    @classmethod
    def load(cls, name: str, device: Any, *rest: Any) -> PersonJudge:
        """The judge of that name, on a device; `rest` as for the class. An error names `judge_model`."""
        with naming("judge_model", "model_name_or_path"):
            model, tokenizer = load_model(name)
            return cls(model.to(device), tokenizer, *rest)

    def lines(self, texts: Sequence[Sequence[str]], done: Any, **options: Any) -> Iterator[dict[str, Any]]:
        """The log-probabilities of every record's texts under its candidates, one line per group.

        Args:
            texts: the texts of each record, equally many for all.
            done: the indices of lines that exist already.
            options: of `BranchScorer`.
        """
        left = (group for group in range(len(self.groups)) if group not in done)
        with BranchScorer(self.model, pad_token(self.tokenizer), **options) as scorer:

            def lines(group: int) -> list[dict[str, Any]]:
                return [{"index": group, "logprobs": self._logprobs(scorer, self.groups[group], texts)}]

            yield from deal(left, lines)

    def _logprobs(
        self, scorer: BranchScorer, cases: Sequence[_Case], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Σ log p of each text of each case, in nats; equal texts are computed once."""
        branches = dict[tuple[int, str], Branch]()
        for at, case in enumerate(cases):
            room = self._rooms[case.record]
            ids = {text: self._encoder.renderer.response_ids(text)[:room] for text in texts[case.record]}
            longest = max(map(len, ids.values()))
            prompt, _ = self._encoder.encode_prompt(self._records[case.record].query, case.history, longest)
            branches.update({(at, text): Branch(prompt, response) for text, response in ids.items()})
        found = dict(zip(branches, scorer(list(branches.values())), strict=True))
        return [
            [round(-float(found[at, text].double().sum()), 6) for text in texts[case.record]]
            for at, case in enumerate(cases)
        ]

    def _room(self, index: int) -> int:
        """The tokens that a text of a record may take; what is longer is judged by its beginning."""
        record, settings = self._records[index], self._settings
        try:
            prompt, _ = self._encoder.encode_prompt(record.query)
            needed = len(self._encoder.renderer.response_ids(record.response))
            room = settings.max_length - len(prompt)
            room = min(room, settings.max_response_length or room)
            if room < needed:
                raise BudgetError(f"its response takes {needed} tokens, there is room for {room}")
        except BudgetError as error:
            raise BudgetError(f"record {index}: {error}") from error
        return room

    def measures(self, lines: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> dict[str, LabelledScores]:
        """The share of texts whose author the judge picks, by name, from its lines.

        Args:
            lines: those of all groups.
            labels: the name and the label of the measure of each text of a record, in order.
        """
        found: list[dict[int, list[float]]] = [{} for _ in self._records]
        for line in lines:
            for case, logprobs in zip(self.groups[line["index"]], line["logprobs"], strict=True):
                found[case.record][case.place] = logprobs
        measures = dict[str, LabelledScores]()
        for at, (name, label) in enumerate(labels.items()):
            shares = [
                share_of_first([each[place][at] for place in sorted(each)]) if each else float("nan") for each in found
            ]
            better = True if name == RIGHT_PERSON_LM else None
            measures |= text_measure(name, label, MetricScores.mean_of_defined(shares), higher_is_better=better)
        return measures
