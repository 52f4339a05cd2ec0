"""From records to token ids under a budget.

Each record becomes two branches, or three, that share the response and differ in the history:

    factual          the user's own history
    counterfactual   none
    placebo          another user's history

The budget is `prompt + response <= max_length` for every branch. What does not fit is dropped as whole history items,
oldest first; the query and the response are never cut, because a response without its end or a query without its
beginning trains something nobody asked for. What cannot fit is a `BudgetError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nextquill.data._checks import check_integer
from nextquill.data.placebo import assign_placebo_histories
from nextquill.data.records import HistoryItem, Record
from nextquill.data.rendering import PromptRenderer, Tokenizer
from nextquill.data.templates import PromptTemplate
from nextquill.errors import ArgumentError, BudgetError

Progress = Callable[..., Iterable[Any]]

_CACHED_ITEMS = 200_000


@dataclass(frozen=True, slots=True)
class Branch:
    """One prompt and the response to it, as token ids.

    Args:
        prompt_ids: everything before the response; never empty, as its last position predicts the first response token.
        response_ids: the response and what ends it; all supervised.
    """

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def input_ids(self) -> list[int]:
        """The prompt and the response, in one list."""
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One record as token ids.

    Args:
        user_id: whose record it is.
        index: the record's position among the records it was encoded with.
        factual, counterfactual: the branches with and without the user's history; equal if no item was kept.
        placebo: the branch with another user's history, or None.
        history_kept: how many of the user's own history items are in the factual branch.
        history_total: how many the record has.
        effects: float32 [2, n], nll_factual and nll_counterfactual of the response as some model has measured them, in
            nats, or None; see `load_effects`.
    """

    user_id: str
    index: int
    factual: Branch
    counterfactual: Branch
    placebo: Branch | None
    history_kept: int
    history_total: int
    effects: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class EncodingStats:
    """What encoding kept and dropped.

    Args:
        examples: number of examples.
        history_items: history items of all records.
        history_items_dropped: those that did not fit the budget.
        examples_truncated: examples that lost at least one item.
        examples_without_history: examples with no item left, whose factual and counterfactual branches are equal.
        prompt_tokens: tokens of all factual prompts.
        response_tokens: supervised tokens of all examples, counted once per example.
    """

    examples: int
    history_items: int
    history_items_dropped: int
    examples_truncated: int
    examples_without_history: int
    prompt_tokens: int
    response_tokens: int

    @classmethod
    def from_examples(cls, examples: Sequence[EncodedExample]) -> EncodingStats:
        """Count over `examples`."""
        return cls(
            examples=len(examples),
            history_items=sum(example.history_total for example in examples),
            history_items_dropped=sum(example.history_total - example.history_kept for example in examples),
            examples_truncated=sum(example.history_kept < example.history_total for example in examples),
            examples_without_history=sum(example.history_kept == 0 for example in examples),
            prompt_tokens=sum(len(example.factual.prompt_ids) for example in examples),
            response_tokens=sum(len(example.factual.response_ids) for example in examples),
        )


