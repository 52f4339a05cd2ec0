"""The two prompts: signals into a summary, and a query with a summary into an answer.

    inference    [What the person wrote and chose]: signals   [Task]: the instruction   [Summary]:
    generator    [About the user]: the summary                [Request]: the query      [Response]:

Both go through `PromptRenderer`, so signals and summaries are data: a control token's literal in them stays text, and
no line of theirs can begin like one of the template's. What comes first is what most prompts share: a user's summary
stands before the query, so all queries of a user share it as a prefix. Without summary and signals the generator's
prompt has no such section at all.

Nothing is cut: signals that do not fit are dropped whole, oldest first, and a query, a summary or a response that does
not fit is a `BudgetError`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from nextquill.data._checks import check_instance, check_integer
from nextquill.data.records import HistoryItem
from nextquill.data.rendering import PromptRenderer, Tokenizer
from nextquill.data.templates import PromptTemplate
from nextquill.data.tokenizing import BatchTokenizer
from nextquill.errors import ArgumentError, ArgumentTypeError, BudgetError
from nextquill.popi.users import Pair

if TYPE_CHECKING:
    from nextquill.data import Branch

#: Ours; the paper publishes no wording.
INSTRUCTION = (
    "Describe in at most 60 words what this person likes and dislikes in an answer: its content, style, tone and "
    "length. Write in the third person and in general terms, so that it helps with any request. Quote nothing."
)
_REPLACEMENT = "\ufffd"


def _inference() -> PromptTemplate:
    return PromptTemplate(
        order="history_first",
        history_heading="[What the person wrote and chose]:",
        query_heading="[Task]:",
        closing_cue="[Summary]:",
    )


def _generator() -> PromptTemplate:
    return PromptTemplate(
        order="history_first", counterfactual="removal", history_heading="[About the user]:", text_label=""
    )


@dataclass(frozen=True)
class PopiTemplates:
    """The wording of both prompts.

    Args:
        instruction: what the inference model is asked for.
        inference: the prompt with the signals as history and the instruction as query.
        generator: the prompt with the summary, or signals, as history.

    Raises:
        ArgumentError: a blank instruction; or a template whose counterfactual is another user's history.
        ArgumentTypeError: an argument of the wrong type.
    """

    instruction: str = INSTRUCTION
    inference: PromptTemplate = field(default_factory=_inference)
    generator: PromptTemplate = field(default_factory=_generator)

    def __post_init__(self) -> None:
        check_instance("instruction", self.instruction, str, "a string")
        if not self.instruction.strip():
            raise ArgumentError("instruction: expected some text, got a blank string")
        for name in ("inference", "generator"):
            template = getattr(self, name)
            check_instance(name, template, PromptTemplate, "a PromptTemplate")
            if template.counterfactual == "placebo":
                raise ArgumentError(f"{name}: expected counterfactual 'removal' or 'none', got 'placebo'")

    def to_dict(self) -> dict[str, Any]:
        """The templates as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PopiTemplates:
        """What `to_dict` gave; what is left out has its default.

        Raises:
            ArgumentError, ArgumentTypeError: an unknown name, or a value that is none of its.
        """
        _check_names("templates", values, cls)
        given = dict(values)
        for name, default in (("inference", _inference()), ("generator", _generator())):
            if name in given:
                _check_names(name, given[name], PromptTemplate)
                given[name] = PromptTemplate(**{**asdict(default), **given[name]})
        return cls(**given)


def tidy_summary(text: str) -> str:
    """A sampled summary without white space around it, and without halves of characters that a last token left.

    May be empty.
    """
    return text.replace(_REPLACEMENT, "").strip()


