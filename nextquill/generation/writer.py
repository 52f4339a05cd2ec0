"""Texts for a user: queries and a history in, responses out, with the prompts that the model was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nextquill.data import ExampleEncoder, HistoryItem, PromptTemplate
from nextquill.data.records import parse_record
from nextquill.errors import ArgumentError
from nextquill.generation import GenerationOptions, Prompt, decoded, local_engine, stop_tokens
from nextquill.generation.tree_engine import TreeEngine
from nextquill.models.configs import base_model, check_vocabulary, default_max_length
from nextquill.models.loading import PromptSettings, find_tokenizer, load_model, load_prompt_settings
from nextquill.storage.fingerprints import seed_of

#: A user's earlier texts, oldest first: strings, mappings with `text` and optional `title` and `timestamp`, or items.
History = Sequence[str | Mapping[str, Any] | HistoryItem]
#: The length of prompt and response for a model without prompt settings whose context is not known.
_MAX_LENGTH = 2048
#: Stands for a character whose bytes are not all generated yet.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class UserPrompt:
    """The prompt of one user: everything before the response.

    Attributes:
        text: for a server that takes plain text; tokenise it without adding special tokens.
        ids: token ids, for `generate` and for a server that takes ids.
        history_kept, history_total: the number of history items in the prompt, and of those given.
    """

    text: str
    ids: list[int]
    history_kept: int
    history_total: int


def prompt_for(
    model_name_or_path: str, query: str, history: History = (), *, tokenizer: Any = None, max_new_tokens: int = 128
) -> UserPrompt:
    """The prompt of one user in the form that a trained model expects; loads no weights.

        prompt = nq.prompt_for("runs/mine", "Write a review of this lamp.", ["Too bright for me.", "Broke in a week."])
        model.generate(torch.tensor([prompt.ids]), max_new_tokens=128)

    Args:
        model_name_or_path: the folder of a run, whose prompt settings are used; any other model has the default ones.
        query: the request.
        history: the user's texts, oldest first; the oldest that do not fit are left out.
        tokenizer: the model's; by default it is loaded.
        max_new_tokens: the tokens to leave for the response.

    Raises:
        UnsupportedModelError, CheckpointError: the tokenizer or the prompt settings cannot be loaded.
        RecordError: a history item is malformed.
        BudgetError: the query leaves no room for the response.
    """
    settings = load_prompt_settings(model_name_or_path) or PromptSettings(PromptTemplate(), _MAX_LENGTH)
    encoder = ExampleEncoder(find_tokenizer(model_name_or_path) if tokenizer is None else tokenizer, **vars(settings))
    return user_prompt(encoder, query, history_items(history), max_new_tokens)


def user_prompt(encoder: ExampleEncoder, query: str, history: Sequence[HistoryItem], max_new_tokens: int) -> UserPrompt:
    """The prompt of one user; see `prompt_for`."""
    ids, kept = encoder.encode_prompt(query, history, max_new_tokens)
    tokenizer: Any = encoder.renderer.tokenizer
    start = tokenizer.decode(encoder.renderer.start_ids)
    text = encoder.renderer.prompt(query, history[len(history) - kept :])
    return UserPrompt(f"{start}{text}", ids, kept, len(history))


def history_items(history: History) -> tuple[HistoryItem, ...]:
    """A history as items, in the order of their times if each has one.

    Raises:
        RecordError: an item is malformed; the message names it.
    """
    raw = [item.to_dict() if isinstance(item, HistoryItem) else item for item in history]
    return parse_record({"user_id": "user", "query": "", "response": "-", "history": raw}, "history").history


class Writer:
    """Writes as a user would, with a trained model.

        writer = nq.Writer.load("runs/mine")
        texts = writer.write(["Review this lamp.", "Review this desk."], history, guidance=1.0, max_new_tokens=60)

    Args:
        model, tokenizer: a causal language model, also a PEFT model, and its tokenizer.
        settings: how its prompts are made; by default those of a model that was not trained here.
        keep_history: keep the computed history for the next call, which then starts at once if its prompt begins
            alike. The model must not change meanwhile.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: PromptSettings | None = None, *, keep_history: bool = False
    ) -> None:
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings or PromptSettings(PromptTemplate(), default_max_length(model))
        self.encoder = ExampleEncoder(tokenizer, **vars(self.settings))
        self._keep, self._kept = keep_history, None  # the last history, computed

    @classmethod
    def load(cls, model_name_or_path: str, *, device: Any = None, **loading: Any) -> Writer:
        """Load a run's folder, an adapter, or any causal language model; see `load_model` for names and errors.

        Args:
            model_name_or_path: a folder, a GGUF file, or a name on the Hugging Face hub.
            device: where the model runs; by default the accelerator, or the CPU without one.
            loading: options of `load_model`, such as `dtype="bfloat16"`.
        """
        model, tokenizer = load_model(model_name_or_path, **loading)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return cls(model.to(device or accelerator or "cpu"), tokenizer, load_prompt_settings(model_name_or_path))

    def write(
        self, queries: str | Sequence[str], history: History = (), *, against: History = (), **options: Any
    ) -> list[str]:
        """A response to each query. The history is computed once for all queries if the prompt begins with it.

        Args:
            queries: one or several requests.
            history: the user's texts, oldest first.
            against: with `guidance` or `best_of`, the history to move away from; by default none.
            options: of `GenerationOptions`: `guidance`, `best_of`, `max_new_tokens`, `temperature`, `seed` and others.

        Returns:
            The responses, in the order of the queries.

        Raises:
            ArgumentError: an option is unknown or out of range.
            RecordError, BudgetError: see `prompt_for`.
        """
        pieces = dict[int, list[str]]()
        for index, piece in self.stream(queries, history, against=against, **options):
            pieces.setdefault(index, []).append(piece)
        return ["".join(pieces.get(index, ())) for index in range(1 if isinstance(queries, str) else len(queries))]

    def stream(
        self, queries: str | Sequence[str], history: History = (), *, against: History = (), **options: Any
    ) -> Iterator[tuple[int, str]]:
        """Yield a query's index and the next piece of its response as soon as it is known; arguments as in `write`."""
        chosen = self._options(options)
        asked = [queries] if isinstance(queries, str) else queries
        own, other = history_items(history), history_items(against)
        prompts = [self._prompt(index, query, (own, other), chosen) for index, query in enumerate(asked)]
        base = base_model(self.model)
        stops = stop_tokens(base, self.tokenizer, self.encoder.renderer.end_ids[-1:])
        with local_engine(base, self.tokenizer, stops, chosen) as engine:
            if self._keep and isinstance(engine, TreeEngine):
                engine.kept = self._kept
            found: dict[int, list[int]] = {prompt.index: [] for prompt in prompts}
            shown = dict.fromkeys(found, 0)
            for index, token in engine.stream(prompts):
                found[index].append(token)
                text = decoded(self.tokenizer, found[index], stops)
                if not text.endswith(_INCOMPLETE) and len(text) > shown[index]:
                    yield index, text[shown[index] :]
                    shown[index] = len(text)
            for index, ids in found.items():  # a response can end inside a character
                rest = decoded(self.tokenizer, ids, stops)[shown[index] :]
                if rest:
                    yield index, rest
            self._kept = getattr(engine, "kept", None)

    def _options(self, options: Mapping[str, Any]) -> GenerationOptions:
        unknown = sorted(options.keys() - GenerationOptions.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(GenerationOptions.__dataclass_fields__)
            raise ArgumentError(f"options: expected some of {known}, got {unknown[0]}")
        if options.get("engine") == "vllm":
            raise ArgumentError("engine: expected 'auto', 'tree' or 'hf', got 'vllm', which runs as a server")
        return GenerationOptions(**options)

    def _prompt(
        self, index: int, query: str, histories: Sequence[Sequence[HistoryItem]], chosen: GenerationOptions
    ) -> Prompt:
        ids, against = (self.encoder.encode_prompt(query, each, chosen.max_new_tokens)[0] for each in histories)
        paired = chosen.needs_against and against != ids
        return Prompt(index, ids, seed_of(f"{chosen.seed} {index}"), against if paired else None)
