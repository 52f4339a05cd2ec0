"""`NextQuillTrainer`: transformers' Trainer with a causal loss in place of the model's own.

What is added to the Trainer: both branches of every example are built and run, the loss runs inside the model's head,
its reduction is exact over gradient accumulation and ranks, evaluation measures effects against a placebo, checkpoints
are atomic. Everything else (optimisers, schedulers, mixed precision, PEFT, callbacks, logging) is the Trainer's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from nextquill.data import EncodedExample, ExampleEncoder, PairCollator, PromptTemplate, load_records
from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.integrations import checkpoints
from nextquill.integrations.metrics import CounterfactualWatch, TrainingMeter, eval_metrics
from nextquill.integrations.passes import BatchScores, PairPasses
from nextquill.losses import NextQuillLoss, PairLoss

_REFUSED = ("compute_loss_func", "compute_metrics", "data_collator", "preprocess_logits_for_metrics", "model_init")


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
        options: everything else the Trainer takes, but for compute_loss_func, compute_metrics, data_collator,
            preprocess_logits_for_metrics and model_init, which this class fills itself.

    Logged while training, over the interval since the last log and all ranks: loss_factual, loss_effect,
    loss_counterfactual (terms under the loss's reduction), nll_factual, nll_counterfactual, effect_logprob, effect_prob,
    share_above_threshold, token_weight (means over tokens), num_tokens, num_sequences. Evaluation returns eval_loss,
    eval_nll_factual, eval_nll_counterfactual, eval_nll_placebo, eval_effect_logprob, eval_effect_placebo,
    eval_effect_prob, eval_share_above_threshold and eval_num_tokens.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        RecordError, BudgetError: a record is malformed or does not fit; found before training starts.
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
        **options: Any,
    ) -> None:
        for name in _REFUSED:
            if options.get(name) is not None:
                raise ArgumentError(f"{name}: NextQuillTrainer fills this itself; subclass it to change it")
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model: expected a torch module, got {type(model).__name__}")
        if processing_class is None:
            raise ArgumentTypeError("processing_class: expected a tokenizer, got None")
        loss = NextQuillLoss(detach_counterfactual=True) if loss is None else loss
        if not isinstance(loss, PairLoss):
            raise ArgumentTypeError(f"loss: expected a nextquill loss, got {type(loss).__name__}")
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        args.remove_unused_columns = False
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False
        if args.n_gpu > 1:
            raise ArgumentError("args: expected one process per GPU (torchrun or accelerate launch), got DataParallel")
        check_vocabulary(model, processing_class)

        self.passes = PairPasses(model, loss)
        self.loss = self.passes.loss
        length = default_max_length(model) if max_length is None else max_length
        self.encoder = ExampleEncoder(processing_class, template, length, max_response_length)  # type: ignore[arg-type]
        self.meter, self.watch = TrainingMeter(), CounterfactualWatch()
        self._seed = args.seed
        self._disable_tqdm = args.disable_tqdm
        super().__init__(
            model,
            args,
            data_collator=self._collator("factual"),
            train_dataset=self._encoded(train_dataset, placebo=False),
            eval_dataset=(
                {name: self._encoded(part, placebo=True) for name, part in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else self._encoded(eval_dataset, placebo=True)
            ),
            processing_class=processing_class,
            compute_metrics=self._eval_metrics,
            **options,
        )
        self.add_callback(self.watch)
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        self._staging_for: Path | None = None

    # ---- data ----------------------------------------------------------------------------------

    def _collator(self, *branches: str) -> PairCollator:
        tokenizer = self.encoder.renderer.tokenizer
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        return PairCollator(pad, branches)

    def _encoded(self, source: Any, *, placebo: bool) -> EncodedDataset | None:
        if source is None or isinstance(source, EncodedDataset):
            return source
        progress = None if self._disable_tqdm else _progress
        return EncodedDataset(self.encoder.encode_all(load_records(source), placebo, self._seed, progress))

    @contextmanager
    def _collating(self, *branches: str) -> Iterator[None]:
        previous, self.data_collator = self.data_collator, self._collator(*branches)
        try:
            yield
        finally:
            self.data_collator = previous

    def get_train_dataloader(self) -> Any:
        with self._collating("factual", *(["counterfactual"] if self.loss.needs_counterfactual else [])):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, str):
            chosen = self.eval_dataset[eval_dataset]
        else:
            chosen = self.eval_dataset if eval_dataset is None else self._encoded(eval_dataset, placebo=True)
            eval_dataset = None if eval_dataset is None else chosen
        with self._collating("factual", "counterfactual", *(["placebo"] if chosen.has_placebo else [])):
            return super().get_eval_dataloader(eval_dataset)

    # ---- training ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The accumulation window's batches, and what the reduction divides by over all of them and all ranks."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        own = torch.tensor(float(sum(self._items(batch) for batch in batches)), device=device)
        self.meter.add_step()
        return batches, self.accelerator.reduce(own, reduction="sum").clamp(min=1.0)

    def _items(self, batch: Mapping[str, Any]) -> int:
        supervised = batch["factual"]["labels"] != -100
        if self.loss.reduction == "sequence":
            return int(supervised.any(-1).sum())
        return int(supervised.sum()) if self.loss.reduction == "token" else 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, output = self.passes.training_loss(inputs, num_items_in_batch, model)
        self.meter.add(output)
        # Data-parallel engines average gradients over ranks; the sum over ranks is what was normalised.
        loss = loss * self.accelerator.num_processes
        return (loss, {"logits": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.model.training:
            reduce = lambda sums: self.accelerator.reduce(sums, reduction="sum")  # noqa: E731
            logs |= self.meter.read(reduce, self.args.device)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        folder, identity = Path(self.args.output_dir), checkpoints.run_identity(self.model, self.loss)
        if self.args.should_save:
            checkpoints.remove_staging(folder)
        if resume_from_checkpoint:
            own = isinstance(resume_from_checkpoint, bool)
            checkpoints.check_identity(folder if own else Path(str(resume_from_checkpoint)).parent, identity)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.write_text(folder / checkpoints.RUN_FILE, json.dumps(identity, indent=2) + "\n")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ---- evaluation ----------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """One row of `EVAL_COLUMNS` per example; the Trainer gathers them and drops what ranks saw twice."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            scores = self.passes.scores(inputs, model)
        table = example_table(scores, inputs["factual"]["labels"].shape[0], self.loss)
        return None, table, inputs["example_index"]

    def _eval_metrics(self, prediction: Any) -> dict[str, float]:
        table = torch.from_numpy(prediction.predictions)
        return eval_metrics(table, token_mean_loss=self.loss.reduction == "token")

    # ---- checkpoints ---------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._staging_for is None else str(self._staging_for / checkpoints.STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but written under another name and renamed when complete."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging_for = run_dir
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged = run_dir / checkpoints.STAGING / name
                self._point_at_best(run_dir, name, staged)
                checkpoints.move_into_place(staged, run_dir / name)
        finally:
            self._staging_for = None
            if self.args.should_save:
                checkpoints.remove_staging(run_dir)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _point_at_best(self, run_dir: Path, name: str, staged: Path) -> None:
        """Name the best checkpoint by its final path, in the state and in the file just written."""
        best = self.state.best_global_step
        if not best or self.args.metric_for_best_model is None:
            return
        path = run_dir / f"checkpoint-{best}"
        if path.name == name or path.exists():
            self.state.best_model_checkpoint = str(path)
            self.state.save_to_json(os.path.join(staged, "trainer_state.json"))


