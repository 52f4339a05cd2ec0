"""Scores a data set without gradient: every response token's nll with, without and under another user's history.

Records are taken user by user, so that a forward's tree holds a user's history once. The examples and the options alone
decide which records are computed together, so an interrupted run resumes with the same forwards and the same figures,
and joined processes share the forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from nextquill.data import Branch, EncodedExample
from nextquill.data.collator import Collator, to_device
from nextquill.errors import ArgumentError, BudgetError, NonFiniteError
from nextquill.evaluation.calibration import Calibration, calibration
from nextquill.losses import SFTLoss
from nextquill.models.branch_passes import PairPasses
from nextquill.models.head import HeadState
from nextquill.models.probe import in_eval_mode
from nextquill.ranks import deal
from nextquill.storage.manifests import with_digest

#: Tokens of one forward over trees by default. A CPU gains nothing from more than some thousands (16384 are a fifth
#: slower, at D=256), and the cost of a whole mask is quadratic.
DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS_SMALL = 16384, 4096
_TOGETHER = 64  # records at a time, for the collator to divide
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class ExampleScores:
    """One example's response tokens; the tensors are float32 [tokens] on the CPU, in nats.

    Attributes:
        example: what was scored.
        token_ids: the response's tokens, with its end tokens.
        nll_factual, nll_counterfactual: [tokens], nll with and without the user's history.
        nll_placebo: [tokens], nll under another user's history, or None.
        calibration: of the tokens with the user's history, or None.
    """

    example: EncodedExample
    token_ids: list[int]
    nll_factual: Tensor
    nll_counterfactual: Tensor
    nll_placebo: Tensor | None
    calibration: Calibration | None = None

    @property
    def effect_logprob(self) -> Tensor:
        """log p(token | history) - log p(token), [tokens], in nats."""
        return self.nll_counterfactual - self.nll_factual

    @property
    def effect_prob(self) -> Tensor:
        """p(token | history) - p(token), [tokens], in [-1, 1]."""
        return (-self.nll_factual).exp() - (-self.nll_counterfactual).exp()


def score_examples(
    model: Any,
    examples: Sequence[EncodedExample],
    pad_token_id: int = 0,
    batch_size: int | None = None,
    *,
    attention: str = "auto",
    max_tokens: int | None = None,
    skip: int = 0,
    calibrated: bool = False,
) -> Iterator[ExampleScores]:
    """Yield the scores of each example, as they are computed: user by user, not in the examples' order.

    Args:
        model: a causal language model; used in eval mode and left as it was.
        examples: encoded examples; the placebo branch is scored where every example has one.
        pad_token_id: fills padded batches.
        batch_size: examples at a time, to divide into forwards; by default 64.
        attention: see `PairPasses`.
        max_tokens: most tokens of one forward, after sharing or with padding; by default 16384 (4096 on a CPU and with
            attention="mask"), or what the largest example takes.
        skip: the number of first scores to leave out; the others have the same bits as without it.
        calibrated: also measure each token's `calibration`.

    Raises:
        ArgumentError: a number below 1.
        BudgetError: an example alone takes more than `max_tokens`; found before anything is computed.
        NonFiniteError: the model gives a token an NLL that is not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise ArgumentError(f"batch_size: expected a positive number, got {batch_size}")
    placebo = bool(examples) and all(example.placebo is not None for example in examples)
    device = next(model.parameters()).device
    with PairPasses(model, SFTLoss(), attention) as passes, in_eval_mode(model):
        collate = passes.scoring_collator(pad_token_id, placebo=placebo)
        max_tokens = forward_budget(examples, max_tokens, collate, usual_max_tokens(model, passes))
        collate = passes.scoring_collator(pad_token_id, max_tokens, placebo=placebo)
        size = batch_size or _TOGETHER
        order = _user_by_user(examples)

        def forwards() -> Iterator[tuple[list[EncodedExample], Any, int]]:
            for start in range(0, len(order), size):
                members, done = order[start : start + size], max(0, skip - start)
                if done >= len(members):
                    continue
                batch = [examples[index] for index in members]
                for part in collate(batch)["parts"]:
                    if done < part["num_sequences"]:
                        yield batch, part, done
                    done = max(0, done - part["num_sequences"])

        def scores(forward: tuple[list[EncodedExample], Any, int]) -> list[ExampleScores]:
            batch, part, done = forward
            scored = _score_part(passes, batch, to_device(part, device), calibrated)[done:]
            _check_finite(model, scored)
            return scored

        yield from deal(forwards(), scores)