class InferencePrompts:
    """Makes the inference model's prompts.

    Args:
        tokenizer: of the inference model.
        templates: the wording.
        max_prompt_tokens: most tokens of a prompt.

    Attributes:
        renderer: what renders them; `renderer.user_text.changed` counts texts in which something was broken.

    Raises:
        BudgetError: the prompt without any signal takes more than that.
        ArgumentError: a tokenizer that the template cannot be used with.
    """

    def __init__(
        self, tokenizer: Tokenizer, templates: PopiTemplates | None = None, *, max_prompt_tokens: int = 2048
    ) -> None:
        check_integer("max_prompt_tokens", max_prompt_tokens, least=1)
        self.templates = PopiTemplates() if templates is None else templates
        self.max_prompt_tokens = max_prompt_tokens
        self.renderer = PromptRenderer(self.templates.inference, tokenizer)
        self._tokens = BatchTokenizer(tokenizer, self.renderer.encode)
        bare = len(self._ids(()))
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
        """The tokens at which a sampled summary is over: what ends a given one first, or the end of text."""
        eos_id: int | None = getattr(self.renderer.tokenizer, "eos_token_id", None)
        return {self.renderer.end_ids[0]} | ({eos_id} if eos_id is not None else set())

    def ids(self, signals: Sequence[HistoryItem]) -> tuple[list[int], int]:
        """The prompt for these signals, oldest first, and how many of the newest are in it.

        None may be: `check` finds that out before any work is done.
        """
        return _newest_that_fit(lambda newest: self._ids(newest), signals, self.max_prompt_tokens)

    def check(self, user_id: str, signals: Sequence[HistoryItem]) -> None:
        """Refuse signals of which not even the newest fits.

        Raises:
            BudgetError: it does not; the message names the user.
        """
        needed = len(self._ids(signals[-1:]))
        if needed > self.max_prompt_tokens:
            raise BudgetError(
                f"user {user_id!r}: the prompt with the newest signal alone takes {needed} tokens; max_prompt_tokens "
                f"is {self.max_prompt_tokens}"
            )

    def summary_ids(self, text: str) -> list[int]:
        """The token ids of a given summary and of what ends it, all of which the warm start supervises.

        Raises:
            ArgumentError: a blank summary.
        """
        tidy = tidy_summary(text)
        if not tidy:
            raise ArgumentError("text: expected a summary, got a blank string")
        return self.renderer.response_ids(tidy)

    def _ids(self, signals: Sequence[HistoryItem]) -> list[int]:
        (ids,) = self._tokens.ids([self.renderer.prompt(self.templates.instruction, signals)])
        return self.renderer.start_ids + ids.tolist()


