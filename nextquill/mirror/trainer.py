"""`MirrorTrainer`: NextQuill's trainer on responses that the model samples at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from nextquill.data import EncodedDataset, PromptTemplate, load_records
from nextquill.data.examples import Branch, EncodedExample
from nextquill.data.records import Record
from nextquill.errors import ArgumentError, naming
from nextquill.generation import GenerationOptions, Prompt, stop_tokens
from nextquill.generation.rollouts import ModelRollouts, Rollouts
from nextquill.mirror.loss import MirrorLoss
from nextquill.models.configs import base_model
from nextquill.storage.fingerprints import seed_of
from nextquill.training.meter import CounterfactualWatch
from nextquill.training.trainer import NextQuillTrainer

#: The words that show the teacher the user's own response, after the query. Ours: the paper publishes none.
REFERENCE = "\n\nThe user's own response, for reference:\n{response}"
#: Nats that no likelihood rises by.
_NEVER = 1e6


@dataclass
class _Examples:
    """The collator of a training batch: its examples as they are, since their responses are yet to be sampled."""

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        return {"examples": list(examples)}


class MirrorTrainer(NextQuillTrainer):
    """Train a model on its own responses, towards what it predicts with the user's own response in view.

    Each step samples a response to every example from the model as it is then, and minimises `MirrorLoss` on it. The
    seed of a sample is made of the run's seed, the step and the example: a resumed run samples the same responses, and
    so does any division of a step into micro-batches or processes.

    Args:
        model, args, eval_dataset, processing_class, max_length, attention, max_tokens, examples_per_user, options: as
            in `NextQuillTrainer`. A prompt leaves `max_new_tokens` of `max_length` for the response.
        train_dataset: records, as `nextquill.data.load_records` reads them.
        template: the wording of prompts; by default that of `PromptTemplate` with the history first. In another order
            both branches are right, but part before the history and share less.
        loss: a `MirrorLoss`; by default with beta = 0.5.
        max_new_tokens: the most tokens of a sampled response.
        temperature: of the samples; with 1 the responses are the model's own.
        reference: the words after the query that show the teacher the user's response, as `{response}`.
        rollouts: what samples the responses; by default the model in memory.

    Training logs what `NextQuillTrainer` does, with the student as `factual` and the teacher as `counterfactual`: so
    `loss` is the divergence, and `effect_logprob` the mean of log p1 - log p0 over the sampled tokens.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        RecordError, BudgetError: a record is malformed, or its prompt does not fit.
    """

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
        reference: str = REFERENCE,
        rollouts: Rollouts | None = None,
        **options: Any,
    ) -> None:
        loss = MirrorLoss() if loss is None else loss
        if not isinstance(loss, MirrorLoss):
            raise ArgumentError(f"loss: expected a MirrorLoss, got {type(loss).__name__}")
        if "{response}" not in reference:
            raise ArgumentError(f"reference: expected words with {{response}} in them, got {reference!r}")
        if options.get("effects_file") is not None:
            raise ArgumentError("effects_file: expected None, as the divergence has no token weights")
        GenerationOptions(max_new_tokens, temperature=temperature)  # raises before the records are encoded
        self.max_new_tokens, self.temperature, self.reference = max_new_tokens, temperature, reference
        # The teacher is not a pass without history, and its likelihood of the student's responses may rise.
        callbacks = [*(options.pop("callbacks", None) or []), CounterfactualWatch(_NEVER, trained_through=False)]
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
        self.data_collator = _Examples()
        base = base_model(model)
        self._stops = stop_tokens(base, processing_class, self._ends())
        if rollouts is None:
            sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
            rollouts = ModelRollouts(model, processing_class, self._stops, **sampling)
        self.rollouts = rollouts

    # ---- data ----------------------------------------------------------------------------------

    def _encoded(self, source: Any, *, placebo: bool) -> EncodedDataset | None:
        if placebo or source is None:
            return super()._encoded(source, placebo=placebo)
        if isinstance(source, EncodedDataset):
            raise ArgumentError("train_dataset: expected records, as the teacher reads their responses, got examples")
        return EncodedDataset([self._example(index, record) for index, record in enumerate(load_records(source))])

    def _example(self, index: int, record: Record) -> EncodedExample:
        """Both prompts of a record; the response, which evaluations of a run's identity read, is the user's own."""
        with naming("train_dataset"):
            own = self.encoder.encode(replace(record, history=()), index).factual
            shown = record.query + self.reference.replace("{response}", record.response)
            # The teacher's prompt is longer: what does not fit there is left out of both, so that they begin alike.
            teacher, kept = self.encoder.encode_prompt(shown, record.history, self.max_new_tokens)
            history = record.history[len(record.history) - kept :]
            student, _ = self.encoder.encode_prompt(record.query, history, self.max_new_tokens)
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

    def _ends(self) -> list[int]:
        dataset: Any = self.train_dataset
        return [] if dataset is None or not len(dataset) else [dataset[0].factual.response_ids[-1]]

    def _check_fits(self, dataset: EncodedDataset | None) -> None:
        longest = [0] * self.max_new_tokens
        super()._check_fits(dataset and EncodedDataset([_with_response(each, longest) for each in dataset.examples]))

    # ---- training ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The accumulation window's batches of sampled responses, and the divisor of the reduction (a scalar)."""
        return super().get_batch_samples(self._sampled(epoch_iterator, num_batches), num_batches, device)

    def _sampled(self, epoch_iterator: Iterator[Any], num_batches: int) -> Iterator[Any]:
        """Yield the window's batches with a response of the present model in place of each user's own."""
        window = [batch["examples"] for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        examples = [example for batch in window for example in batch]
        if not examples:
            return
        step = self.state.global_step
        prompts = [
            Prompt(place, example.factual.prompt_ids, seed_of(f"{self.args.seed} {step} {example.index}"))
            for place, example in enumerate(examples)
        ]
        self.rollouts.sync()
        self.passes.close()  # the model samples with its own attention
        with self.compute_loss_context_manager():
            samples = iter(self.rollouts.sample(prompts))
        for batch in window:
            yield self._collate([_with_response(example, next(samples).ids) for example in batch])

    def run_identity(self) -> dict[str, Any]:
        """The values that a checkpoint must share with a run that resumes from it."""
        return {
            **super().run_identity(),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "reference": self.reference,
        }


def _with_response(example: EncodedExample, response: list[int]) -> EncodedExample:
    student, teacher = (Branch(each.prompt_ids, response) for each in (example.factual, example.counterfactual))
    return replace(example, factual=student, counterfactual=teacher)
