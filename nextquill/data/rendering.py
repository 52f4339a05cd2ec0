"""A prompt template bound to a tokenizer: text in, token ids out.

Prompt and response are tokenised separately. Tokenised together, the last token of the prompt could swallow the first
letters of the response, and the factual and the counterfactual branch would supervise different tokens.

A prompt's ids are `start_ids + encode(prompt(...))` and a response's `encode(response_text(...)) + end_ids`, so that
whoever tokenises many at once needs the texts alone. What users wrote is kept from being read as the template's on the
way, see `UserText`: a special token's literal in a query, a title, a past text or a response stays text, and no line of
them begins like one of the template's. Text without such is as it was written.

The tokenizer is used through `encode`, `chat_template`, `apply_chat_template` and what names its special tokens alone,
so Hugging Face's tokenizers fit, and nothing of Hugging Face is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from nextquill.data.records import HistoryItem
from nextquill.data.templates import PromptTemplate
from nextquill.data.user_text import UserText
from nextquill.errors import ArgumentError

# Stands for the response while the template is asked what follows one. The response itself never passes through the
# template: some strip it, and some cut it at a marker such as `</think>`.
_RESPONSE_MARKER = "nextquillresponsemarker"
_QUERY_MARKER = "nextquillquerymarker"
_HISTORY_MARKER = "nextquillhistorymarker"
# A turn's end that is no special token, such as `[/INST]`.
_BRACKETED = re.compile(r"[<\[{][^\s<>\[\]{}]+[>\]}]")


class Tokenizer(Protocol):
    """What is needed of every tokenizer; the rest is looked up by name."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        ...


