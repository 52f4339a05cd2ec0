"""`MirrorTrainer`: NextQuill's trainer on responses that the model samples at every step."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from nextquill.data import EncodedDataset, PromptTemplate, load_records
from nextquill.data.collator import IGNORE_INDEX
from nextquill.data.examples import Anchor, Branch, EncodedExample
from nextquill.data.prepared import is_prepared
from nextquill.data.records import Record
from nextquill.devices import send
from nextquill.errors import ArgumentError, BudgetError, naming
from nextquill.generation import Prompt, stop_tokens
from nextquill.generation.rollouts import ModelRollouts, Rollouts, Sample, check_samples
from nextquill.mirror.informative import InformativeTokens
from nextquill.mirror.loss import MirrorLoss
from nextquill.mirror.settings import REFERENCE, MirrorSettings
from nextquill.mirror.term_means import TermMeans, Terms
from nextquill.models.configs import base_model
from nextquill.outputs import PreferenceLossOutput
from nextquill.storage.fingerprints import seed_of
from nextquill.storage.sample_log import SampleLog
from nextquill.training.checks import why_not_alone
from nextquill.training.meter import CounterfactualWatch
from nextquill.training.trainer import NextQuillTrainer

logger = logging.getLogger(__name__)
#: The file in a run's folder with sampled responses.
SAMPLES_FILE = "sampled_responses.jsonl"
#: Nats that no likelihood rises by.
_NEVER = 1e6
#: Logged means over the sampled responses.
_MEANS = ("response_tokens", "responses_empty", "responses_unfinished", "responses_equal", "response_variety")
#: A variety below this share of the run's first one is warned of.
_LEAST_VARIETY = 0.5


class MirrorTrainer(NextQuillTrainer):
    """Train a model on its own responses, towards what it predicts with the user's own response in view.

    Each step samples responses to every example from the model as it is then, and minimises `MirrorLoss` on them. The
    gradient is that of the loss at fixed responses: there is none through the sampling. The seed of a sample is made of
    the run's seed, the step, the example and the sample's number: a resumed run samples the same responses, and so does
    any division of a step into micro-batches or processes.

    With `MirrorLoss(alpha=...)` above 0 this is MIRROR-F: the loss also has the NLL of the informative tokens of the
    user's own response, see `nextquill.mirror.informative`. Each term is divided by its mean over the run's steps
    before this one. The first step is divided by its own terms, which one more forward without gradient measures.

    Args:
        model, args, eval_dataset, processing_class, max_length, attention, max_tokens, examples_per_user, options: as
            in `NextQuillTrainer`. A prompt leaves `max_new_tokens` of `max_length` for the response.
        train_dataset: records, as `nextquill.data.load_records` reads them.
        template: the wording of prompts; by default that of `PromptTemplate` with the history first. In another order
            all branches are right, but part before the history and share less.
        loss: a `MirrorLoss`; by default with beta = 0.5 and alpha = 0.
        max_new_tokens: the most tokens of a sampled response.
        temperature: of the samples; with 1 the responses are the model's own.
        num_rollouts: the responses sampled for each example in a step; the loss is their mean.
        reference: the words after the query that show the teacher the user's response, as `{response}`.
        log_samples_every: every so many steps, the sampled responses are appended to `sampled_responses.jsonl` in the
            run's folder, with step, user_id and example; 0 for never. Every process but the first has its own file.
        rollouts: what samples the responses; by default the model in memory.

    Training logs what `NextQuillTrainer` does, with the student as `factual` and the teacher as `counterfactual`.
    `effect_logprob` is then the mean of log p1 - log p0 over the sampled tokens, `loss_factual` the divergence and
    `loss_effect` the anchor's NLL, both undivided. It also logs response_tokens (the mean length) and, as shares of
    the sampled responses, responses_empty (nothing but the stop token: they are trained on like others),
    responses_unfinished (no stop within `max_new_tokens`) and responses_equal (the tokens of the user's own);
    response_variety is the mean of a response's distinct tokens / tokens. A model that repeats itself whatever it is
    shown has no divergence left, and too high a learning rate leads there: a warning says so once the variety has
    halved.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        RecordError, BudgetError: a record is malformed, or its teacher's prompt does not fit.
    """

    _sums: Tensor
    _sample_log: SampleLog
    _has_anchor = False  # whether any example of the step has informative tokens
    _loss_falls = False  # each step's responses are new, and MIRROR-F's terms are divided by their means

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        template: PromptTemplate | None = None,
        loss: MirrorLoss | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        num_rollouts: int = 1,
        reference: str = REFERENCE,
        log_samples_every: int = 1,
        rollouts: Rollouts | None = None,
        **options: Any,
    ) -> None:
        loss = MirrorLoss() if loss is None else loss
        if not isinstance(loss, MirrorLoss):
            raise ArgumentError(f"loss: expected a MirrorLoss, got {type(loss).__name__}")
        if options.get("effects_file") is not None:
            raise ArgumentError("effects_file: expected None, as the divergence has no token weights")
        self.settings = MirrorSettings(max_new_tokens, temperature, num_rollouts, reference, log_samples_every)
        most = options.get("max_response_length")
        if most is not None and max_new_tokens > most:
            raise ArgumentError(f"max_new_tokens: expected at most max_response_length={most}, got {max_new_tokens}")
        # The teacher is not a pass without history, and its likelihood of the student's responses may rise.
        own = [CounterfactualWatch(_NEVER, trained_through=False), TermMeans()]
        callbacks = [*(options.pop("callbacks", None) or []), *own]
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        _check_args(args, log_samples_every)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            template=PromptTemplate(order="history_first") if template is None else template,
            loss=loss,
            callbacks=callbacks,
            **options,
        )
        self._collate: Any = self.data_collator
        self.data_collator = _examples
        base = base_model(model)
        self._stops = stop_tokens(base, processing_class, self._ends())
        if rollouts is None:
            if (reason := why_not_alone(self)) is not None:
                raise ArgumentError(
                    "rollouts: expected some that do not run the model, such as RecordedRollouts, got None: a response "
                    f"needs a forward for each token, and {reason}; use FSDP2, DDP or a single process"
                )
            sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
            rollouts = ModelRollouts(model, processing_class, self._stops, **sampling)
        self.rollouts = rollouts
        self._sample_log = SampleLog(Path(str(args.output_dir)), SAMPLES_FILE, args.process_index, args.world_size)
        self._start_interval()

    # ---- data ----------------------------------------------------------------------------------

    def _encoded(self, source: Any, *, placebo: bool) -> EncodedDataset | None:
        if placebo or source is None:
            return super()._encoded(source, placebo=placebo)
        if isinstance(source, EncodedDataset) or (isinstance(source, (str, Path)) and is_prepared(source)):
            raise ArgumentError(
                "train_dataset: expected records, as the teacher reads their responses, got encoded examples"
            )
        records = list(load_records(source))
        examples = [self._example(index, record) for index, record in enumerate(records)]
        if self.loss.needs_anchor:
            examples = self._with_anchors(examples, records)
        return EncodedDataset(examples)

    def _example(self, index: int, record: Record) -> EncodedExample:
        """Both prompts of a record; the response, which evaluations of a run's identity read, is the user's own."""
        room = self.settings.max_new_tokens
        with naming("train_dataset"):
            own = self.encoder.encode(replace(record, history=()), index).factual
            shown = record.query + self.settings.reference.replace("{response}", record.response)
            # The teacher's prompt is longer: what does not fit there is left out of both, so that they begin alike.
            try:
                teacher, kept = self.encoder.encode_prompt(shown, record.history, room)
            except BudgetError as error:
                raise BudgetError(
                    f"record {index} (user {record.user_id!r}): the teacher's prompt, which shows the user's response: "
                    f"{error}"
                ) from error
            student, _ = self.encoder.encode_prompt(record.query, _last(record.history, kept), room)
        response = own.response_ids
        return EncodedExample(
            user_id=record.user_id,
            index=index,
            factual=Branch(student, response),
            counterfactual=Branch(teacher, response),
            placebo=None,
            history_kept=kept,
            history_total=len(record.history),
        )

    def _with_anchors(self, examples: Sequence[EncodedExample], records: Sequence[Record]) -> list[EncodedExample]:
        responses = [example.factual.response_ids for example in examples]
        informative = InformativeTokens(self.processing_class, responses)
        found = []
        for example, record, response in zip(examples, records, responses, strict=True):
            kept = _last(record.history, example.history_kept)
            texts = [record.query, *(text for item in kept for text in (item.title, item.text) if text)]
            found.append(replace(example, anchor=Anchor(example.factual, informative.labels(response, texts))))
        return found

    def _ends(self) -> list[int]:
        dataset: Any = self.train_dataset
        return [] if dataset is None or not len(dataset) else [dataset[0].factual.response_ids[-1]]

    def _check_fits(self, dataset: EncodedDataset | None) -> None:
        longest = [0] * self.settings.max_new_tokens
        super()._check_fits(dataset and EncodedDataset([_with_response(each, longest) for each in dataset.examples]))

    # ---- training ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The accumulation window's batches of sampled responses, and the divisor of the reduction (a scalar)."""
        batches, items = super().get_batch_samples(self._sampled(epoch_iterator, num_batches), num_batches, device)
        if self.loss.needs_anchor and items is not None:
            self._set_terms(batches, items)
        return batches, items

    def _sampled(self, epoch_iterator: Iterator[Any], num_batches: int) -> Iterator[Any]:
        """Yield the window's batches with responses of the present model in place of each user's own."""
        window = [batch["examples"] for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        examples = [example for batch in window for example in batch]
        if not examples:
            return
        step, copies = self.state.global_step, range(self.settings.num_rollouts)
        drawn = [(example, copy) for example in examples for copy in copies]
        prompts = [
            Prompt(place, example.factual.prompt_ids, seed_of(f"{self.args.seed} {step} {example.index} {copy}"))
            for place, (example, copy) in enumerate(drawn)
        ]
        self.rollouts.sync()
        self.passes.close()  # the model samples with its own attention
        with self.compute_loss_context_manager():
            samples = self.rollouts.sample(prompts)
        check_samples(samples, len(prompts))
        self._note([example for example, _ in drawn], samples, step)
        left = iter(samples)
        for batch in window:
            yield self._collate([_with_response(each, next(left).ids, copy) for each in batch for copy in copies])

    def _note(self, examples: Sequence[EncodedExample], samples: Sequence[Sample], step: int) -> None:
        """Count the step's samples, and log them where it is their turn."""
        pairs = list(zip(examples, samples, strict=True))
        rows = [
            (
                len(s.ids),
                not s.text.strip(),
                not s.ended,
                s.ids == example.factual.response_ids,
                len(set(s.ids)) / max(1, len(s.ids)),
            )
            for example, s in pairs
        ]
        self._step_sums = torch.tensor([(1, *row) for row in rows], dtype=torch.float64).sum(0)
        every = self.settings.log_samples_every
        if every and step % every == 0:
            self._sample_log.append(_line(step, example, sample) for example, sample in pairs)

    def _set_terms(self, batches: Sequence[Any], items: Tensor | int) -> None:
        """Give the loss the window's number of anchors, and the terms' means."""
        own = sum(self.loss.count_anchors(part) for batch in batches for part in batch["parts"])
        (total,) = self._reduced(torch.tensor([own]))
        self.loss.num_anchors, self._has_anchor = max(1.0, total), total > 0
        means = self.term_means
        is_known = means.has(anchor=self._has_anchor)
        self.loss.term_means = means.values() if is_known else means.values(self._measured(batches, items))

    @torch.no_grad()
    def _measured(self, batches: Sequence[Any], items: Tensor | int) -> Terms:
        """The terms of a window, from a forward without gradient."""
        parts = [part for batch in batches for part in self._prepare_inputs(batch)["parts"]]
        with self.compute_loss_context_manager():
            return self._terms([self.passes.part_loss(part, items, self.model_wrapped)[1] for part in parts])

    def _terms(self, outputs: Iterable[PreferenceLossOutput]) -> Terms:
        """Both terms of a step, over all ranks."""
        terms = torch.stack([torch.stack((each.factual, each.effect)) for each in outputs]).sum(0)
        divergence, anchor = self._reduced(terms)
        return divergence, anchor if self._has_anchor else None

    def _reduced(self, sums: Tensor) -> list[float]:
        """The sums over all examples of a step."""
        found: list[float] = self._sum_of_batches(send(sums.double(), self.args.device)).tolist()
        return found

    @property
    def loss(self) -> MirrorLoss:
        """The loss, with the model's own soft cap and scale."""
        return cast("MirrorLoss", self.passes.loss)

    @property
    def term_means(self) -> TermMeans:
        """The callback, which restoring a checkpoint may have replaced."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, TermMeans))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run the step as `NextQuillTrainer` does; the last micro-batch of a step updates the terms' means.

        `num_items_in_batch` and the returned loss of the micro-batch are scalars of any floating dtype.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.loss.needs_anchor:
                self.term_means.add(self._terms(output for *_, output in self._step_outputs))
            self._sums = self._sums + self._step_sums
        return loss

    def _forget_step(self) -> None:
        super()._forget_step()
        self._sums = self._sums - self._step_sums
        if self.loss.needs_anchor:
            self.term_means.forget()

    def _interval_metrics(self) -> dict[str, float]:
        count, *sums = self._reduced(self._sums)
        means = {name: total / max(1.0, count) for name, total in zip(_MEANS, sums, strict=True)}
        self._watch_variety(means["response_variety"])
        return {**super()._interval_metrics(), **means}

    def _watch_variety(self, now: float) -> None:
        """Warn at the first of the run's intervals whose responses repeat themselves."""
        before = [log["response_variety"] for log in self.state.log_history if "response_variety" in log]
        limit = _LEAST_VARIETY * before[0] if before else 0.0
        if now < limit <= min(before) and self.is_world_process_zero():
            logger.warning(
                f"step {self.state.global_step}: the sampled responses repeat themselves: {now:.0%} of a response's "
                f"tokens are distinct, {before[0]:.0%} at the beginning. The divergence teaches nothing on such texts; "
                f"read them in {SAMPLES_FILE}, and train again from the start with a lower learning_rate"
            )

    def _start_interval(self) -> None:
        """Forget the sums since the last log, float64 [6]: the number of samples, and the sums of `_MEANS`."""
        super()._start_interval()
        self._sums = self._step_sums = torch.zeros(1 + len(_MEANS), dtype=torch.float64)

    def run_identity(self) -> dict[str, Any]:
        """The values that a checkpoint must share with a run that resumes from it."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "log_samples_every"}
        return {**super().run_identity(), **settings}


def _examples(examples: Sequence[EncodedExample]) -> dict[str, Any]:
    """The collator of a training batch: its examples as they are, since their responses are yet to be sampled."""
    return {"examples": list(examples)}


def _check_args(args: Any, log_samples_every: int) -> None:
    if args.push_to_hub and log_samples_every:
        raise ArgumentError(
            f"args.push_to_hub: not supported with log_samples_every={log_samples_every}: the run's folder then holds "
            f"texts about users ({SAMPLES_FILE}); log no samples, or upload what save_model writes"
        )


def _last(history: Sequence[Any], count: int) -> Sequence[Any]:
    return history[len(history) - count :]


def _with_response(example: EncodedExample, response: list[int], copy: int = 0) -> EncodedExample:
    """The example with a sampled response; only its first copy has an anchor with labels, which costs more tokens."""
    student, teacher = (Branch(each.prompt_ids, response) for each in (example.factual, example.counterfactual))
    anchor = example.anchor
    if anchor is not None and (copy > 0 or max(anchor.labels) < 0):
        anchor = Anchor(student, array("i", [IGNORE_INDEX]) * len(response))
    return replace(example, factual=student, counterfactual=teacher, anchor=anchor)


def _line(step: int, example: EncodedExample, sample: Sample) -> dict[str, object]:
    named = {"step": step, "user_id": example.user_id, "example": example.index, "response": sample.text}
    return {**named, "tokens": len(sample.ids), "ended": sample.ended}
