"""Renders prompts and responses with a template and a tokenizer: text in, token ids out.

Prompt and response are tokenised separately. Together, the last token of the prompt could absorb the first letters of
the response, and the factual and the counterfactual branch would supervise different tokens.

A prompt's ids are `start_ids + encode(prompt(...))`, and a response's are `encode(response_text(...)) + end_ids`. So
code that tokenises many at once needs only the texts. `UserText` keeps users' texts from being read as the template: a
special token's literal in a query, a title, a past text or a response stays text, and no line of these begins like one
of the template's. All other text stays as it was written.

What follows can undo this. A template joins texts (`<{{ query }}>`) or changes them, a chat template may remove spaces,
and a tokenizer may read `<|End|>` as `<|end|>`. So `check` looks at the token ids of the finished prompt. Its special
tokens must be those of the same prompt with the users' texts masked: their letters, digits and most signs are `a`, so
the template alone has written these tokens. Otherwise the texts are refused.

Of the tokenizer, only `encode`, `chat_template`, `apply_chat_template`, the names of special tokens and, where it
normalises texts, `backend_tokenizer` are used. So Hugging Face's tokenizers fit, and none of its packages is imported.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from nextquill.data.records import HistoryItem
from nextquill.data.template_budget import beyond_budget
from nextquill.data.templates import PromptTemplate
from nextquill.data.tokenizing import reset_backend
from nextquill.data.user_text import UserText
from nextquill.errors import ArgumentError, RecordError

# Stands for the response to find the text that the template puts after it. The response itself never passes through the
# template, because some templates strip it, and some cut it at a marker such as `</think>`.
_RESPONSE_MARKER = "nextquillresponsemarker"
_QUERY_MARKER = "nextquillquerymarker"
_HISTORY_MARKER = "nextquillhistorymarker"
# The day of a timestamp of 0 stands for every day.
_MARKERS = re.compile(f"{_QUERY_MARKER}|{_HISTORY_MARKER}|{_RESPONSE_MARKER}|1970-01-01")
# The end of a turn that is not a special token, such as `[/INST]`.
_BRACKETED = re.compile(r"[<\[{][^\s<>\[\]{}]+[>\]}]")
# Words that open a turn or a section, such as `USER:`, `### Response:` or `[Text]:`, and the end of a sentence.
_ROLE_WORD = re.compile(r".*[^\W_].*[:>\])}|=#*-]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Punctuation at which a template may divide a text; what no border holds stays in a masked text.
_HARMLESS = frozenset(".,;!?'\"()-")
# Whether a chat template keeps texts as they are, but for white space around them.
_VERBATIM = f"{_QUERY_MARKER}  A > b:\n\n C\t<d>"
#: Kinds of prompts whose borders are remembered.
_KNOWN_SHAPES = 10_000


class Tokenizer(Protocol):
    """The method that every tokenizer needs; other attributes are looked up by name."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        ...


