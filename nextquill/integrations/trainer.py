"""`NextQuillTrainer`: transformers' Trainer with a causal loss in place of the model's own.

What is added to the Trainer: both branches of every example are built, merged into trees of shared prefixes and run;
the loss runs inside the model's head; its reduction is exact over gradient accumulation and ranks; evaluation measures
effects against a placebo; checkpoints are atomic. Everything else (optimisers, schedulers, mixed precision, PEFT,
callbacks, logging) is the Trainer's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from nextquill.data import (
    EncodedExample,
    ExampleEncoder,
    PromptTemplate,
    UserGroupSampler,
    load_effects,
    load_records,
)
from nextquill.errors import RecordError
from nextquill.integrations import checkpoints
from nextquill.integrations.checks import (
    check_arguments,
    check_batching,
    check_model,
    check_options,
    check_vocabulary,
    default_max_length,
)
from nextquill.integrations.effects import effects_digest
from nextquill.integrations.metrics import CounterfactualWatch, TrainingMeter, eval_metrics, example_table
from nextquill.integrations.passes import PairPasses
from nextquill.losses import NextQuillLoss, PairLoss

__all__ = ["EncodedDataset", "NextQuillTrainer", "check_vocabulary", "default_max_length"]


class EncodedDataset(Dataset[EncodedExample]):
    """Encoded examples as a map-style data set."""

    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> EncodedExample:
        return self.examples[index]

    @property
    def has_placebo(self) -> bool:
        """Whether every example has a placebo branch."""
        return bool(self.examples) and all(example.placebo is not None for example in self.examples)


class NextQuillTrainer(Trainer):
    """Fine-tune a causal language model on users' histories with a causal loss.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        args: TrainingArguments; `remove_unused_columns` is turned off, since records are not model inputs.
        train_dataset, eval_dataset: records (`nextquill.data.load_records`: a JSONL path, a `datasets.Dataset`, any
            iterable of mappings), or an `EncodedDataset`. `eval_dataset` may be a dict of them.
        processing_class: the tokenizer.
        loss: any `PairLoss`; by default `NextQuillLoss(detach_counterfactual=True)`. Its softcap and logit_scale are
            taken from the model.
        template: how a prompt is worded; `PromptTemplate()` by default.
        max_length: budget of prompt and response in tokens; by default 2048 or the model's own limit if that is less.
        max_response_length: budget of the response alone, or None.
        attention: how rows of trees are attended, or "padded" for a padded row per branch; see
            `nextquill.integrations.attention`.
        max_tokens: most tokens of one forward with gradient, after sharing; a device's batch that takes more is run in
            several, with the same gradient. None runs it in one.
        examples_per_user: keep so many examples of a user together in a batch, so that they share their history; see
            `UserGroupSampler`. The batch size stays what it is and must be a multiple of this.
        effects_file: take token weights from the effects that `nextquill score` has written for the training records,
            instead of the model's own, which change while it trains. No counterfactual pass is made then, unless a term
            of the loss reads it: NextQuill with `alpha` above 0 keeps it for its effect term, and any loss with
            `anchor` for that. Evaluation weighs by the model's own effects.
        callbacks: as the Trainer's; a `CounterfactualWatch` among them takes the place of the default one.
        options: everything else the Trainer takes, but for compute_loss_func, compute_metrics, data_collator,
            preprocess_logits_for_metrics and model_init, which this class fills itself.

    Logged while training, over the interval since the last log and all ranks: loss_factual, loss_effect,
    loss_counterfactual (terms under the loss's reduction), nll_factual, nll_counterfactual, effect_logprob,
    effect_prob, share_above_threshold, token_weight (means over tokens), num_tokens, num_sequences, tokens_per_second
    (tokens of the branches on their own, prompts included), sharing_factor (those by the tokens computed) and
    users_per_step; of a loss of one stream none that needs the other. Evaluation returns eval_loss, eval_nll_factual,
    eval_nll_counterfactual, eval_effect_logprob, eval_effect_prob, eval_share_above_threshold, eval_num_tokens, and,
    where the data has more than one user, eval_nll_placebo and eval_effect_placebo. `predict` takes records too; its
    `predictions` are the per-example table of `metrics.EVAL_COLUMNS`, its `label_ids` the examples' positions.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        RecordError, BudgetError: a record is malformed or does not fit, or the effects file is of other records; found
            before training starts.
        UnsupportedModelError: the model's head cannot be handled exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        loss: PairLoss | None = None,
        template: PromptTemplate | None = None,
        max_length: int | None = None,
        max_response_length: int | None = None,
        attention: str = "auto",
        max_tokens: int | None = None,
        examples_per_user: int = 1,
        effects_file: str | os.PathLike[str] | None = None,
        callbacks: list[Any] | None = None,
        **options: Any,
    ) -> None:
        check_options(options)
        loss = NextQuillLoss(detach_counterfactual=True) if loss is None else loss
        check_model(model, processing_class, loss)
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        check_arguments(args)
        args.remove_unused_columns = False
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False

        self.passes = PairPasses(model, loss, attention, stored_effects=effects_file is not None)
        self.loss = self.passes.loss
        length = default_max_length(model) if max_length is None else max_length
        self.passes.check_training(length)
        check_batching(args, self.loss, max_tokens, examples_per_user)
        self.max_tokens, self.examples_per_user = max_tokens, examples_per_user
        self.encoder = ExampleEncoder(processing_class, template, length, max_response_length)  # type: ignore[arg-type]
        self.meter, self.watch, callbacks = TrainingMeter(), *_with_watch(self.loss, callbacks)
        self.args = args  # what encoding reads of it; the Trainer sets it again
        super().__init__(
            model,
            args,
            data_collator=self.passes.collator(self._pad_token_id, max_tokens),
            train_dataset=_with_effects(self._encoded(train_dataset, placebo=False), effects_file),
            eval_dataset=(
                {name: self._encoded(part, placebo=True) for name, part in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else self._encoded(eval_dataset, placebo=True)
            ),
            processing_class=processing_class,
            compute_metrics=self._eval_metrics,
            callbacks=callbacks,
            **options,
        )
        # Both say that `compute_loss` has normalised over the accumulation window: the first to transformers before
        # 5.20 or so, the second, which it has in place of it, since.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._identity: dict[str, Any] | None = None
        self._is_staging = False

    # ---- data ----------------------------------------------------------------------------------

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self.encoder.renderer.tokenizer
        known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((i for i in known if i is not None), 0)

    def _encoded(self, source: Any, *, placebo: bool) -> EncodedDataset | None:
        if source is None or isinstance(source, EncodedDataset):
            return source
        progress = None if self.args.disable_tqdm else _progress
        return EncodedDataset(self.encoder.encode_all(load_records(source), placebo, self.args.seed, progress))

    @contextmanager
    def _collating_for(self, dataset: EncodedDataset | None) -> Iterator[None]:
        """Give the data loaders made in this block a collator of all branches."""
        placebo = dataset is not None and dataset.has_placebo
        previous = self.data_collator
        self.data_collator = self.passes.scoring_collator(self._pad_token_id, self.max_tokens, placebo=placebo)
        try:
            yield
        finally:
            self.data_collator = previous

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's, or one that keeps a user's examples together."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.examples_per_user == 1:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return UserGroupSampler([example.user_id for example in dataset.examples], self.examples_per_user, seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's, over all branches; `eval_dataset` may be records, or a name in the dict given at first."""
        own: Any = self.eval_dataset
        if isinstance(own, dict) and isinstance(eval_dataset, str) and eval_dataset in own:
            own = own[eval_dataset]
        else:
            eval_dataset = self._encoded(eval_dataset, placebo=True)
        with self._collating_for(eval_dataset if isinstance(eval_dataset, EncodedDataset) else own):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's, over all branches of records."""
        encoded: Any = self._encoded(test_dataset, placebo=True)
        with self._collating_for(encoded):
            return super().get_test_dataloader(encoded)

    # ---- training ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The accumulation window's batches, and what the reduction divides by over all of them and all ranks.

        A batch over the token budget is several parts. Every rank gets as many as the one with most: each of them is a
        forward and a backward in which sharded and data-parallel engines meet.
        """
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        own = torch.tensor(sum(self.passes.count_items(batch) for batch in batches), dtype=torch.float32, device=device)
        users = torch.cat([batch["users"] for batch in batches]).to(device) if batches else None
        if self.accelerator.num_processes > 1:
            counts = torch.tensor([len(batch["parts"]) for batch in batches], device=device)
            self._fill_up(batches, self.accelerator.reduce(counts, reduction="max").tolist())
            users = self.accelerator.gather(self.accelerator.pad_across_processes(users, pad_index=-1))
        self.meter.begin_step(0 if users is None else users[users >= 0].unique().numel())
        return batches, self.accelerator.reduce(own, reduction="sum").clamp(min=1.0)

    def _fill_up(self, batches: Sequence[dict[str, Any]], counts: Sequence[int]) -> None:
        """Add parts without labels until every batch has as many as some rank's."""
        for batch, count in zip(batches, counts, strict=True):
            missing = count - len(batch["parts"])
            batch["parts"] = [*batch["parts"], *(self._empty_part() for _ in range(missing))]

    def _empty_part(self) -> Any:
        collator: Any = self.data_collator
        return self._prepare_inputs(collator.empty_part())

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As the Trainer's, part by part: only one part's activations are held, and ranks meet on the last alone."""
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
        """This micro-batch's share of the window's loss; with `return_outputs` also its parts' outputs."""
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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, or of another model or loss.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = checkpoints.find_checkpoint(resume_from_checkpoint, folder)
        if self._identity is None:  # once: the engine may shard the parameters afterwards
            self._identity = self.run_identity()
        if checkpoint is not None and self.is_world_process_zero():
            checkpoints.check_identity(checkpoint, self._identity)
        if self.args.should_save:
            checkpoints.remove_staging(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._write_identity(folder)
        self.meter.reset()
        try:
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        finally:
            self.passes.close()

    def run_identity(self) -> dict[str, Any]:
        """What must agree between this run and a checkpoint it resumes from."""
        dataset: Any = self.train_dataset
        effects = effects_digest(dataset.examples) if self.passes.stored_effects and dataset is not None else None
        return {**checkpoints.run_identity(self.model, self.loss), "effects_file": effects}

    # ---- evaluation ----------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """One row of `EVAL_COLUMNS` per example; the Trainer gathers them and drops what ranks saw twice."""
        inputs = self._prepare_inputs(inputs)
        count = len(inputs["example_index"])
        with self.compute_loss_context_manager():
            tables = [example_table(self.passes.scores(part, model), count, self.loss) for part in self._met(inputs)]
        return None, torch.stack(tables).sum(0), inputs["example_index"]

    def _met(self, inputs: dict[str, Any]) -> list[Any]:
        """A batch's parts, with empty ones where another rank has more."""
        if self.accelerator.num_processes > 1:
            count = torch.tensor([len(inputs["parts"])], device=self.args.device)
            most = int(self.accelerator.reduce(count, reduction="max"))
            inputs = {**inputs, "parts": [*inputs["parts"]]}
            placebo = any("placebo" in forward["rows"] for forward in inputs["parts"][0]["forwards"])
            collator = self.passes.scoring_collator(self._pad_token_id, self.max_tokens, placebo=placebo)
            inputs["parts"] += [self._prepare_inputs(collator.empty_part()) for _ in range(most - len(inputs["parts"]))]
        parts: list[Any] = inputs["parts"]
        return parts

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

    # ---- checkpoints ---------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / checkpoints.STAGING) if self._is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but written under another name and renamed when every rank's part is in it."""
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staged = folder / checkpoints.STAGING / name
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
            best = f"checkpoint-{self.state.best_global_step}"
            if best == name or (folder / best).is_dir():
                self.state.best_model_checkpoint = str(folder / best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
                self._write_identity(staged)
                checkpoints.move_into_place(staged, folder / name)
        finally:
            self._is_staging = False
            if self.args.should_save:
                checkpoints.remove_staging(folder)
        if self.args.should_save:
            checkpoints.rotate(folder, self.args.save_total_limit, name, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging:  # the upload goes on in the background and needs a folder that stays
            super()._push_from_checkpoint(checkpoint_folder)

    def _write_identity(self, folder: Path) -> None:
        checkpoints.write_text(folder / checkpoints.RUN_FILE, json.dumps(self._identity, indent=2) + "\n")


def _with_effects(dataset: EncodedDataset | None, path: str | os.PathLike[str] | None) -> EncodedDataset | None:
    if dataset is None or path is None:
        return dataset
    try:
        return EncodedDataset(load_effects(path, dataset.examples))
    except RecordError as error:
        raise RecordError(f"effects_file: {error}") from error


def _with_watch(loss: PairLoss, callbacks: list[Any] | None) -> tuple[CounterfactualWatch, list[Any]]:
    """The watch among the callbacks, or a new one, and the callbacks with it."""
    callbacks = list(callbacks or [])
    given = [callback for callback in callbacks if isinstance(callback, CounterfactualWatch)]
    if given:
        return given[0], callbacks
    watch = CounterfactualWatch(trained_through=loss.needs_counterfactual and not loss.detaches_counterfactual)
    return watch, [*callbacks, watch]


def _progress(iterable: Iterable[Any], total: int, desc: str) -> Iterable[Any]:
    from tqdm.auto import tqdm

    return tqdm(iterable, total=total, desc=desc)