class BranchScorer(AbstractContextManager["BranchScorer"]):
    """Scores any branches of one model without gradient. Branches that begin alike share one forward.

        nll[t] = -log p(response[t] | prompt, response[:t])

    Leaving its context restores the model.

    Args:
        model: a causal language model; used in eval mode.
        pad_token_id: fills padded batches.
        attention: see `PairPasses`.
        max_tokens: most tokens of one forward; by default as for `score_examples`.

    Raises:
        ArgumentError: `attention` is unknown, or `max_tokens` below 1.
        UnsupportedModelError: the model's head or its attention cannot be handled exactly.
    """

    def __init__(
        self, model: Any, pad_token_id: int = 0, *, attention: str = "auto", max_tokens: int | None = None
    ) -> None:
        self._model, self._pad, self._given = model, pad_token_id, max_tokens
        self._passes = PairPasses(model, SFTLoss(), attention)
        self._usual = usual_max_tokens(model, self._passes)
        self._passes.collator(pad_token_id, max_tokens, training=False)  # refuses a bad number

    def __exit__(self, *error: object) -> None:
        self._passes.close()

    def __call__(self, branches: Sequence[Branch]) -> list[Tensor]:
        """The nll of each branch's response.

        Args:
            branches: at least one; prompts and responses may differ between them.

        Returns:
            For each branch, in the order given, [tokens] on the CPU in nats; float32, or the model's own float64.

        Raises:
            BudgetError: a branch alone takes more than `max_tokens`.
        """
        # Each branch becomes an example of its own, whose nll is the loss of plain fine-tuning.
        examples = [EncodedExample("", index, branch, branch, None, 0, 0) for index, branch in enumerate(branches)]
        found, device = dict[int, Tensor](), next(self._model.parameters()).device
        with in_eval_mode(self._model):
            for part in self._parts(examples, training=False):
                members = part["sequence_ids"].unique_consecutive().tolist()
                lengths = [branches[index].response_length for index in members]
                nll = self._passes.scores(to_device(part, device)).output.pair_nll.factual
                found.update(zip(members, nll.cpu().split(lengths), strict=True))
        return [found[index] for index in range(len(branches))]

    def _parts(self, examples: Sequence[EncodedExample], *, training: bool) -> list[dict[str, Any]]:
        """The parts of a batch of examples with one branch each, within the token budget."""
        collator = partial(self._passes.collator, training=training)
        budget = forward_budget(examples, self._given, collator(self._pad), self._usual)
        parts: list[dict[str, Any]] = collator(self._pad, budget)(examples)["parts"]
        return parts


def effect_line(scores: ExampleScores, tokenizer: Any) -> dict[str, Any]:
    """One record's scores as JSON: tokens, NLLs (nats) and effects, rounded to six decimals.

    With calibration also `top1` (0 or 1) and `confidence` of every token, and the sum of their NLLs at each of
    `TEMPERATURES`, `nll_by_temperature`. Last a `digest` of the line, by which `load_effects` finds damage.
    """
    names = ("nll_factual", "nll_counterfactual", "effect_logprob", "effect_prob", "nll_placebo")
    values = {name: getattr(scores, name) for name in names}
    calibrated = {}
    if scores.calibration is not None:
        top1, confidence, nlls = scores.calibration
        calibrated = {"top1": top1.int().tolist(), "confidence": rounded(confidence)}
        calibrated["nll_by_temperature"] = rounded(nlls.double().sum(0))
    fields = {
        "index": scores.example.index,
        "user_id": scores.example.user_id,
        "history_kept": scores.example.history_kept,
        "tokens": token_texts(tokenizer, scores.token_ids),
        "token_ids": scores.token_ids,
        **{name: rounded(value) for name, value in values.items() if value is not None},
        **calibrated,
    }
    return with_digest(fields)


def rounded(values: Tensor) -> list[float]:
    """The `values`, floating [n], as numbers of six decimals."""
    return [round(value, 6) for value in values.tolist()]


