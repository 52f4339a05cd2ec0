"""Training with a causal loss, as a mixin for transformers' `Trainer` and its subclasses.

    batches     parts of trees; every rank runs the same number of parts
    loss        normalised over the accumulation window and all ranks, so that no split of a batch changes the gradient
    logs        the loss's terms and effects, reduced over ranks
    evaluation  a row of figures per example

`NextQuillTrainer` adds it to transformers' Trainer, `training.trl` to TRL's SFTTrainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nextquill.data import EncodedDataset, EncodedExample, ExampleEncoder, UserGroupSampler
from nextquill.data.collator import Collator
from nextquill.devices import send
from nextquill.errors import ArgumentError, NonFiniteError
from nextquill.evaluation.scoring import forward_budget, pad_token
from nextquill.losses import PairLoss
from nextquill.models.branch_passes import PairPasses, add_empty_parts, with_empty_parts
from nextquill.models.loading import PROMPT_FILE, PromptSettings
from nextquill.models.probe import temporarily
from nextquill.storage.atomic_files import write_whole
from nextquill.training.checks import check_batching
from nextquill.training.finite import FiniteSteps
from nextquill.training.meter import TrainingMeter, eval_metrics, example_table
from nextquill.training.model_card import CARD_FILE, model_card

if TYPE_CHECKING:
    from nextquill.outputs import PreferenceLossOutput


class CausalLossMixin(FiniteSteps):
    """Replaces the loss of a Trainer by a `PairLoss`; it precedes the Trainer among the bases of a class.

    A subclass calls `_set_loss` in its constructor, before or after the Trainer's constructor. It gives the Trainer
    `EncodedDataset`s, and `self.passes.collator(...)` as the data collator.
    """

    passes: PairPasses
    meter: TrainingMeter
    max_tokens: int | None
    examples_per_user: int
    encoder: ExampleEncoder | None  # the maker of the examples, if known

    def _set_loss(self, passes: PairPasses, args: Any, max_tokens: int | None, examples_per_user: int) -> None:
        check_batching(args, max_tokens, examples_per_user)
        if getattr(args, "neftune_noise_alpha", None) is not None:
            passes.pad_training(
                ArgumentError(
                    "args.neftune_noise_alpha: not supported with trees, where all branches of a shared token get the "
                    "same noise; leave it out or use attention='padded'"
                )
            )
        self.passes, self.meter = passes, TrainingMeter()
        self.max_tokens, self.examples_per_user = max_tokens, examples_per_user

    def _check_fits(self, dataset: EncodedDataset | None) -> None:
        """Raise BudgetError before training if a single example takes more than `max_tokens`."""
        if dataset is not None and self.max_tokens is not None:
            collator = self.passes.collator(max_tokens=self.max_tokens)
            forward_budget(_near(dataset, self.max_tokens, collator), self.max_tokens, collator)

    def _set_normalised(self) -> None:
        """Tell the Trainer that `compute_loss` normalises over the window. Call this after its constructor."""
        self.model_accepts_loss_kwargs = True  # transformers before 5.20 or so
        self.loss_is_scaled_for_ga = True  # later versions

    @property
    def loss(self) -> PairLoss:
        """The loss, with the model's own soft cap and scale."""
        return self.passes.loss

    # ---- data ----------------------------------------------------------------------------------

    def _encoded(self, source: Any, *, placebo: bool) -> EncodedDataset | None:
        """The examples of `source`, which a subclass may accept in other forms."""
        return source  # type: ignore[no-any-return]

    @contextmanager
    def _collating_for(self, dataset: EncodedDataset | None) -> Iterator[None]:
        """Give data loaders that are made in this block a collator of all branches."""
        placebo = dataset is not None and dataset.has_placebo
        budget, pad = self.max_tokens, pad_token(self.processing_class)
        if budget is not None and dataset is not None:
            # A row holds more branches than in training. Without gradient they take a fraction of the memory.
            collator = self.passes.scoring_collator(pad, placebo=placebo)
            budget = forward_budget(_near(dataset, budget, collator), None, collator, budget)
        with temporarily(self, "data_collator", self.passes.scoring_collator(pad, budget, placebo=placebo)):
            yield

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's loader, over all branches; `eval_dataset` may be a name in the dict given at first."""
        own: Any = self.eval_dataset
        if isinstance(own, dict) and isinstance(eval_dataset, str) and eval_dataset in own:
            dataset = own[eval_dataset]
        else:
            eval_dataset = self._encoded(eval_dataset, placebo=True)
            dataset = own if eval_dataset is None else eval_dataset
        with self._collating_for(dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's loader, over all branches."""
        test_dataset = self._encoded(test_dataset, placebo=True)
        with self._collating_for(test_dataset):
            return super().get_test_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's sampler, or one that keeps a user's examples together."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.examples_per_user == 1:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return UserGroupSampler(dataset.user_ids, self.examples_per_user, seed)

    # ---- training ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The accumulation window's batches, and the divisor of the reduction over all ranks, a float32 scalar.

        A batch over the token budget has several parts. Every rank gets the same number of parts, because sharded and
        data-parallel engines synchronise in the forward and backward of each.
        """
        if self.state.global_step >= self.state.max_steps:  # transformers asks once more when a finished run is resumed
            return [], None
        self._begin_step()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        items = sum(self.passes.count_items(batch) for batch in batches)
        own = send(torch.tensor(items, dtype=torch.float32), device)
        users = send(torch.cat([batch["users"] for batch in batches]), device) if batches else None
        if self.accelerator.num_processes > 1:
            counts = send(torch.tensor([[len(batch["parts"]) for batch in batches]]), device)
            for batch, count in zip(batches, self.accelerator.gather(counts).amax(0).tolist(), strict=True):
                batch["parts"] = add_empty_parts(batch["parts"], count)
            users = self.accelerator.gather(self.accelerator.pad_across_processes(users, pad_index=-1))
        self.meter.begin_step(0 if users is None else _count_different(users))
        return batches, self._sum_of_batches(own).clamp(min=1.0)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; the model gets its own attention back at the end.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, or of another run.
            NonFiniteError: a step's loss or gradient is not finite; see `FiniteGuard`.
        """
        self.meter.reset()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.passes.close()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run the Trainer's step part by part. It holds one part's activations; ranks synchronise on the last part.

        `num_items_in_batch` and the returned loss of the micro-batch are scalars of any floating dtype.
        """
        parts = inputs["parts"]
        if len(parts) == 1 or self.is_deepspeed_enabled:  # DeepSpeed's engine counts backwards to find its steps
            return self._watch(super().training_step(model, inputs, num_items_in_batch))
        losses = []
        for part in parts:
            # Without synchronisation, FSDP would hold all gradients unsharded.
            waits = part is not parts[-1] and not self.is_fsdp_enabled
            with self.accelerator.no_sync(model) if waits else nullcontext():
                losses.append(super().training_step(model, {**inputs, "parts": [part]}, num_items_in_batch))
        return self._watch(torch.stack(losses).sum())

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
            added = self.meter.add(output, part["num_tokens"], part["num_branch_tokens"])
            if self.is_in_train:
                self._watched.append(added)
                self._step_outputs.append((inputs["example_index"], part["sequence_ids"], output))
        if num_items_in_batch is not None:
            # Data-parallel engines average gradients over ranks; the loss was normalised as a sum over ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _sum_of_batches(self, own: Tensor) -> Tensor:
        """Sum over the ranks' batches; those that share a batch, as tensor parallelism does, count once."""
        total: Tensor = self.accelerator.reduce(own, reduction="sum")
        return total / self.get_tp_size()

    def _begin_step(self) -> None:
        super()._begin_step()
        self._step_outputs: list[tuple[Tensor, Tensor, PreferenceLossOutput]] = []

    def _suspects(self) -> list[str]:
        """The step's examples with a token whose loss or NLL is not finite; all of them if there are none."""
        everything, broken = list[int](), list[int]()
        for indices, sequences, output in self._step_outputs:
            nlls = [each for each in output.pair_nll if each is not None]
            wrong = ~torch.stack([output.token_loss, *nlls]).isfinite().all(0)
            everything += indices[sequences.unique()].tolist()
            broken += indices[sequences[wrong].unique()].tolist()
        examples: Any = self.train_dataset
        users = {example.index: example.user_id for example in examples.examples}
        return [f"example {index} (user {users[index]!r})" for index in broken or everything]

    def _forget_step(self) -> None:
        self.meter.forget_step()

    def _interval_metrics(self) -> dict[str, float]:
        return self.meter.read(self._sum_of_batches, self.args.device)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """6 · parameters · tokens over the forwards; a forward without gradient costs a third."""
        total = 0.0
        for part in inputs["parts"]:
            *constant, last = ({"input_ids": forward["input_ids"]} for forward in part["forwards"])
            total += super().floating_point_ops(last)
            for forward in constant:
                total += super().floating_point_ops(forward) / 3
        return int(total) // self.get_tp_size()

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
        """One row of `EVAL_COLUMNS` per example; the Trainer gathers them and drops examples that ranks saw twice.

        Returns:
            None, float32 [examples, columns], and int64 [examples], each example's index in the data set.
        """
        inputs = self._prepare_inputs(inputs)
        count = len(inputs["example_index"])
        parts = with_empty_parts(inputs["parts"])
        with self.compute_loss_context_manager():
            tables = [example_table(self.passes.scores(part, model), count, self.loss) for part in parts]
        return None, torch.stack(tables).sum(0), inputs["example_index"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does; outside training, leave the model as it was before."""
        if self.get_tp_size() > 1:
            self.gather_function: Any = self._gather_batches
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self.passes.close()

    def _gather_batches(self, rows: Tensor) -> Tensor:
        """Gather rows [examples, …] of any dtype; once from processes that share a batch, as tensor parallelism does.

        In place of Accelerate's function, which counts such rows as other examples.
        """
        everything: Tensor = self.accelerator.gather(rows)
        batches: Tensor = everything.unflatten(0, (-1, self.get_tp_size(), len(rows)))
        gathered, state = batches[:, 0].flatten(0, 1), self.accelerator.gradient_state
        return gathered[: int(state.remainder)] if state.end_of_dataloader and state.remainder > 0 else gathered

    def _eval_metrics(self, prediction: Any) -> dict[str, float]:
        table = torch.from_numpy(np.asarray(prediction.predictions))
        metrics = eval_metrics(table, token_mean_loss=self.loss.reduction == "token")
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise NonFiniteError(
                f"step {self.state.global_step}: the evaluation's {broken[0]} is {metrics[broken[0]]}; the weights are "
                "damaged, or their precision is too low"
            )
        return metrics

    # ---- files ---------------------------------------------------------------------------------

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the model card into the output folder; a push to the hub asks for it."""
        write_whole(Path(str(self.args.output_dir)) / CARD_FILE, model_card(self))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model as the Trainer does, and beside it its card and, if known, how its prompts are made."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every rank comes here
            return
        folder, encoder = Path(str(self.args.output_dir if output_dir is None else output_dir)), self.encoder
        if encoder is not None:
            settings = PromptSettings(encoder.template, encoder.max_length, encoder.max_response_length)
            write_whole(folder / PROMPT_FILE, settings.with_chat(encoder.renderer.uses_chat).to_json())
        write_whole(folder / CARD_FILE, model_card(self))  # in place of PEFT's, which names local paths


def _near(dataset: EncodedDataset, budget: int, collator: Collator) -> list[EncodedExample]:
    """The examples that may take more than the budget; a padded row is no longer than all branches together."""
    names = collator.forwards[-1]
    sizes = dataset.num_branch_tokens(names)
    return [dataset.examples[index] for index, size in enumerate(sizes) if size * len(names) > budget]


def _count_different(users: Tensor) -> Tensor:
    """The number of different values, -1 left out; without waiting for the device."""
    ordered = users.sort().values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return (first & (ordered >= 0)).sum()
