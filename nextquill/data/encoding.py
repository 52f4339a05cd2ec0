"""Encodes records to token ids within a budget.

Each record becomes two or three branches, which share the response and differ in the history:

    factual          the user's own history
    counterfactual   no history, or another user's if the template says so
    placebo          another user's history

The budget is `prompt + response <= max_length` for every branch. If a prompt is too long, whole history items are
dropped, the oldest first. The query and the response are never cut, because a response without its end, or a query
without its beginning, would teach the wrong thing. If they alone do not fit, that is a `BudgetError`.

Encoding a record takes several steps: it asks for the token ids of some texts, sees what fits, and asks for more. Many
records take their steps together, so that one call tokenises all their texts on all cores. Meanwhile a second batch
takes its own steps. A single record takes the same steps and gives the same result.
"""

from __future__ import annotations

import signal
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from nextquill.data._checks import check_integer
from nextquill.data.examples import Branch, EncodedExample
from nextquill.data.placebo import (
    COUNTERFACTUAL,
    EVALUATION,
    History,
    assign_placebo_histories,
    stream_placebo_histories,
)
from nextquill.data.records import HistoryItem, Record
from nextquill.data.rendering import PromptRenderer, Tokenizer
from nextquill.data.templates import PromptTemplate
from nextquill.data.tokenizing import BatchTokenizer, Ids
from nextquill.errors import ArgumentError, BudgetError, RecordError

Progress = Callable[..., Iterable[Any]]
#: A record's index, the record, and the histories of its placebo and its counterfactual branch.
Job = tuple[int, Record, Sequence[HistoryItem] | None, Sequence[HistoryItem] | None]
Found = TypeVar("Found")
#: Yields texts, is sent their token ids, and returns what it has found.
Steps = Generator[list[str], list[Ids], Found]

_CACHED_COUNTS = 200_000
#: Records encoded together. With 2,000 tokens each, they keep all cores busy for 100 ms or longer.
_BATCH_SIZE = 128
# Batches in progress: one or two are tokenised, another is rendered, and one is ready.
_WORKERS, _AHEAD = 3, 4
# Safety factor on lengths estimated from the response's tokens per character; if they do not fit, items are counted.
_CLEARLY = 1.3
# Characters of an item besides its title and text.
_LABELS = 20

#: The encoder of a worker process.
_encoder: ExampleEncoder | None = None


