"""What a causal loss changes in a training loop of transformers, as a mixin for `Trainer` and its subclasses.

    batches     parts of trees; every rank gets as many as the one with most
    loss        normalised over the accumulation window and all ranks, so that no split of a batch changes the gradient
    logs        the loss's terms and effects, reduced over ranks
    evaluation  a row of figures per example

`NextQuillTrainer` puts it on transformers' Trainer, `training.trl` on TRL's SFTTrainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nextquill.data import EncodedDataset, EncodedExample, UserGroupSampler
from nextquill.data.collator import empty_like
from nextquill.data.templates import BRANCHES
from nextquill.errors import ArgumentError
from nextquill.evaluation.scoring import forward_budget
from nextquill.losses import PairLoss
from nextquill.models.branch_passes import PairPasses, with_empty_parts
from nextquill.training.checks import check_batching
from nextquill.training.meter import TrainingMeter, eval_metrics, example_table

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object


class CausalLossMixin(_Base):
    """Trains with a `PairLoss` in place of a Trainer's own loss; before it among the bases of a class.

    A subclass calls `_set_loss` in its constructor, before or after the Trainer's, and gives the Trainer
    `self.passes.collator(...)` as its data collator, and `EncodedDataset`s.
    """

    passes: PairPasses
    meter: TrainingMeter
    max_tokens: int | None
    examples_per_user: int

    def _set_loss(self, passes: PairPasses, args: Any, max_tokens: int | None, examples_per_user: int) -> None:
        check_batching(args, passes.loss, max_tokens, examples_per_user)
        if passes.trees is not None and getattr(args, "neftune_noise_alpha", None) is not None:
            raise ArgumentError(
                "args.neftune_noise_alpha: not supported with trees, where a shared token has one noise for all "
                "branches; leave it out or use attention='padded'"
            )
        self.passes, self.meter = passes, TrainingMeter()
        self.max_tokens, self.examples_per_user = max_tokens, examples_per_user

    def _check_fits(self, dataset: EncodedDataset | None) -> None:
        """Raise BudgetError before training where an example alone takes more than `max_tokens`."""
        if dataset is not None and self.max_tokens is not None:
            collator: Any = self.passes.collator(max_tokens=self.max_tokens)
            names = collator.forwards[-1]
            forward_budget(_longer(dataset, self.max_tokens, names), self.max_tokens, names=names)

    def _set_normalised(self) -> None:
        """To be called after the Trainer's constructor: say that `compute_loss` has normalised over the window."""
        self.model_accepts_loss_kwargs = True  # to transformers before 5.20 or so
        self.loss_is_scaled_for_ga = True  # since

    @property
    def loss(self) -> PairLoss:
        """The loss, with the model's own soft cap and scale."""
        return self.passes.loss

    @property
    def _pad_token_id(self) -> int:
        known = (getattr(self.processing_class, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((i for i in known if i is not None), 0)

    # ---- data ----------------------------------------------------------------------------------

    @contextmanager
    def _collating_for(self, dataset: EncodedDataset | None) -> Iterator[None]:
        """Give the data loaders made in this block a collator of all branches."""
        placebo = dataset is not None and dataset.has_placebo
        previous, budget = self.data_collator, self.max_tokens
        if budget is not None and dataset is not None:
            # More branches than in training stand in a row, and without gradient they take a fraction of the memory.
            names = BRANCHES if placebo else BRANCHES[:2]
            budget = forward_budget(_longer(dataset, budget, names), None, budget, names)
        self.data_collator = self.passes.scoring_collator(self._pad_token_id, budget, placebo=placebo)
        try:
            yield
        finally:
            self.data_collator = previous

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's, over all branches."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            named: Any = self.eval_dataset
            dataset = named[dataset]
        with self._collating_for(dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's, over all branches."""
        with self._collating_for(test_dataset):
            return super().get_test_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's, or one that keeps a user's examples together."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.examples_per_user == 1:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return UserGroupSampler(dataset.user_ids, self.examples_per_user, seed)

    # ---- training ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The accumulation window's batches, and what the reduction divides by over all ranks, a float32 scalar.

        A batch over the token budget is several parts. Every rank gets as many as the one with most: each of them is a
        forward and a backward in which sharded and data-parallel engines meet.
        """
        if self.state.global_step >= self.state.max_steps:  # transformers asks once more when a finished run is resumed
            return [], None
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        own = torch.tensor(sum(self.passes.count_items(batch) for batch in batches), dtype=torch.float32, device=device)
        users = torch.cat([batch["users"] for batch in batches]).to(device) if batches else None
        if self.accelerator.num_processes > 1:
            counts = torch.tensor([[len(batch["parts"]) for batch in batches]], device=device)
            self._fill_up(batches, self.accelerator.gather(counts).amax(0).tolist())
            users = self.accelerator.gather(self.accelerator.pad_across_processes(users, pad_index=-1))
        self.meter.begin_step(0 if users is None else _count_different(users))
        return batches, self.accelerator.reduce(own, reduction="sum").clamp(min=1.0)

    def _fill_up(self, batches: Sequence[dict[str, Any]], counts: Sequence[int]) -> None:
        """Add parts without labels until every batch has as many as some rank's."""
        for batch, count in zip(batches, counts, strict=True):
            parts = batch["parts"]
            batch["parts"] = [*parts, *(empty_like(parts[0]) for _ in range(count - len(parts)))]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the model gets its own attention back in the end."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.passes.close()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As the Trainer's, part by part: only one part's activations are held, and ranks meet on the last alone.

        Takes `num_items_in_batch` as a scalar and returns the micro-batch's loss as one, both of any floating dtype.
        """
        parts = inputs["parts"]
        if len(parts) == 1 or self.is_deepspeed_enabled:  # whose engine counts backwards to find its steps
            return super().training_step(model, inputs, num_items_in_batch)
        losses = []
        for part in parts:
            # A sharded engine would hold all gradients whole until it may reduce them.
            waits = part is not parts[-1] and not self.is_fsdp_enabled
            with self.accelerator.no_sync(model) if waits else nullcontext():
                losses.append(super().training_step(model, {**inputs, "parts": [part]}, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the window's loss; with `return_outputs` also its parts' outputs.

        `num_items_in_batch` is a scalar of any dtype; the loss is a float32 or float64 scalar.
        """
        loss, outputs = self.passes.training_loss(inputs, num_items_in_batch, model)
        for part, output in zip(inputs["parts"], outputs, strict=True):
            self.meter.add(output, part["num_tokens"], part["num_branch_tokens"])
        if num_items_in_batch is not None:
            # Data-parallel engines average gradients over ranks; the sum over ranks is what was normalised.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a log of the training loop, which every rank makes, gets the interval's metrics."""
        if "loss" in logs and start_time is not None:
            logs |= self.meter.read(lambda sums: self.accelerator.reduce(sums, reduction="sum"), self.args.device)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """6 · parameters · tokens over the forwards; one without gradient costs a third."""
        total = 0.0
        for part in inputs["parts"]:
            *constant, last = ({"input_ids": forward["input_ids"]} for forward in part["forwards"])
            total += super().floating_point_ops(last)
            for forward in constant:
                total += super().floating_point_ops(forward) / 3
        return int(total)

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        for part in inputs["parts"]:
            for forward in part["forwards"]:
                super()._track_num_input_tokens(forward)  # type: ignore[no-untyped-call]

    # ---- evaluation ----------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """One row of `EVAL_COLUMNS` per example; the Trainer gathers them and drops what ranks saw twice.

        Returns:
            None, float32 [examples, columns], and int64 [examples], each example's index in the data set.
        """
        inputs = self._prepare_inputs(inputs)
        count = len(inputs["example_index"])
        with self.compute_loss_context_manager():
            tables = [example_table(self.passes.scores(part, model), count, self.loss) for part in self._met(inputs)]
        return None, torch.stack(tables).sum(0), inputs["example_index"]

    def _met(self, inputs: dict[str, Any]) -> list[Any]:
        """A batch's parts, with empty ones where another rank has more."""
        return with_empty_parts(inputs["parts"]) if self.accelerator.num_processes > 1 else inputs["parts"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the model is left as it was found unless it is training."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self.passes.close()

    def _eval_metrics(self, prediction: Any) -> dict[str, float]:
        table = torch.from_numpy(np.asarray(prediction.predictions))
        return eval_metrics(table, token_mean_loss=self.loss.reduction == "token")


def _longer(dataset: EncodedDataset, budget: int, names: Sequence[str]) -> list[EncodedExample]:
    """The examples whose branches together, what they share counted twice, are over the budget."""
    sizes = dataset.num_branch_tokens(names)
    return [dataset.examples[index] for index, size in enumerate(sizes) if size > budget]


def _count_different(users: Tensor) -> Tensor:
    """How many different numbers there are, but for -1; without waiting for the device."""
    ordered = users.sort().values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return (first & (ordered >= 0)).sum()