def default_max_length(model: nn.Module) -> int:
    """2048 tokens, or the model's own limit if that is less."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(2048, limit) if isinstance(limit, int) and limit > 0 else 2048


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ArgumentError where the tokenizer can produce ids the model has no embedding for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    size = getattr(getattr(embedding, "weight", None), "shape", [0])[0]
    if size and len(tokenizer) > size:
        raise ArgumentError(
            f"processing_class: its {len(tokenizer)} tokens exceed the model's {size} embeddings; "
            "resize the model's embeddings or use its own tokenizer"
        )


def example_table(scores: BatchScores, num_examples: int, loss: PairLoss) -> Tensor:
    """Per-example means over tokens, [num_examples, EVAL_COLUMNS]; float32."""
    output, ids = scores.output, scores.sequence_ids
    pair = output.pair_nll
    assert pair.counterfactual is not None

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(num_examples).index_add(0, ids, values)

    count = sums(torch.ones_like(pair.factual))
    placebo = torch.full_like(pair.factual, torch.nan) if scores.placebo_nll is None else scores.placebo_nll
    means = [
        sums(values) / count.clamp(min=1.0)
        for values in (
            pair.factual,
            pair.counterfactual,
            placebo,
            pair.effect_prob,
            (pair.effect_prob > loss.threshold).to(pair.factual.dtype),
        )
    ]
    objective = sums(output.token_loss)
    if loss.reduction == "token":
        objective = objective / count.clamp(min=1.0)
    return torch.stack([objective, *means, count], dim=1).float()


def _progress(iterable: Iterable[Any], total: int, desc: str) -> Iterable[Any]:
    from tqdm.auto import tqdm

    return tqdm(iterable, total=total, desc=desc)