class ExampleEncoder:
    """Encodes records with one tokenizer, one template and one budget.

    Args:
        tokenizer: a Hugging Face tokenizer, or an object with its interface.
        template: wording and order of the prompt.
        max_length: the most tokens of prompt and response together, in every branch.
        max_response_length: the most tokens of a response with its end tokens; None for no other limit than
            `max_length`.

    Raises:
        ArgumentError: a length below 1, or a tokenizer that does not work with the template.
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
        check_integer("max_response_length", max_response_length, least=1, or_none=True)
        self.template = PromptTemplate() if template is None else template
        self.renderer = PromptRenderer(self.template, tokenizer)
        self.max_length = max_length
        self.max_response_length = max_response_length
        self._tokenizer = BatchTokenizer(tokenizer, self.renderer.encode)
        self._item_tokens: dict[int, int] = {}

    def encode(
        self,
        record: Record,
        index: int = 0,
        placebo_history: Sequence[HistoryItem] | None = None,
        counterfactual_history: Sequence[HistoryItem] | None = None,
    ) -> EncodedExample:
        """Encode one record.

        Args:
            index: stored in the example, and named in errors.
            placebo_history: another user's history, oldest first, within the same budget; None for no placebo branch.
            counterfactual_history: another user's history for the counterfactual branch, which only a template with
                `counterfactual="placebo"` takes, and needs.

        Raises:
            BudgetError: the response, or the prompt without history plus the response, exceeds the budget.
            RecordError: the template cannot render the record, or one of its texts crosses the border to the template;
                see `PromptRenderer.check`.
            ArgumentError: `counterfactual_history` does not fit the template.
        """
        return self._result(self._steps(index, record, placebo_history, counterfactual_history))

    def encode_prompt(
        self, query: str, history: Sequence[HistoryItem] = (), response_tokens: int = 0
    ) -> tuple[list[int], int]:
        """Encode the prompt for a response that is yet to be written.

        Args:
            history: the user's texts, oldest first; the oldest that do not fit are dropped.
            response_tokens: the tokens of `max_length` to leave for the response; no more than `max_response_length`
                are left.

        Returns:
            The prompt's token ids, and the number of history items in it.

        Raises:
            BudgetError: the prompt without history leaves less room than that.
            RecordError: the template cannot render the query or the history; see also `PromptRenderer.check`.
        """
        start = array("i", self.renderer.start_ids)
        response_tokens = min(response_tokens, self.max_response_length or response_tokens)

        def steps() -> Steps[tuple[Ids, int]]:
            text = self.renderer.prompt(query)
            (bare,) = yield [text]
            self.renderer.check(text, bare, query)
            self._check_budget("query", len(start) + len(bare), response_tokens)
            room = self.max_length - response_tokens - len(start)
            return (yield from self._fit(_Fitting(query, bare, room, len(bare) / len(text)), history))

        prompt, kept = self._result(steps())
        return list(start + prompt), kept

    def encode_all(
        self, records: Iterable[Record], placebo: bool = False, seed: int = 0, progress: Progress | None = None
    ) -> list[EncodedExample]:
        """Encode all records, numbered in their order.

        Args:
            placebo: also encode each response with another user's history, drawn by `assign_placebo_histories`; the
                branch stays None if all records are from one user.
            seed: decides which other user that is.
            progress: wraps the examples as `progress(examples, total=..., desc=...)`; `tqdm` fits.

        Raises:
            BudgetError, RecordError: see `encode`; raised for the first bad record.
            ArgumentError: the template's counterfactual needs another user's history, and there is one user.
        """
        records = list(records)
        nobody: list[History | None] = [None] * len(records)
        placebos = assign_placebo_histories(records, seed) if placebo else nobody
        others = assign_placebo_histories(records, seed, COUNTERFACTUAL) if self._needs_other else nobody
        examples: Iterable[EncodedExample] = self._stream(
            zip(range(len(records)), records, placebos, others, strict=True)
        )
        if progress is not None:
            examples = progress(examples, total=len(records), desc="Encoding")
        return list(examples)

    def encode_iter(
        self,
        records: Iterable[Record],
        placebo: bool = False,
        seed: int = 0,
        on_bad: Callable[[int, Record, Exception], None] | None = None,
        skip: int = 0,
        workers: int = 1,
    ) -> Iterator[EncodedExample]:
        """Encode records one after another, holding only a few thousand of them.

        Args:
            records: read once, and numbered in their order.
            placebo: also encode each response with another user's history, drawn by `stream_placebo_histories`.
            seed: decides which other user that is.
            on_bad: called with the number, the record and the error of a record that cannot be encoded, which is then
                left out; None raises the error.
            skip: the number of first records to read without encoding. The other examples do not depend on it.
            workers: processes that encode; 1 for threads of this one. The examples do not depend on it.

        Raises:
            BudgetError, RecordError: see `encode`; raised after all earlier examples were yielded.
            RecordError: a history is needed from another user, and the first records are all from one user.
            ArgumentError: the template's counterfactual needs another user's history, and there is one user.
        """
        purposes = (EVALUATION,) * placebo + (COUNTERFACTUAL,) * self._needs_other
        drawn = stream_placebo_histories(records, seed, purposes) if purposes else ((record, ()) for record in records)

        def jobs() -> Iterator[Job]:
            for index, (record, histories) in enumerate(drawn):
                if index >= skip:
                    yield index, record, histories[0] if placebo else None, histories[-1] if self._needs_other else None

        return self._stream(jobs(), on_bad, workers)

    @property
    def _needs_other(self) -> bool:
        return self.template.counterfactual == "placebo"

    def _stream(
        self, jobs: Iterable[Job], on_bad: Callable[[int, Record, Exception], None] | None = None, workers: int = 1
    ) -> Iterator[EncodedExample]:
        """The examples in order."""
        jobs, pending = iter(jobs), deque[tuple[list[Job], Future[list[EncodedExample | Exception]]]]()
        pool, encode = self._pool(workers)
        try:
            while True:
                while len(pending) < _AHEAD + workers - 1 and (batch := list(islice(jobs, _BATCH_SIZE))):
                    pending.append((batch, pool.submit(encode, batch)))
                if not pending:
                    return
                batch, future = pending.popleft()
                for (index, record, *_), found in zip(batch, future.result(), strict=True):
                    if not isinstance(found, Exception):
                        yield found
                    elif on_bad is not None:
                        on_bad(index, record, found)
                    else:
                        raise found
        finally:
            pool.shutdown(cancel_futures=True)

    def _pool(self, workers: int) -> tuple[Executor, Callable[[list[Job]], list[EncodedExample | Exception]]]:
        """What runs batches, and the function for it. A fast tokenizer lets other threads run; rendering does not."""
        if workers == 1:
            return ThreadPoolExecutor(_WORKERS if self._tokenizer.is_parallel else 1), self._encode_jobs
        arguments = (self.renderer.tokenizer, self.template, self.max_length, self.max_response_length)
        spawn = get_context("spawn")  # a fork of a process with threads may hang
        return ProcessPoolExecutor(workers, spawn, _start_worker, arguments), _encode_in_worker

    def _encode_jobs(self, jobs: Sequence[Job]) -> list[EncodedExample | Exception]:
        """The example of each job, or the error of its record."""
        return self._run([self._steps(*job) for job in jobs])

    def _result(self, steps: Steps[Found]) -> Found:
        (found,) = self._run([steps])
        if isinstance(found, Exception):
            raise found
        return found

    def _run(self, jobs: Sequence[Steps[Found]]) -> list[Found | Exception]:
        """The result of each job, or its error; the texts that they ask for are tokenised together."""
        outcomes: dict[int, Found | Exception] = {}
        answered: list[tuple[int, Steps[Found], list[Ids] | None]] = [
            (at, steps, None) for at, steps in enumerate(jobs)
        ]
        while answered:
            asking: list[tuple[int, Steps[Found], list[str]]] = []
            for place, steps, ids in answered:
                try:
                    asking.append((place, steps, next(steps) if ids is None else steps.send(ids)))
                except StopIteration as stop:
                    outcomes[place] = stop.value
                except (BudgetError, RecordError) as error:
                    outcomes[place] = error
            answers = iter(self._tokenizer.ids([text for _, _, texts in asking for text in texts]))
            answered = [(place, steps, list(islice(answers, len(texts)))) for place, steps, texts in asking]
        return [outcomes[place] for place in range(len(jobs))]

    def _steps(
        self,
        index: int,
        record: Record,
        placebo_history: Sequence[HistoryItem] | None,
        counterfactual_history: Sequence[HistoryItem] | None,
    ) -> Steps[EncodedExample]:
        if self._needs_other != (counterfactual_history is not None):
            raise ArgumentError(
                "counterfactual_history: expected another user's history for a template with counterfactual='placebo', "
                f"and for no other, got {'none' if counterfactual_history is None else 'one'} with "
                f"counterfactual={self.template.counterfactual!r}; records of one user have no other's"
            )
        where = f"record {index} (user {record.user_id!r})"
        start = array("i", self.renderer.start_ids)
        try:
            response_text, bare_text = self.renderer.response_text(record.response), self.renderer.prompt(record.query)
            response, bare = yield [response_text, bare_text]
            self.renderer.check_response(response, record.response)
            self.renderer.check(bare_text, bare, record.query)
            response_ids = response + array("i", self.renderer.end_ids)
            self._check_budget(where, len(start) + len(bare), len(response_ids))
            fitting = _Fitting(
                record.query,
                bare,
                room=self.max_length - len(response_ids) - len(start),
                tokens_per_character=len(response) / len(response_text),
            )
            prompt, kept = yield from self._fit(fitting, record.history)
            other, placebo = bare, None
            if counterfactual_history is not None:
                other, _ = yield from self._fit(fitting, counterfactual_history)
            if placebo_history is not None:
                found, _ = yield from self._fit(fitting, placebo_history)
                placebo = Branch(start + found, response_ids)
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from error
        return EncodedExample(
            user_id=record.user_id,
            index=index,
            factual=Branch(start + prompt, response_ids),
            counterfactual=Branch(start + other, response_ids),
            placebo=placebo,
            history_kept=kept,
            history_total=len(record.history),
        )

    def _check_budget(self, where: str, prompt_tokens: int, response_tokens: int) -> None:
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

    def _fit(self, fitting: _Fitting, history: Sequence[HistoryItem]) -> Steps[tuple[Ids, int]]:
        """Return the prompt with as many of the newest items as fit, and their number.

        Token counts of single items do not add up exactly, as tokens may form across a joint, so they only give a first
        guess. From there whole prompts are tokenised, in widening steps, usually two of them. The search assumes that
        one more item never makes a prompt shorter.
        """
        text, prompt, fits, too_many = "", fitting.bare, 0, len(history) + 1
        if not history:
            return prompt, 0
        probe, step = (yield from self._estimate_kept(fitting, history)), 1
        while too_many - fits > 1:
            if not fits < probe < too_many:
                probe = (fits + too_many) // 2
            candidate_text = self.renderer.prompt(fitting.query, history[len(history) - probe :])
            (candidate,) = yield [candidate_text]
            if len(candidate) <= fitting.room:
                text, prompt, fits, probe = candidate_text, candidate, probe, probe + step
            else:
                too_many, probe = probe, probe - step
            step *= 2
        if fits:
            self.renderer.check(text, prompt, fitting.query, history[len(history) - fits :])
        return prompt, fits

    def _estimate_kept(self, fitting: _Fitting, history: Sequence[HistoryItem]) -> Steps[int]:
        """Estimate the number of items that fit, from their characters if all clearly fit, else from token counts."""
        room, density = fitting.room - len(fitting.bare), fitting.tokens_per_character
        newest = history[::-1]
        lengths = [density * (len(item.text) + len(item.title or "") + _LABELS) for item in newest]
        if _CLEARLY * sum(lengths) <= room:
            return len(history)
        counts: list[int] = []
        while len(counts) < len(history) and sum(counts) <= room:
            done = len(counts)
            more = bisect_right(list(accumulate(lengths[done:])), room - sum(counts)) + 1
            counts += yield from self._count_items(newest[done : done + more])
        return max(bisect_right(list(accumulate(counts)), room), 1)

    def _count_items(self, items: Sequence[HistoryItem]) -> Steps[list[int]]:
        counts, keys = self._item_tokens, list(map(hash, items))
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in counts}
        if missing:
            # With the blank line and a first letter of the next item, as in prompts, so that the cached pieces are the
            # same. The renderer's changes to texts are left out: they are rare, and cost more time than they save.
            found = yield [f"{self.template.render_item(item)}\n\na" for item in missing.values()]
            counts.update(zip(missing, (len(ids) - 1 for ids in found), strict=True))
            if len(counts) > _CACHED_COUNTS:
                self._item_tokens = {}  # other threads keep the one that they started with
        return [counts[key] for key in keys]


def _start_worker(*arguments: Any) -> None:
    """Make the encoder of a worker process, which ends with its parent and leaves Ctrl-C to it."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _encoder = ExampleEncoder(*arguments)


def _encode_in_worker(jobs: list[Job]) -> list[EncodedExample | Exception]:
    assert _encoder is not None
    return _encoder._encode_jobs(jobs)


@dataclass(frozen=True, slots=True)
class _Fitting:
    """A query with its prompt without history, and the tokens available for a prompt with history."""

    query: str
    bare: Ids
    room: int
    tokens_per_character: float