class ExampleEncoder:
    """Encodes records with one tokenizer, one template and one budget.

    Args:
        tokenizer: a Hugging Face tokenizer or its like.
        template: wording and order of the prompt.
        max_length: most tokens of prompt and response together, in every branch.
        max_response_length: most tokens of a response with what ends it; None for no limit but `max_length`.

    Raises:
        ArgumentError: a length below 1, or a tokenizer that the template cannot be used with.
        ArgumentTypeError: a length that is not an integer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PromptTemplate | None = None,
        max_length: int = 2048,
        max_response_length: int | None = None,
    ) -> None:
        check_integer("max_length", max_length, least=1)
        if max_response_length is not None:
            check_integer("max_response_length", max_response_length, least=1)
        self.template = PromptTemplate() if template is None else template
        self.renderer = PromptRenderer(self.template, tokenizer)
        self.max_length = max_length
        self.max_response_length = max_response_length
        self._item_tokens: dict[HistoryItem, int] = {}

    def encode(
        self, record: Record, index: int = 0, placebo_history: Sequence[HistoryItem] | None = None
    ) -> EncodedExample:
        """Encode one record.

        Args:
            record: the record.
            index: kept in the example, and named in errors.
            placebo_history: another user's history, oldest first, held to the same budget; None for no placebo branch.

        Raises:
            BudgetError: the response, or the prompt without history together with it, exceeds the budget.
        """
        response_ids = self.renderer.response_ids(record.response)
        bare_prompt = self.renderer.prompt_ids(record.query)
        self._check_budget(record, index, len(bare_prompt), len(response_ids))
        room = self.max_length - len(response_ids)
        prompt, kept = self._fit(record.query, record.history, bare_prompt, room)
        placebo = None
        if placebo_history is not None:
            placebo = Branch(self._fit(record.query, placebo_history, bare_prompt, room)[0], response_ids)
        return EncodedExample(
            user_id=record.user_id,
            index=index,
            factual=Branch(prompt, response_ids),
            counterfactual=Branch(bare_prompt, response_ids),
            placebo=placebo,
            history_kept=kept,
            history_total=len(record.history),
        )

    def encode_all(
        self, records: Iterable[Record], placebo: bool = False, seed: int = 0, progress: Progress | None = None
    ) -> list[EncodedExample]:
        """Encode all records, numbered in their order.

        Args:
            records: the records.
            placebo: also encode each response under another user's history, drawn by `assign_placebo_histories`; the
                branch stays None if all records are of one user.
            seed: decides who that other user is.
            progress: called as `progress(records, total=..., desc=...)` and iterated instead of them; `tqdm` fits.

        Raises:
            BudgetError: see `encode`.
        """
        records = list(records)
        histories = assign_placebo_histories(records, seed) if placebo else [None] * len(records)
        shown: Iterable[Record] = records
        if progress is not None:
            shown = progress(records, total=len(records), desc="Encoding")
        return [self.encode(record, index, histories[index]) for index, record in enumerate(shown)]

    def _check_budget(self, record: Record, index: int, prompt_tokens: int, response_tokens: int) -> None:
        where = f"record {index} (user {record.user_id!r})"
        if self.max_response_length is not None and response_tokens > self.max_response_length:
            raise BudgetError(
                f"{where}: the response takes {response_tokens} tokens, max_response_length is "
                f"{self.max_response_length}"
            )
        if prompt_tokens + response_tokens > self.max_length:
            raise BudgetError(
                f"{where}: the prompt without any history takes {prompt_tokens} tokens and the response "
                f"{response_tokens}, together {prompt_tokens + response_tokens}; max_length is {self.max_length}"
            )
        if prompt_tokens == 0:
            raise ArgumentError(f"{where}: expected a template that yields at least one prompt token, got none")

    def _fit(
        self, query: str, history: Sequence[HistoryItem], bare_prompt: list[int], room: int
    ) -> tuple[list[int], int]:
        """Return the prompt with the most of the newest items that takes at most `room` tokens, and their number.

        Token counts of single items do not add up exactly, as tokens may form across a joint, so they only say where to
        look. The answer is found by tokenising whole prompts around that point, in widening steps: two of them as a
        rule. One more item is taken never to shorten a prompt.
        """
        prompt, fits, too_many = bare_prompt, 0, len(history) + 1
        probe, step = self._estimate_kept(history, len(bare_prompt), room), 1
        while too_many - fits > 1:
            if not fits < probe < too_many:
                probe = (fits + too_many) // 2
            candidate = self.renderer.prompt_ids(query, history[len(history) - probe :])
            if len(candidate) <= room:
                prompt, fits, probe = candidate, probe, probe + step
            else:
                too_many, probe = probe, probe - step
            step *= 2
        return prompt, fits

    def _estimate_kept(self, history: Sequence[HistoryItem], bare_tokens: int, room: int) -> int:
        tokens = bare_tokens
        for kept, item in enumerate(reversed(history)):
            tokens += self._count_item(item)
            if tokens > room:
                return max(kept, 1)
        return len(history)

    def _count_item(self, item: HistoryItem) -> int:
        count = self._item_tokens.get(item)
        if count is None:
            if len(self._item_tokens) >= _CACHED_ITEMS:
                self._item_tokens.clear()
            count = len(self.renderer.encode(f"{self.template.render_item(item)}\n\n"))
            self._item_tokens[item] = count
        return count
