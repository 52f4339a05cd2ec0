"""The prompts of both models: signals for a summary, and a query with a summary for an answer.

    inference    [What the person wrote and chose]: signals   [Task]: the instruction   [Summary]: the opening
    generator    [About the user]: the summary                [Request]: the query      [Response]:

Both go through `PromptRenderer`, so signals and summaries are data: a control token in them stays text, and none of
their lines can begin like a line of the template. The summary stands before the query, so all queries of a user share
it as a prefix. Without summary and signals, the generator's prompt has no such section.

Texts are never cut. Signals that do not fit are dropped as a whole, the oldest first. A query, a summary or a response
that does not fit is a `BudgetError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nextquill.data._checks import check_instance, check_integer
from nextquill.data.records import HistoryItem
from nextquill.data.rendering import Tokenizer
from nextquill.data.templates import PromptTemplate
from nextquill.errors import ArgumentError, ArgumentTypeError, BudgetError
from nextquill.popi.users import Pair

if TYPE_CHECKING:
    from nextquill.data import Branch
    from nextquill.generation.rollouts import Sample

#: Our wording; the paper publishes none.
INSTRUCTION = (
    "Describe in at most 60 words what this person likes and dislikes in an answer: its content, style, tone and "
    "length. Write in the third person and in general terms, so that it helps with any request. Quote nothing."
)
_REPLACEMENT = "\ufffd"
#: A pair's responses stand after every summary of its user.
_CACHED_RESPONSES = 4096


_INFERENCE = PromptTemplate(
    order="history_first",
    history_heading="[What the person wrote and chose]:",
    query_heading="[Task]:",
    closing_cue="[Summary]:",
)
_GENERATOR = PromptTemplate(
    order="history_first", counterfactual="removal", history_heading="[About the user]:", text_label=""
)


@dataclass(frozen=True)
class PopiTemplates:
    """The wording of both prompts.

    Args:
        instruction: the instruction to the inference model.
        inference: the prompt with the signals as history and the instruction as query.
        generator: the prompt with the summary, or signals, as history.
        opening: the words that every summary begins with, such as "This person writes"; the inference model
            continues them. A small model then describes the person, where it would have answered the person's texts.

    Raises:
        ArgumentError: the instruction is blank, the opening has white space at an end, or a template's counterfactual
            is another user's history.
        ArgumentTypeError: an argument has the wrong type.
    """

    instruction: str = INSTRUCTION
    inference: PromptTemplate = field(default_factory=lambda: _INFERENCE)
    generator: PromptTemplate = field(default_factory=lambda: _GENERATOR)
    opening: str = ""

    def __post_init__(self) -> None:
        check_instance("instruction", self.instruction, str, "a string")
        if not self.instruction.strip():
            raise ArgumentError("instruction: expected some text, got a blank string")
        check_instance("opening", self.opening, str, "a string")
        if self.opening != self.opening.strip():
            raise ArgumentError(f"opening: expected no white space at its ends, got {self.opening!r}")
        for name in ("inference", "generator"):
            template = getattr(self, name)
            check_instance(name, template, PromptTemplate, "a PromptTemplate")
            if template.counterfactual == "placebo":
                raise ArgumentError(f"{name}: expected counterfactual 'removal' or 'none', got 'placebo'")

    def to_dict(self) -> dict[str, Any]:
        """Return the templates, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PopiTemplates:
        """Make templates from the result of `to_dict`; a missing field gets its default.

        Raises:
            ArgumentError, ArgumentTypeError: a field is unknown or has an unusable value.
        """
        _check_names("templates", values, cls)
        given = dict(values)
        for name, default in (("inference", _INFERENCE), ("generator", _GENERATOR)):
            if name in given:
                _check_names(name, given[name], PromptTemplate)
                given[name] = PromptTemplate(**{**asdict(default), **given[name]})
        return cls(**given)


def tidy_summary(text: str) -> str:
    """Return a sampled summary without white space around it and without incomplete characters; it may be empty."""
    return text.replace(_REPLACEMENT, "").strip()