class PromptRenderer:
    """Renders prompts and responses of one template with one tokenizer.

    With a chat template, the prompt is one user message, after the system message if there is one, and the generation
    prompt. If the chat template refuses or drops the system message, it is put at the head of the user message. The
    response ends with the chat template's end of turn, without the white space after it, which is never generated. If
    there is no end of turn, it ends with the end-of-sequence token.

    Without a chat template, the prompt begins with the beginning-of-sequence token if the tokenizer itself would put
    it there. The response ends with the end-of-sequence token.

    Args:
        template: wording and order.
        tokenizer: a Hugging Face tokenizer, or an object with its interface.

    Attributes:
        start_ids: token ids before every prompt's text: a beginning-of-sequence token that is not in the text, or none.
        end_ids: token ids after every response's text.
        user_text: breaks and quotes users' texts; `user_text.changed` counts the texts that it has changed.

    Raises:
        ArgumentError: `template.chat` is True and the tokenizer has no chat template; the chat template cannot render a
            user message, or takes more than its budget for it; there is no token to end a response; or a special
            token's literal cannot be broken.
    """

    def __init__(self, template: PromptTemplate, tokenizer: Tokenizer) -> None:
        import torch  # here, as commands that show their help need no torch

        self.template = template
        self.tokenizer = tokenizer
        self.uses_chat = _uses_chat(template, tokenizer)
        if self.uses_chat:
            self._check_budget()
        self._system_role = self.uses_chat and template.system is not None and self._accepts_system_role()
        frame = self._check_user_message() if self.uses_chat else _QUERY_MARKER
        self.start_ids = [] if self.uses_chat else self._own_bos_ids()
        self.end_ids = self._find_end_ids()
        special = _special_tokens(tokenizer)
        self._control = {token_id: token for token, token_id in special.items() if token_id != _unknown_id(tokenizer)}
        self._is_control = torch.zeros(max(self._control, default=0) + 2, dtype=torch.bool)
        self._is_control[list(self._control)] = True
        self._borders_known: dict[object, tuple[tuple[int, ...], int]] = {}
        self.user_text = self._keep_apart(frame, special)
        self._counts_words = template.prompt_jinja is not None or (self.uses_chat and not self._keeps_texts())
        self._items_are_text = not self._counts_words and self._adds_no_borders()

    def prompt(self, query: str, history: Sequence[HistoryItem] = ()) -> str:
        """Return everything before the response as text to tokenise, without `start_ids`."""
        text = self.template.render(query, history, self.user_text.quoted)
        if self.uses_chat:
            return self._apply(self._messages(text), generation_prompt=True)
        return f"{self._with_system(text)}\n"

    def prompt_ids(self, query: str, history: Sequence[HistoryItem] = ()) -> list[int]:
        """Return the token ids of everything before the response; RecordError as in `check`."""
        text = self.prompt(query, history)
        ids = self.encode(text)
        self.check(text, ids, query, history)
        return self.start_ids + ids

    def response_text(self, response: str) -> str:
        """Return the response as text to tokenise, without `end_ids`."""
        return self.user_text.plain(response)

    def response_ids(self, response: str) -> list[int]:
        """Return the token ids of the response and its end, all of which are supervised; RecordError as in `check`."""
        ids = self.encode(self.response_text(response))
        self.check_response(ids, response)
        return ids + self.end_ids

    def check(self, text: str, ids: Sequence[int], query: str, history: Sequence[HistoryItem] = ()) -> None:
        """Check that only the template wrote special tokens, and role words if the template can change texts.

        Args:
            text: `prompt(query, history)`.
            ids: `encode(text)`; an `array("i")` is checked in some microseconds.
            query, history: what the user wrote.

        Raises:
            RecordError: a user's text crossed the border between text and markup; the message names the text.
        """
        items = () if self._items_are_text else history
        shape = bool(query), *[(item.title is None, item.timestamp is None) for item in items]
        found = self._borders(text, ids)
        if found == self._borders_known.get(shape):
            return
        texts = [(item, name) for item in history for name in ("title", "text") if getattr(item, name)]

        def expected(kept: int | None = None) -> tuple[tuple[int, ...], int]:
            """The borders with all texts masked except one: the query for -1."""
            items = [
                replace(item, text=self._masked(item.text), title=item.title and self._masked(item.title))
                for item in history
            ]
            if kept is not None and kept >= 0:
                item, name = texts[kept]
                place = next(place for place, each in enumerate(history) if each is item)
                items[place] = replace(items[place], **{name: getattr(item, name)})
            prompt = self.prompt(query if kept == -1 else self._masked(query), items)
            return self._borders(prompt, self.encode(prompt))

        markup = expected()
        if found == markup:
            if len(self._borders_known) > _KNOWN_SHAPES:
                self._borders_known = {}  # other threads keep the one that they started with
            self._borders_known[shape] = found
            return
        guilty = next((kept for kept in range(-1, len(texts)) if expected(kept) != markup), None)
        if guilty is None:
            raise RecordError(f"query, history: together, their texts {self._crossing(found, markup)}")
        name, crossing = ("query", query) if guilty < 0 else (texts[guilty][1], getattr(*texts[guilty]))
        raise RecordError(f"{name}: in the finished prompt, {crossing[:60]!r} {self._crossing(found, markup)}")

    def check_response(self, ids: Sequence[int], response: str) -> None:
        """Check that a response's own ids hold no special token, or raise RecordError."""
        if control := self._control_ids(ids):
            raise RecordError(
                f"response: expected text, the tokenizer reads {self._control[control[0]]!r} in {response[:60]!r}"
            )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with no token added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _control_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The special tokens among the ids, in their order."""
        import torch

        if not ids:
            return ()
        values = torch.frombuffer(ids if isinstance(ids, array) else array("i", ids), dtype=torch.int32)
        control = self._is_control.index_select(0, values.clamp(max=len(self._is_control) - 1))
        return tuple(values[control].tolist()) if control.any() else ()

    def _borders(self, text: str, ids: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """The special tokens of a prompt, and the number of its role words where these can change."""
        return self._control_ids(ids), self.user_text.borders(text) if self._counts_words else 0

    def _masked(self, text: str) -> str:
        """A harmless text with the same length, lines, spaces and most punctuation."""
        return self._visible.sub("a", text)

    def _crossing(self, found: tuple[tuple[int, ...], int], markup: tuple[tuple[int, ...], int]) -> str:
        """What a prompt has that its markup lacks, or the other way round."""
        differing = Counter(found[0])
        differing.subtract(Counter(markup[0]))
        token = next((self._control[token_id] for token_id, count in differing.items() if count), None)
        what = "a role word of the template" if token is None else f"the special token {token!r}"
        return f"would add or remove {what}, which only the template may"

    def _with_system(self, text: str) -> str:
        return text if self.template.system is None else f"{self.template.system}\n\n{text}"

    def _messages(self, text: str) -> list[dict[str, str]]:
        if not self._system_role:
            return [{"role": "user", "content": self._with_system(text)}]
        return [{"role": "system", "content": self.template.system or ""}, {"role": "user", "content": text}]

    def _apply(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        tokenizer: Any = self.tokenizer
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))

    def _try_apply(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str | Exception:
        try:
            return self._apply(messages, generation_prompt=generation_prompt)
        except Exception as error:  # noqa: BLE001 - a chat template is a program that can raise any error
            return error

    def _check_budget(self) -> None:
        """Refuse a chat template that goes beyond its budget for one of the conversations that are rendered here."""
        said = {"content": f"{_QUERY_MARKER}\n" * 50}
        user, system = {"role": "user", **said}, {"role": "system", **said}
        conversations = ([user], [system, user], [user, {"role": "assistant", **said}])

        def render() -> Iterator[str]:
            for messages in conversations:
                rendered = self._try_apply(messages, generation_prompt=messages[-1] is user)
                if isinstance(rendered, MemoryError):
                    raise rendered
                yield str(rendered)

        if beyond := beyond_budget(render):
            raise ArgumentError(
                f"tokenizer: expected a chat template that renders a small prompt at once, it takes {beyond}"
            )

    def _accepts_system_role(self) -> bool:
        system = self.template.system or ""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": _QUERY_MARKER}]
        rendered = self._try_apply(messages, generation_prompt=True)
        return isinstance(rendered, str) and system.strip() in rendered

    def _check_user_message(self) -> str:
        """The text that the chat template puts around a user message, without the system message."""
        rendered = self._try_apply(self._messages(_QUERY_MARKER), generation_prompt=True)
        if isinstance(rendered, Exception):
            raise ArgumentError(
                f"tokenizer: expected a chat template that renders one user message, got {rendered!r}"
            ) from rendered
        if _QUERY_MARKER not in rendered:
            raise ArgumentError(
                f"tokenizer: expected a chat template that keeps the user's message, got {rendered!r} for "
                f"{_QUERY_MARKER!r}"
            )
        return rendered.replace((self.template.system or "").strip(), "")

    def _keep_apart(self, frame: str, special: dict[str, int]) -> UserText:
        """The `UserText` for the special tokens and for the lines of the template and the chat template's `frame`."""
        item = HistoryItem(_HISTORY_MARKER, title=_HISTORY_MARKER, timestamp=0.0)
        own_words = self.template.render(_QUERY_MARKER, [item, item], _marked)
        self._check_breaking(special)
        heads = {*_line_heads(frame), *_line_heads(own_words)}
        words = {word for text in (frame, own_words, self._turns()) for word in _role_words(text, special)}
        harmless = _HARMLESS - set("".join((*special, *heads, *words)))
        self._visible = re.compile(rf"[^\s{re.escape(''.join(sorted(harmless)))}]")
        return UserText(
            {*special, *_BRACKETED.findall(frame)},
            heads,
            words,
            self._find_normalised if _normalises(self.tokenizer) else None,
        )

    def _turns(self) -> str:
        """A conversation of three turns, whose chat template may write other words between later turns; or nothing."""
        if not self.uses_chat:
            return ""
        user, assistant = ({"role": role, "content": _QUERY_MARKER} for role in ("user", "assistant"))
        rendered = self._try_apply([user, assistant, user], generation_prompt=True)
        return rendered if isinstance(rendered, str) else ""

    def _keeps_texts(self) -> bool:
        rendered = self._try_apply(self._messages(_VERBATIM), generation_prompt=True)
        return isinstance(rendered, str) and _VERBATIM in rendered

    def _adds_no_borders(self) -> bool:
        """Whether the wording of past texts holds no special token, so that a prompt's do not depend on the history."""
        history = HistoryItem("a", title="a", timestamp=0.0), HistoryItem("a")
        without, borders = (self._control_ids(self.encode(self.prompt("a", items))) for items in ((), history))
        return without == borders

    def _find_normalised(self, text: str) -> list[int]:
        """Where the tokenizer reads special tokens in a text whose literals are broken."""
        encoding = reset_backend(self.tokenizer).encode(text, add_special_tokens=False)
        return [start for each, (start, _) in zip(encoding.ids, encoding.offsets, strict=True) if each in self._control]

    def _check_breaking(self, special: dict[str, int]) -> None:
        """Refuse a tokenizer that joins a broken literal again, as its texts could then end their own turn."""
        broken = "\n".join(map(UserText(special).plain, special))
        if found := self._control_ids(self.encode(broken)):
            token = self._control[found[0]]
            raise ArgumentError(
                f"tokenizer: expected one that reads the special token {token!r} as text if a space is put into it, "
                "got one that still reads it as the token"
            )

    def _own_bos_ids(self) -> list[int]:
        bos_id = getattr(self.tokenizer, "bos_token_id", None)
        with_special = list(self.tokenizer.encode("a", add_special_tokens=True))
        return [bos_id] if bos_id is not None and with_special[:1] == [bos_id] else []

    def _find_end_ids(self) -> list[int]:
        end_of_turn = self.encode(self._end_of_turn()) if self.uses_chat else []
        if end_of_turn:
            return end_of_turn
        eos_id = getattr(self.tokenizer, "eos_token_id", None)
        if eos_id is None:
            raise ArgumentError("tokenizer: expected an end-of-sequence token to end responses, got none")
        return [eos_id]

    def _end_of_turn(self) -> str:
        messages = [*self._messages(_QUERY_MARKER), {"role": "assistant", "content": _RESPONSE_MARKER}]
        rendered = self._try_apply(messages, generation_prompt=False)
        if isinstance(rendered, Exception) or rendered.count(_RESPONSE_MARKER) != 1:
            return ""
        return rendered.partition(_RESPONSE_MARKER)[2].rstrip()