class PromptRenderer:
    """Renders prompts and responses of one template with one tokenizer.

    With a chat template the prompt is one user message (after a system message, if any) and the generation prompt;
    a system message that the template refuses or drops is put at the head of the user message. The response ends with
    the template's end of turn, without the white space after it, which is never generated; if the template has none,
    with the end-of-sequence token. Without a chat template the prompt begins with the tokenizer's beginning-of-sequence
    token where the tokenizer would put it there itself, and the response ends with the end-of-sequence token.

    Args:
        template: wording and order.
        tokenizer: a Hugging Face tokenizer or its like.

    Attributes:
        start_ids: token ids before those of every prompt's text: a beginning-of-sequence token that is not text, or
            none.
        end_ids: token ids after those of every response's text.
        user_text: what users' texts go through; `user_text.changed` counts those in which something was broken.

    Raises:
        ArgumentError: `template.chat` is True and the tokenizer has no chat template; the chat template cannot render a
            user message; there is nothing to end a response with; or a special token's literal cannot be broken.
    """

    def __init__(self, template: PromptTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.uses_chat = _uses_chat(template, tokenizer)
        self._system_role = self.uses_chat and template.system is not None and self._accepts_system_role()
        frame = self._check_user_message() if self.uses_chat else _QUERY_MARKER
        self.start_ids = [] if self.uses_chat else self._own_bos_ids()
        self.end_ids = self._find_end_ids()
        self.user_text = self._keep_apart(frame)

    def prompt(self, query: str, history: Sequence[HistoryItem] = ()) -> str:
        """Return everything before the response, as the text that is tokenised (without `start_ids`)."""
        text = self.template.render(query, history, self.user_text.quoted)
        if self.uses_chat:
            return self._apply(self._messages(text), generation_prompt=True)
        return f"{self._with_system(text)}\n"

    def prompt_ids(self, query: str, history: Sequence[HistoryItem] = ()) -> list[int]:
        """Return the token ids of everything before the response."""
        return self.start_ids + self.encode(self.prompt(query, history))

    def response_text(self, response: str) -> str:
        """Return the response as the text that is tokenised (without `end_ids`)."""
        return self.user_text.plain(response)

    def response_ids(self, response: str) -> list[int]:
        """Return the token ids of the response and of what ends it, all of which are supervised."""
        return self.encode(self.response_text(response)) + self.end_ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with no token added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _with_system(self, text: str) -> str:
        return text if self.template.system is None else f"{self.template.system}\n\n{text}"

    def _messages(self, text: str) -> list[dict[str, str]]:
        if not self._system_role:
            return [_message("user", self._with_system(text))]
        return [_message("system", self.template.system or ""), _message("user", text)]

    def _apply(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        tokenizer: Any = self.tokenizer
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))

    def _try_apply(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str | Exception:
        try:
            return self._apply(messages, generation_prompt=generation_prompt)
        except Exception as error:  # noqa: BLE001 - a chat template is a program of its author's, and fails as it likes
            return error

    def _accepts_system_role(self) -> bool:
        system = self.template.system or ""
        messages = [_message("system", system), _message("user", _QUERY_MARKER)]
        rendered = self._try_apply(messages, generation_prompt=True)
        return isinstance(rendered, str) and system.strip() in rendered

    def _check_user_message(self) -> str:
        """What the chat template puts around a user message, system message aside."""
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

    def _keep_apart(self, frame: str) -> UserText:
        """What breaks special tokens and quotes the lines of the template and of the chat template's `frame`."""
        special = _special_tokens(self.tokenizer)
        item = HistoryItem(_HISTORY_MARKER, title=_HISTORY_MARKER, timestamp=0.0)
        own_words = self.template.render(_QUERY_MARKER, [item, item], _marked)
        self._check_breaking(special)
        return UserText({*special, *_BRACKETED.findall(frame)}, {*_line_heads(frame), *_line_heads(own_words)})

    def _check_breaking(self, special: dict[str, int]) -> None:
        """A normaliser may close the gap in a broken literal: better refused than a text that ends its own turn."""
        broken = "\n".join(map(UserText(special).plain, special))
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        found = (set(special.values()) & set(self.encode(broken))) - {unknown}
        if found:
            token = next(token for token, token_id in special.items() if token_id in found)
            raise ArgumentError(
                f"tokenizer: expected one that tells the special token {token!r} from a text with a space in it, got "
                "one that reads both as the token"
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
            raise ArgumentError("tokenizer: expected an end-of-sequence token to end a response with, got none")
        return [eos_id]

    def _end_of_turn(self) -> str:
        messages = [*self._messages(_QUERY_MARKER), _message("assistant", _RESPONSE_MARKER)]
        rendered = self._try_apply(messages, generation_prompt=False)
        if isinstance(rendered, Exception) or rendered.count(_RESPONSE_MARKER) != 1:
            return ""
        return rendered.partition(_RESPONSE_MARKER)[2].rstrip()


def _uses_chat(template: PromptTemplate, tokenizer: Tokenizer) -> bool:
    available = bool(getattr(tokenizer, "chat_template", None)) and hasattr(tokenizer, "apply_chat_template")
    if template.chat and not available:
        raise ArgumentError("chat: expected a tokenizer with a chat template for chat=True, got one without")
    return available if template.chat is None else template.chat


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The literals that a tokenizer reads as special tokens wherever they stand, and their ids.

    Tokens that were merely added are none of them: `</think>` or a run of spaces is text, and is trained on as such.
    """
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    special = {str(token): token_id for token_id, token in added.items() if token.special}
    named = zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()), strict=False)
    return special | {str(token): token_id for token, token_id in named}


def _marked(inserted: str) -> str:
    """What a template inserts, all as the marker but for numbers and dates.

    What a Jinja expression makes passes for the user's whole, words of the template's in it too; such a word must not
    be taken for one that no text may begin with, or it would be quoted itself.
    """
    return _HISTORY_MARKER if any(map(str.isalpha, inserted)) else inserted


def _line_heads(prompt: str) -> set[str]:
    """How the lines of a prompt begin that are the template's: each up to a marker, if there is a letter in it."""
    heads = (re.split(f"{_QUERY_MARKER}|{_HISTORY_MARKER}", line)[0].strip() for line in prompt.splitlines())
    return {head for head in heads if any(map(str.isalpha, head))}