def pad_token(tokenizer: Any) -> int:
    """The token that fills padded batches; it is never attended to, so any token does."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((id for id in known if id is not None), 0)


def usual_max_tokens(model: Any, passes: PairPasses) -> int:
    """Tokens of one forward by default."""
    masked = passes.trees is not None and passes.trees.attention == "mask"
    small = next(model.parameters()).device.type == "cpu" or masked
    return DEFAULT_MAX_TOKENS_SMALL if small else DEFAULT_MAX_TOKENS


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The piece of text each token adds; they join to the decoded text.

    A token that ends inside a character adds nothing, and the one that completes it adds the character. Each step
    decodes the tokens since the last but one that completed something, so the cost is linear in the length. A tokenizer
    whose decoding reaches further back (a clean-up of spaces) is found out at the end, and decoded from the start for
    every token.
    """
    full = tokenizer.decode(list(token_ids))
    pieces: list[str] = []
    previous, complete, known = 0, 0, ""  # `known` is the text of the tokens from `previous` to `complete`
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[previous:end]))
        if text.endswith(_REPLACEMENT) or not text.startswith(known):
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        previous, complete = complete, end
        known = tokenizer.decode(list(token_ids[previous:complete]))
    joined = "".join(pieces)
    if pieces and full.startswith(joined):  # the last character may be incomplete
        pieces[-1] += full[len(joined) :]
        return pieces
    return _token_texts_from_start(tokenizer, token_ids, full)


def _token_texts_from_start(tokenizer: Any, token_ids: Sequence[int], full: str) -> list[str]:
    pieces: list[str] = []
    start = done = 0
    for end in range(1, len(token_ids) + 1):
        text = full if end == len(token_ids) else tokenizer.decode(list(token_ids[:end]))
        while done < min(len(text), len(full)) and text[done] == full[done]:
            done += 1
        pieces.append(full[start:done])
        start = done
    return pieces


def _user_by_user(examples: Sequence[EncodedExample]) -> list[int]:
    """Positions of the examples with each user's together, users in the order of their first."""
    first = {user: place for place, user in enumerate(dict.fromkeys(example.user_id for example in examples))}
    return sorted(range(len(examples)), key=lambda index: first[examples[index].user_id])


def forward_budget(examples: Sequence[EncodedExample], given: int | None, collator: Collator, usual: int = 1) -> int:
    """The tokens of a forward of this collator: `given`, or `usual` and more where an example alone takes more.

    Raises:
        BudgetError: an example takes more than is given.
    """
    budget = usual if given is None else given
    for example in examples:
        size = collator.over(example, budget)
        if size is not None and given is not None and given >= 1:
            raise BudgetError(
                f"max_tokens: expected at least the {size} tokens that the branches of example {example.index} (user "
                f"{example.user_id!r}) take together, got {given}"
            )
        budget = size or budget
    return budget


def _check_finite(model: Any, scored: Sequence[ExampleScores]) -> None:
    for scores in scored:
        for name in ("nll_factual", "nll_counterfactual", "nll_placebo"):
            nll = getattr(scores, name)
            if nll is not None and not nll.isfinite().all():
                example = scores.example
                raise NonFiniteError(
                    f"model: {getattr(model, 'name_or_path', '') or 'it'} gives example {example.index} (user "
                    f"{example.user_id!r}) a {name} of {float(nll[~nll.isfinite()][0])}; its weights are damaged, or "
                    "its precision is too low"
                )


def _score_part(
    passes: PairPasses, examples: Sequence[EncodedExample], part: Any, calibrated: bool
) -> list[ExampleScores]:
    members = part["sequence_ids"].unique_consecutive().tolist()  # every example has a response
    sizes, found = [examples[index].factual.response_length for index in members], list[Calibration]()

    def look(rows: Tensor, state: HeadState) -> None:
        found.append(calibration(rows, state, part["labels"], passes.loss))

    scores = passes.scores(part, None, look if calibrated else None)
    pair = scores.output.pair_nll
    streams = (pair.factual, pair.counterfactual, scores.placebo_nll)
    split = [[None] * len(sizes) if s is None else s.float().cpu().split(sizes) for s in streams]
    of_tokens = zip(*(s.cpu().split(sizes) for s in found[0]), strict=True) if found else ()
    own: list[Any] = [Calibration(*each) for each in of_tokens] or [None] * len(sizes)
    return [
        ExampleScores(examples[index], examples[index].factual.response_ids, *values)
        for index, *values in zip(members, *split, own, strict=True)
    ]
