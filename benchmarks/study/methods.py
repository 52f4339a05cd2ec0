"""The methods of the study: how each trains, and what was expected of it before its first run.

A method is a loss, and perhaps another counterfactual prompt or token weights from elsewhere. One without a `parent`
is tried with every learning rate of the preset, and the best on development people counts; the others take over their
parent's.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from nextquill.data import EncodedExample, HistoryItem, Record
from nextquill.losses import LongCELoss, NextQuillLoss, PairLoss, PerCELoss, SFTLoss
from nextquill.mirror import MirrorLoss
from nextquill.outputs import PairNLL
from nextquill.weighting import ClipWeighting, UniformWeighting

BASE, SFT, PERCE, DETACHED = "base", "sft", "perce", "nextquill_detached"
#: Tokens of a phrase that counts as copied.
_PHRASE = 3
#: Share of the steps with weight 1 on every token, for the method with a warm-up of its weights.
_WARM_UP = 1 / 3


@dataclass(frozen=True)
class Method:
    """One way of training.

    Args:
        name, label: in results, and in tables.
        hypothesis: what is expected of it, written before its first run.
        kind: the class of its loss; None for no training.
        arguments: the loss's; a function gets the number of the model's tokens.
        parent: the method whose learning rate it takes over; None to choose its own.
        counterfactual: the prompt without the person: "none" (no history), "placebo" (another person's), or "shuffled"
            (the own texts, the words of each in random order).
        effects: the method whose model, trained with the same seed, weighs the tokens; None for the model in training.
        unweighted: "copied": tokens that continue a phrase of the history get the effect 0; needs `effects`.
        matches_time: the method whose training time it gets.
        trainer: arguments of `MirrorTrainer`.
    """

    name: str
    label: str
    hypothesis: str
    kind: type[PairLoss] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    counterfactual: str = "none"
    effects: str | None = None
    unweighted: str | None = None
    matches_time: str | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> bool:
        """Whether the model learns from texts that it samples in training."""
        return self.kind is MirrorLoss

    def loss(self, vocabulary: int) -> PairLoss:
        """A new loss of this method, for a model with that many tokens."""
        assert self.kind is not None
        given = {name: value(vocabulary) if callable(value) else value for name, value in self.arguments.items()}
        return self.kind(**given)


class ShuffledWeighting:
    """PerCE's weights of a sequence, in an order that its NLLs decide, so that a resumed run repeats it."""

    elementwise = False
    reads_effect = False

    def __call__(self, pair: PairNLL) -> Tensor:
        weights = ClipWeighting()(pair)
        seed = int(pair.factual.detach().double().sum().cpu().view(torch.int64)) & (2**63 - 1)
        order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
        return weights[order.to(weights.device)]


class WarmWeighting:
    """PerCE's weights, or 1 on every token while `is_warm`."""

    elementwise = True
    reads_effect = False

    def __init__(self) -> None:
        self.is_warm = True

    def __call__(self, pair: PairNLL) -> Tensor:
        weighting = UniformWeighting() if self.is_warm else ClipWeighting()
        return weighting(pair)


class ShuffledPerCELoss(PerCELoss):
    """PerCE with its weights on other tokens of the same sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.objective = dataclasses.replace(self.objective, weighting=ShuffledWeighting())


class WarmPerCELoss(PerCELoss):
    """PerCE after a first third of plain fine-tuning; needs `WarmUp` among the trainer's callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.objective = dataclasses.replace(self.objective, weighting=WarmWeighting())


class WarmUp(TrainerCallback):
    """Ends the warm-up of a loss's weights after a third of the steps."""

    def __init__(self, weighting: WarmWeighting) -> None:
        self.weighting = weighting

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weighting.is_warm = state.global_step < _WARM_UP * state.max_steps


def words_shuffled(record: Record, seed: int) -> Record:
    """The record with the words of each of its history's texts in random order, the same for all of a person's."""
    order = random.Random(f"{seed} {record.user_id}")
    items = []
    for item in record.history:
        words = item.text.split()
        order.shuffle(words)
        items.append(HistoryItem(" ".join(words) or item.text, item.title, item.timestamp))
    return dataclasses.replace(record, history=tuple(items))


def without_copied(example: EncodedExample, line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of an effects file, with no effect where a token continues a phrase of the prompt."""
    prompt, response = example.factual.prompt_ids, example.factual.response_ids
    phrases = {tuple(prompt[start : start + _PHRASE]) for start in range(len(prompt) - _PHRASE + 1)}
    nlls: Sequence[float] = line["nll_factual"]
    copied = [tuple(response[max(0, end - _PHRASE) : end]) in phrases for end in range(1, len(response) + 1)]
    without = [own if is_copied else other for own, other, is_copied in
               zip(nlls, line["nll_counterfactual"], copied, strict=True)]  # fmt: skip
    kept = {name: line[name] for name in ("index", "user_id", "token_ids")}  # the effects and the digest were others'
    return {**kept, "nll_factual": nlls, "nll_counterfactual": without}


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(BASE, "no training", "The floor; guided decoding alone makes its texts personal."),
        Method(SFT, "SFT", "The best nll; texts less personal than any weighted loss's.", SFTLoss),
        Method(PERCE, "PerCE", "More personal texts than SFT's at the same ROUGE-L; many copied phrases.", PerCELoss),
        Method(
            DETACHED, "NextQuill, detached",
            "Overconfident: nll above SFT's, and equal at its best temperature; texts between SFT's and PerCE's.",
            NextQuillLoss, {"detach_counterfactual": True},
        ),
        Method(
            "sft_time", "SFT, PerCE's time", "More steps do not make SFT's texts more personal.", SFTLoss,
            parent=SFT, matches_time=PERCE,
        ),
        Method(
            "perce_random", "PerCE, weights shuffled",
            "Like SFT at a higher rate: it matters where the weight falls, so texts are no more personal than SFT's.",
            ShuffledPerCELoss, parent=PERCE,
        ),
        Method(
            "nextquill_alpha0", "NextQuill, weights alone",
            "The effect term is what makes the model overconfident: without it nll falls to SFT's + 0.1.",
            NextQuillLoss, {"detach_counterfactual": True, "alpha": 0.0}, parent=DETACHED,
        ),
        Method(
            "perce_another", "PerCE against another's history",
            "What is common to all people no longer gets weight: better nll of generic tokens, as personal texts.",
            PerCELoss, parent=PERCE, counterfactual="placebo",
        ),
        Method(
            "perce_uncopied", "PerCE, copied phrases unweighted",
            "Fewer copied phrases; the right person is still found by what is not copied.",
            PerCELoss, parent=PERCE, effects=BASE, unweighted="copied",
        ),
        Method(
            "perce_frozen", "PerCE, the base's effects", "As PerCE: effects of the base are good enough.",
            PerCELoss, parent=PERCE, effects=BASE,
        ),
        Method(
            "perce_order", "PerCE against the own words shuffled",
            "Weight falls on phrasing, not on single words: fewer copied words, more personal by what is not copied.",
            PerCELoss, parent=PERCE, counterfactual="shuffled",
        ),
        Method(
            "nextquill_log_v", "NextQuill, α = 0.1 / log V",
            "The effect term at the scale of a nat: no overconfidence, texts as with the weights alone.",
            NextQuillLoss,
            {"detach_counterfactual": True, "alpha": lambda size: 0.1 / math.log(size)},
            parent=DETACHED,
        ),
        Method(
            "longce", "LongCE", "As PerCE; exponential weights follow fewer tokens, so more copying.", LongCELoss,
            parent=PERCE,
        ),
        Method(
            "nextquill", "NextQuill, as published",
            "The counterfactual collapses; its effect against the placebo stays below its effect against no history.",
            NextQuillLoss, parent=DETACHED,
        ),
        Method(
            "nextquill_paper", "NextQuill, the paper's form", "As published; the effect term falls on personal tokens.",
            NextQuillLoss, {"weighted_effect": True}, parent=DETACHED,
        ),
        Method(
            "nextquill_frozen", "NextQuill, SFT's effects", "As NextQuill with the weights of its own effects.",
            NextQuillLoss, {"detach_counterfactual": True}, parent=DETACHED, effects=SFT,
        ),
        Method(
            "nextquill_another", "NextQuill against another's history",
            "The effect term no longer rewards what any history gives: nll nearer to SFT's, as personal texts.",
            NextQuillLoss, {"detach_counterfactual": True}, parent=DETACHED, counterfactual="placebo",
        ),
        Method(
            "perce_warm", "PerCE after SFT",
            "Weights of a model that has learnt the task name personal tokens better: fewer generic tokens weighted.",
            WarmPerCELoss, parent=PERCE,
        ),
        Method(
            "mirror", "MIRROR",
            "The model stays on its own texts: nll between the untrained model's and SFT's, texts less personal than "
            "PerCE's and with fewer copied phrases.",
            MirrorLoss,
        ),
        Method(
            "mirror_f", "MIRROR-F",
            "As in its authors' figures above MIRROR: lower nll, more personal texts, and more copied phrases.",
            MirrorLoss, {"alpha": 0.5},
        ),
        Method(
            "mirror_bare", "MIRROR, no words around the reference",
            "MIRROR's responses drift towards the words around the reference ('the user's own response'), which its "
            "teacher repeats. Without them they drift towards the reference itself: more personal than MIRROR's.",
            MirrorLoss, parent="mirror", trainer={"reference": "\n\n{response}"},
        ),
    )
}  # fmt: skip
#: Methods that joined when runs of the others were finished; they come after all of those.
LATER = ("mirror", "mirror_f", "mirror_bare")
#: Methods whose first result was not what was expected: they are trained again, and stand in the README.
REPEATED = ("nextquill",)