class GeneratorPrompts:
    """Makes the generator's prompts: a query with a summary, with signals as they are, or with neither.

    Args:
        tokenizer: of the generator.
        templates: the wording.
        max_length: most tokens of prompt and response together.

    Attributes:
        renderer: what renders them.

    Raises:
        ArgumentError: a tokenizer that the template cannot be used with.
    """

    def __init__(self, tokenizer: Tokenizer, templates: PopiTemplates | None = None, *, max_length: int = 2048) -> None:
        check_integer("max_length", max_length, least=1)
        self.templates = PopiTemplates() if templates is None else templates
        self.max_length = max_length
        self.renderer = PromptRenderer(self.templates.generator, tokenizer)
        self._tokens = BatchTokenizer(tokenizer, self.renderer.encode)

    def ids(
        self, query: str, *, summary: str | None = None, signals: Sequence[HistoryItem] = (), room: int = 0
    ) -> list[int]:
        """The prompt's token ids.

        Args:
            query: what is asked, whole.
            summary: whole; a blank one is none.
            signals: oldest first; those that do not fit are dropped, oldest first.
            room: tokens to be left free for the response.

        Raises:
            BudgetError: the query, with the summary if there is one, does not fit.
            ArgumentError: both a summary and signals.
        """
        context, limit = _context(summary, signals), self.max_length - room
        least = () if signals else context
        needed = len(self._ids(query, least))
        if needed > limit:
            what = "and the summary take" if least else "takes"
            raise BudgetError(
                f"the prompt of query {query[:60]!r} {what} {needed} tokens; max_length is {self.max_length}, of which "
                f"the response takes {room}"
            )
        return _newest_that_fit(lambda newest: self._ids(query, newest), context, limit)[0]

    def text(
        self, query: str, *, summary: str | None = None, signals: Sequence[HistoryItem] = (), room: int = 0
    ) -> str:
        """The same prompt as text, as it is tokenised; arguments and errors as of `ids`.

        A beginning-of-sequence token that the tokenizer itself puts first is not in it.
        """
        context = _context(summary, signals)
        if not signals:
            self.ids(query, summary=summary, room=room)
            return self.renderer.prompt(query, context)
        limit = self.max_length - room
        self.ids(query, room=room)
        _, kept = _newest_that_fit(lambda newest: self._ids(query, newest), context, limit)
        return self.renderer.prompt(query, context[len(context) - kept :])

    def branches(
        self, pair: Pair, *, summary: str | None = None, signals: Sequence[HistoryItem] = ()
    ) -> tuple[Branch, Branch]:
        """The chosen and the rejected response after one prompt, which leaves room for the longer of the two.

        Raises:
            BudgetError, ArgumentError: as `ids`.
        """
        from nextquill.data import Branch

        chosen, rejected = self._responses(pair)
        prompt = self.ids(pair.query, summary=summary, signals=signals, room=max(len(chosen), len(rejected)))
        return Branch(prompt, chosen), Branch(prompt, rejected)

    def context_tokens(self, query: str, *, summary: str | None = None, signals: Sequence[HistoryItem] = ()) -> int:
        """How many tokens the summary, or those of the signals that fit, add to the prompt."""
        return len(self.ids(query, summary=summary, signals=signals)) - len(self.ids(query))

    def check(self, pair: Pair, max_summary_tokens: int, where: str = "") -> None:
        """Refuse a pair that leaves no room for a summary, before any work is done.

        A sampled summary is read again as text, and may take a few tokens more than were sampled where something in it
        was broken or quoted: a quarter more is asked for.

        Args:
            pair: the pair.
            max_summary_tokens: most tokens that are sampled for a summary; 0 for none.
            where: whose pair it is, put at the head of the error.

        Raises:
            BudgetError: a prompt with such a summary and the longer response exceed `max_length`.
        """
        check_integer("max_summary_tokens", max_summary_tokens, least=0)
        response = max(map(len, self._responses(pair)))
        probe = (HistoryItem("a"),) if max_summary_tokens else ()
        prompt = len(self._ids(pair.query, probe))
        summary = max_summary_tokens + -(-max_summary_tokens // 4)
        if prompt + summary + response > self.max_length:
            raise BudgetError(
                f"{where}{': ' if where else ''}the pair of query {pair.query[:60]!r} takes {prompt} tokens for the "
                f"prompt, {summary} for the summary and {response} for the longer response, together "
                f"{prompt + summary + response}; max_length is {self.max_length}"
            )

    def _responses(self, pair: Pair) -> tuple[list[int], list[int]]:
        texts = [self.renderer.response_text(text) for text in (pair.chosen, pair.rejected)]
        chosen, rejected = (ids.tolist() + self.renderer.end_ids for ids in self._tokens.ids(texts))
        return chosen, rejected

    def _ids(self, query: str, context: Sequence[HistoryItem]) -> list[int]:
        (ids,) = self._tokens.ids([self.renderer.prompt(query, context)])
        return self.renderer.start_ids + ids.tolist()


def _context(summary: str | None, signals: Sequence[HistoryItem]) -> tuple[HistoryItem, ...]:
    tidy = tidy_summary(summary or "")
    if tidy and signals:
        raise ArgumentError(f"summary, signals: expected one of the two, got a summary and {len(signals)} signals")
    return (HistoryItem(tidy),) if tidy else tuple(signals)


def _newest_that_fit(
    encode: Callable[[Sequence[HistoryItem]], list[int]], items: Sequence[HistoryItem], limit: int
) -> tuple[list[int], int]:
    """The prompt with the most of the newest items that fits, and their number.

    The prompt without any is known to fit, and one more item is taken never to shorten a prompt.
    """
    ids, count = encode(items), len(items)
    if len(ids) <= limit:
        return ids, count
    kept = bisect_right(range(1, count), limit, key=lambda newest: len(encode(items[count - newest :])))
    return encode(items[count - kept :]), kept


def _check_names(name: str, values: object, kind: type) -> None:
    if not isinstance(values, Mapping):
        raise ArgumentTypeError(f"{name}: expected a mapping, got {values!r}")
    known = {each.name for each in fields(kind)}
    unknown = sorted(map(str, values.keys() - known))
    if unknown:
        raise ArgumentError(f"{name}: expected names among {', '.join(sorted(known))}, got {unknown[0]!r}")