def _uses_chat(template: PromptTemplate, tokenizer: Tokenizer) -> bool:
    available = bool(getattr(tokenizer, "chat_template", None)) and hasattr(tokenizer, "apply_chat_template")
    if template.chat and not available:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ArgumentError(
            "chat: expected a tokenizer with a chat template, because it was asked for or the trained run used one, "
            f"got {name} without one"
        )
    return available if template.chat is None else template.chat


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The literals that a tokenizer always reads as special tokens, and their ids.

    Added tokens that are not special do not count: `</think>` or a run of spaces is text, and is trained on as text.
    """
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {str(token): token_id for token_id, token in added.items() if token.special}
    named = zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()), strict=False)
    return special | {str(token): token_id for token, token_id in named}


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that any text may hold, unless it also ends texts, as in vocabularies that know every character."""
    unknown: int | None = getattr(tokenizer, "unk_token_id", None)
    ends = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")]
    return None if unknown in ends else unknown


def _normalises(tokenizer: Any) -> bool:
    """Whether special tokens are looked for in the normalised text, so not only their literals are read as them."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        backend is not None
        and backend.normalizer is not None
        and any(token.special and token.normalized for token in added.values())
    )


def _marked(inserted: str) -> str:
    """Replace an inserted text by the marker, unless it is a number or a date.

    The whole value of a Jinja expression counts as the user's text, even if the template wrote some words of it. Such
    words must not become line beginnings of the template, or they would be quoted themselves.
    """
    return _HISTORY_MARKER if any(map(str.isalpha, inserted)) else inserted


def _line_heads(prompt: str) -> set[str]:
    """The beginnings of a prompt's lines, each up to the first marker, if they hold a letter."""
    heads = (_MARKERS.split(line)[0].strip() for line in prompt.splitlines())
    return {head for head in heads if any(map(str.isalpha, head))}


def _role_words(prompt: str, special: Iterable[str]) -> set[str]:
    """The words between markers, special tokens and lines that look like the beginning of a turn or a section."""
    borders = "|".join([_MARKERS.pattern, *map(re.escape, special)])
    pieces = (piece for line in prompt.splitlines() for piece in re.split(borders, line))
    words = (word.strip() for piece in pieces for word in _SENTENCE_END.split(piece))
    return {word for word in words if _ROLE_WORD.fullmatch(word)}