class InferencePrompts:
    """Makes the inference model's prompts.

    Args:
        tokenizer: the inference model's tokenizer.
        templates: the wording.
        max_prompt_tokens: the most tokens of a prompt.

    Attributes:
        renderer: renders the prompts; `renderer.user_text.changed` counts the texts in which it broke a control token.

    Raises:
        BudgetError: the prompt without signals has more than `max_prompt_tokens`.
        ArgumentError: the template cannot be used with this tokenizer.
    """

    def __init__(
        self, tokenizer: Tokenizer, templates: PopiTemplates | None = None, *, max_prompt_tokens: int = 2048
    ) -> None:
        from nextquill.data import ExampleEncoder

        check_integer("max_prompt_tokens", max_prompt_tokens, least=1)
        self.templates = PopiTemplates() if templates is None else templates
        self.max_prompt_tokens = max_prompt_tokens
        self._encoder = ExampleEncoder(tokenizer, self.templates.inference, max_prompt_tokens)
        self.renderer = self._encoder.renderer
        self._opening = self.renderer.encode(self.templates.opening)
        bare = self._length(())
        if bare > max_prompt_tokens:
            raise BudgetError(
                f"max_prompt_tokens: expected at least {bare}, which the prompt takes without any signal, got "
                f"{max_prompt_tokens}"
            )

    @property
    def end_ids(self) -> list[int]:
        """The token ids that end a summary."""
        return list(self.renderer.end_ids)

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that end a sampled summary: the first of `end_ids`, and the end of text."""
        eos_id: int | None = getattr(self.renderer.tokenizer, "eos_token_id", None)
        return {self.renderer.end_ids[0]} | ({eos_id} if eos_id is not None else set())

    def ids(self, signals: Sequence[HistoryItem]) -> tuple[list[int], int]:
        """Return the prompt for these signals, oldest first, and the number of the newest ones that fit into it.

        That number may be 0; `check` finds this out before any work is done.
        """
        ids, kept = self._encoder.encode_prompt(self.templates.instruction, signals, len(self._opening))
        return ids + self._opening, kept

    def check(self, user_id: str, signals: Sequence[HistoryItem]) -> None:
        """Check that the newest signal fits into the prompt.

        Raises:
            BudgetError: it does not; the message names the user.
        """
        needed = self._length(signals[-1:])
        if needed > self.max_prompt_tokens:
            raise BudgetError(
                f"user {user_id!r}: the prompt with the newest signal alone takes {needed} tokens; max_prompt_tokens "
                f"is {self.max_prompt_tokens}"
            )

    def summary(self, sample: Sample) -> str:
        """Return the summary that a sample completes, tidy; it is empty if the sample adds nothing to the opening."""
        from nextquill.generation import decoded

        tidy = tidy_summary(sample.text)
        if not (tidy and self._opening):
            return tidy
        # Together, as some tokenizers drop the space before the first word of a text.
        return tidy_summary(decoded(self.renderer.tokenizer, [*self._opening, *sample.ids], self.stop_ids))

    def summary_ids(self, text: str) -> list[int]:
        """Return the token ids of a given summary after the opening, and its end, which the warm start supervises.

        Raises:
            ArgumentError: the summary is blank, or does not begin with the opening.
        """
        tidy, opening = tidy_summary(text), self.templates.opening
        if not tidy:
            raise ArgumentError("text: expected a summary, got a blank string")
        if not tidy.startswith(opening) or tidy == opening:
            raise ArgumentError(f"text: expected a summary that begins with {opening!r} and goes on, got {tidy[:60]!r}")
        return self.renderer.response_ids(tidy.removeprefix(opening))

    def _length(self, signals: Sequence[HistoryItem]) -> int:
        return len(self.renderer.prompt_ids(self.templates.instruction, signals)) + len(self._opening)


class GeneratorPrompts:
    """Makes the generator's prompts: a query with a summary, with raw signals, or with neither.

    Args:
        tokenizer: the generator's tokenizer.
        templates: the wording.
        max_length: the most tokens of prompt and response together.

    Attributes:
        renderer: renders the prompts.

    Raises:
        ArgumentError: the template cannot be used with this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, templates: PopiTemplates | None = None, *, max_length: int = 2048) -> None:
        from nextquill.data import ExampleEncoder

        self.templates = PopiTemplates() if templates is None else templates
        self.max_length = max_length
        self._encoder = ExampleEncoder(tokenizer, self.templates.generator, max_length)
        self.renderer = self._encoder.renderer
        self._response_ids = lru_cache(_CACHED_RESPONSES)(self.renderer.response_ids)

    def ids(
        self, query: str, *, summary: str | None = None, signals: Sequence[HistoryItem] = (), room: int = 0
    ) -> list[int]:
        """Return the prompt's token ids.

        Args:
            query: the question; it is never cut.
            summary: the summary; it is never cut. A blank one is left out.
            signals: the signals, oldest first; those that do not fit are dropped, oldest first.
            room: the number of tokens to leave for the response.

        Raises:
            BudgetError: the query and the summary do not fit.
            ArgumentError: both a summary and signals were given.
        """
        return self._fitting(query, summary, signals, room)[0]

    def text(
        self, query: str, *, summary: str | None = None, signals: Sequence[HistoryItem] = (), room: int = 0
    ) -> str:
        """Return the same prompt as text; arguments and errors are those of `ids`.

        The text lacks the beginning-of-sequence token that the tokenizer adds by itself.
        """
        return self.renderer.prompt(query, self._fitting(query, summary, signals, room)[1])

    def branches(
        self, pair: Pair, *, summary: str | None = None, signals: Sequence[HistoryItem] = ()
    ) -> tuple[Branch, Branch]:
        """Return the chosen and the rejected response after one prompt, which leaves room for the longer of the two.

        Raises:
            BudgetError, ArgumentError: see `ids`.
        """
        from nextquill.data import Branch

        chosen, rejected = self._responses(pair)
        prompt = self.ids(pair.query, summary=summary, signals=signals, room=max(len(chosen), len(rejected)))
        return Branch(prompt, chosen), Branch(prompt, rejected)

    def context_tokens(self, query: str, *, summary: str | None = None, signals: Sequence[HistoryItem] = ()) -> int:
        """Return the number of tokens that the summary, or the signals that fit, add to the prompt."""
        return len(self.ids(query, summary=summary, signals=signals)) - len(self.ids(query))

    def check(self, pair: Pair, max_summary_tokens: int, where: str = "") -> None:
        """Check, before any work is done, that a pair leaves room for a summary.

        A sampled summary is tokenised again as text, and may then have more tokens, for example because a line was
        quoted. So the room must be a quarter larger than the longest summary.

        Args:
            max_summary_tokens: the most tokens that are sampled for a summary; 0 for none.
            where: the beginning of the error message, for example the pair's user.

        Raises:
            BudgetError: the prompt, such a summary and the longer response exceed `max_length`.
        """
        check_integer("max_summary_tokens", max_summary_tokens, least=0)
        response = max(map(len, self._responses(pair)))
        probe = (HistoryItem("a"),) if max_summary_tokens else ()
        prompt = len(self.renderer.prompt_ids(pair.query, probe))
        summary = max_summary_tokens + -(-max_summary_tokens // 4)
        summary += len(self.renderer.encode(self.templates.opening)) if max_summary_tokens else 0
        if prompt + summary + response > self.max_length:
            raise BudgetError(
                f"{where}{': ' if where else ''}the pair of query {pair.query[:60]!r} takes {prompt} tokens for the "
                f"prompt, {summary} for the summary and {response} for the longer response, together "
                f"{prompt + summary + response}; max_length is {self.max_length}"
            )

    def _fitting(
        self, query: str, summary: str | None, signals: Sequence[HistoryItem], room: int
    ) -> tuple[list[int], Sequence[HistoryItem]]:
        """The prompt, and the summary or the signals in it; see `ids`."""
        tidy, limit = tidy_summary(summary or ""), self.max_length - room
        if tidy and signals:
            raise ArgumentError(f"summary, signals: expected one of the two, got a summary and {len(signals)} signals")
        least = [HistoryItem(tidy)] if tidy else []
        ids = self.renderer.prompt_ids(query, least)
        if len(ids) > limit:
            what = "and the summary take" if tidy else "takes"
            raise BudgetError(
                f"the prompt of query {query[:60]!r} {what} {len(ids)} tokens; max_length is {self.max_length}, of "
                f"which the response takes {room}"
            )
        if not signals:
            return ids, least
        ids, kept = self._encoder.encode_prompt(query, signals, room)
        return ids, signals[len(signals) - kept :]

    def _responses(self, pair: Pair) -> tuple[list[int], list[int]]:
        return self._response_ids(pair.chosen), self._response_ids(pair.rejected)


def _check_names(name: str, values: object, kind: type) -> None:
    if not isinstance(values, Mapping):
        raise ArgumentTypeError(f"{name}: expected a mapping, got {values!r}")
    known = {each.name for each in fields(kind)}
    unknown = sorted(map(str, values.keys() - known))
    if unknown:
        raise ArgumentError(f"{name}: expected names among {', '.join(sorted(known))}, got {unknown[0]!r}")
