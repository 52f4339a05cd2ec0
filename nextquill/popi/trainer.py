"""`POPITrainer`: transformers' Trainer for a model that infers summaries and a generator that conditions on them.

An item of a data set is a user, and a batch is some users. For every optimizer step all summaries are sampled and
scored at once (`steps`). This gives weighted branches: responses of pairs for the generator, summaries for the
inference model. Each micro-batch then runs its users' branches with gradient, merged into trees, one role after the
other. The loss is divided by the number of users of the whole step, over all micro-batches and ranks. Gradients are
summed over ranks once, at the end of the step. Optimizers, schedules, logging, checkpoints and callbacks are the
Trainer's.

Draws and samples depend on the seed, the step and the user alone, so a resumed run samples the same summaries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, save_fsdp_optimizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from nextquill.devices import send
from nextquill.errors import ArgumentError, ArgumentTypeError, CheckpointError, naming
from nextquill.generation.rollouts import ModelRollouts, Rollouts, VLLMRollouts
from nextquill.models.sharded import shard_each
from nextquill.popi.config import (
    SAMPLES_FILE,
    POPIConfig,
    check_args,
    check_batches,
    check_engine,
    check_warm_start,
    make_roles,
    usable_users,
    within_context,
)
from nextquill.popi.evaluation import score_pairs
from nextquill.popi.model_card import popi_card
from nextquill.popi.passes import BranchPasses, RolePasses
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import Role, check_roles
from nextquill.popi.steps import METRICS, StepMaker, UserWork
from nextquill.popi.summaries import hold_out, summarize
from nextquill.popi.users import Draw, User, UserCounts, held_out
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.sample_log import SampleLog
from nextquill.training.atomic_checkpoints import AtomicCheckpoints, run_identity, training_identity
from nextquill.training.checks import check_options
from nextquill.training.finite import FiniteSteps
from nextquill.training.model_card import CARD_FILE
from nextquill.training.sharded_state import TRAINED_WEIGHTS, load_trained, save_trained


class POPITrainer(FiniteSteps, AtomicCheckpoints, Trainer):
    """Train summaries of users, and a generator that conditions on them, under one preference objective.

    Args:
        model: the base model, which gets a LoRA adapter for each role; or a PEFT model with the adapters "inference"
            and "generator". None if the roles are separate models.
        args: TrainingArguments; batch sizes are in users.
        config: see `POPIConfig`.
        train_dataset, eval_dataset: users, or records with `chosen` and `rejected` (`users_from_records`). Users
            without pairs or with too few signals are left out with a warning; see `train_users` and `eval_users`.
        processing_class: the tokenizer.
        inference_model, generator_model: separate models, given together.
        generator_tokenizer: the generator's tokenizer, if it has its own.
        peft_config: the LoRA config of the adapters, without dropout; see `Roles.shared`.
        templates: the wording of the prompts.
        rollouts: samples the summaries, such as `RecordedRollouts`; by default as `config.rollouts` says.
        attention: the attention over trees; see `PairPasses`.
        max_tokens: the most tokens of a forward, after sharing; by default 16384 (4096 on a CPU), or the tokens of the
            largest branch. It does not change gradients.
        options: all other options of the Trainer, except those that this class sets itself.

    Training logs means per pair or per summary, over all ranks and the interval since the last log: preference_loss,
    preference_margin (nats), preference_accuracy, informativeness and generator_error (the two parts of the loss, nats
    per pair, see `objective`), reward, reward_std (within groups), kl (nats) and summary_tokens. Logged as shares:
    summaries_empty, summaries_unfinished, summaries_too_long (the generator then reads none), prompts_without_signals
    and groups_equal. reward_nan is the number per step. tokens_per_second counts the branches with gradient in separate
    rows, over the time of sampling and scoring too. Every sampled summary is appended to `sampled_summaries.jsonl` in
    the run's folder.

    FSDP2 shards the model of each role by itself, with its initial state; a checkpoint then holds the trained weights
    of both once more, in one file, from which a run resumes exactly.

    Evaluation summarises every user greedily. It returns accuracy, margin and loss of held-out pairs with the summary,
    without one and with another user's. Each process evaluates all users, `rollout_batch_size` of them at a time.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        RecordError: no user can be drawn from.
        BudgetError: a pair or a signal does not fit its budget.
        UnsupportedModelError: a model's head or attention cannot be handled exactly.
    """

    _sample_log: SampleLog

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        config: POPIConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        inference_model: Any = None,
        generator_model: Any = None,
        generator_tokenizer: Any = None,
        peft_config: Any = None,
        templates: PopiTemplates | None = None,
        rollouts: Rollouts | None = None,
        attention: str = "auto",
        max_tokens: int | None = None,
        **options: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        config = POPIConfig() if config is None else config
        check_options(options, "POPITrainer")
        check_args(args)
        if processing_class is None:
            raise ArgumentTypeError("processing_class: expected a tokenizer, got None")
        roles = make_roles(
            config, model, inference_model, generator_model, processing_class, generator_tokenizer, peft_config
        )
        self.config = within_context(config, roles)
        self.templates = PopiTemplates() if templates is None else templates
        self.inference_prompts = InferencePrompts(
            roles.inference.tokenizer, self.templates, max_prompt_tokens=self.config.max_signal_tokens
        )
        self.generator_prompts = GeneratorPrompts(
            roles.generator.tokenizer, self.templates, max_length=self.config.max_length
        )
        self.train_users = self._users("train_dataset", train_dataset)
        self.eval_users = self._users("eval_dataset", eval_dataset)
        self._eval_draws = () if self.eval_users is None else self._held_out(self.eval_users)
        check_warm_start(self.config, self.train_users, self.inference_prompts)
        args.remove_unused_columns = False
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False
        self._forwards: dict[str, Any] = {"attention": attention, "max_tokens": max_tokens}
        self.passes = RolePasses(**self._forwards, temperature=self.config.temperature)
        for role in roles:
            with role.active() as active:
                longest = max(self.config.max_length, self.config.max_signal_tokens + self.config.max_summary_tokens)
                self.passes.of(role, active).check_training(longest)
            with role.initial() as initial:  # before it is sharded
                self.passes.of(role, initial)
        self.passes.close()
        self.roles = roles
        super().__init__(
            roles,
            args,
            data_collator=_collate,
            train_dataset=_places(self.train_users),
            eval_dataset=_places(self.eval_users),
            processing_class=processing_class,
            **options,
        )
        check_engine(self)
        if self.is_fsdp_enabled:
            shard_each(self.accelerator.state.fsdp_plugin, roles.models)
        # accelerate puts its autocast around a forward that is not called here.
        self._half = self.accelerator.mixed_precision == "bf16"
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.rollouts = self._make_rollouts() if rollouts is None else rollouts
        self.steps = StepMaker(
            roles, self.config, self.inference_prompts, self.generator_prompts, self.rollouts, self.passes, args.seed
        )
        self._sample_log = SampleLog(Path(str(args.output_dir)), SAMPLES_FILE, args.process_index, args.world_size)
        self._start_interval()

    # ---- preparation ---------------------------------------------------------------------------------

    def _make_rollouts(self) -> Rollouts:
        role, config = self.roles.inference, self.config
        common = (role.model, role.tokenizer, self.inference_prompts.stop_ids)
        sampling: dict[str, Any] = {"max_new_tokens": config.max_summary_tokens, "temperature": config.temperature}
        if config.rollouts == "vllm":
            return VLLMRollouts(*common, **sampling, max_prompt_tokens=config.max_signal_tokens, adapter=role.adapter)
        return ModelRollouts(*common, **sampling, batch_size=config.rollout_batch_size)

    def _users(self, name: str, given: Any) -> UserCounts | None:
        return usable_users(name, given, self.config, self.generator_prompts)

    def _precision(self) -> AbstractContextManager[Any]:
        """The precision of the arguments, for samples, scores and gradients."""
        return torch.autocast(self.args.device.type, torch.bfloat16) if self._half else nullcontext()

    # ---- training ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, lacks an adapter, or is from another run.
        """
        if self.train_users is None:
            raise ArgumentError("train_dataset: expected users or records, got None")
        check_batches(self.args, len(self.train_users.users))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.passes.close()
            self.rollouts.close()

    def check_resume(self, checkpoint: Path) -> None:
        """Check a checkpoint as the base class does; CheckpointError also if it lacks a role."""
        check_roles(checkpoint)
        if self.is_fsdp_enabled and not (checkpoint / TRAINED_WEIGHTS).is_file():
            raise CheckpointError(
                f"resume_from_checkpoint: {checkpoint} has no {TRAINED_WEIGHTS}: it was written without FSDP, or with "
                "save_only_model=True; resume it without FSDP, or start a new run from its model"
            )
        super().check_resume(checkpoint)

    def run_identity(self) -> dict[str, Any]:
        """Return everything that must be the same in this run and in a checkpoint that it resumes."""
        users: Any = () if self.train_users is None else self.train_users.users
        models = [run_identity(model, self.config) for model in self.roles.models]
        args = self.args
        return {
            **models[0],
            "models": models,
            "templates": self.templates.to_dict(),
            "users": fingerprint(map(repr, users)),
            "users_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            **training_identity(args, self.roles.models),
        }

    def _starting_point(self) -> tuple[list[str], list[Any]]:
        """The training users, and the models of the roles."""
        users: Any = () if self.train_users is None else self.train_users.users
        return [user.user_id for user in users], list(self.roles.models)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the window's batches with their work, and the number of users of the whole step, a scalar."""
        if self.state.global_step >= self.state.max_steps:  # transformers asks once more when a finished run is resumed
            return [], None
        self._begin_step()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        assert self.train_users is not None
        users = [self.train_users.users[index] for batch in batches for index in batch["users"].tolist()]
        with self._precision():
            step = self.steps.make(users, self.state.global_step)
        self._step_work, work = list(zip(users, step.work, strict=True)), iter(step.work)
        for batch in batches:
            batch["work"] = [next(work) for _ in batch["users"]]
        for name, pair in step.sums.items():
            self._sums[name] += torch.tensor(pair, dtype=torch.float64)
        self._sample_log.append(line for each in step.work for line in each.lines)
        own = send(torch.tensor(float(len(users))), device)
        return batches, self.accelerator.reduce(own, reduction="sum").clamp(min=1.0)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch forward and backward, role by role; return its share of the loss, a float32 scalar."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        work: list[UserWork] = inputs["work"]
        users = float(len(work) if num_items_in_batch is None else num_items_in_batch)
        if self.is_fsdp_enabled:  # without synchronisation it holds gradients unsharded, and drops those of a step
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
        for role in self.roles:
            self._backward(role, work, users)
        if self.accelerator.sync_gradients:
            self._sum_over_ranks()
            self.rollouts.sync()
        ranks = self.accelerator.num_processes
        loss = torch.tensor(sum(each.loss for each in work) * ranks / users)
        return self._watch(send(loss, self.args.device))

    def _suspects(self) -> list[str]:
        """The step's users whose loss is not finite; all of them if there are none."""
        broken = [user for user, work in self._step_work if not math.isfinite(work.loss)]
        return [f"user {user.user_id!r}" for user in broken or [user for user, _ in self._step_work]]

    def _backward(self, role: Role, work: Sequence[UserWork], users: float) -> None:
        branches = [branch for each in work for branch in each.branches.get(role.name, ())]
        weights = [each.weights[role.name] / users for each in work if role.name in each.weights]
        with role.active() as model:
            passes = self.passes.of(role, model)
            for part in self._of_all_ranks(passes, passes.parts(branches, torch.cat(weights) if weights else ())):
                self._sums["sharing_factor"] += torch.tensor([part["num_branch_tokens"], part["num_tokens"]])
                with self._precision():
                    loss = passes.loss(part)
                # FSDP averages gradients over ranks, and here they are a sum.
                self.accelerator.backward(loss * self.accelerator.num_processes if self.is_fsdp_enabled else loss)

    def _of_all_ranks(self, passes: BranchPasses, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts and, where ranks gather weights in each, as many empty ones as make their number the same."""
        if not self.is_fsdp_enabled:
            return parts
        count = torch.tensor([len(parts)], device=self.args.device)
        missing = int(self.accelerator.gather(count).max()) - len(parts)
        return [*parts, *(passes.empty_part() for _ in range(missing))]

    def _sum_over_ranks(self) -> None:
        """Sum gradients over ranks, as they were divided by the users of all ranks. A missing gradient counts as 0."""
        if self.accelerator.num_processes == 1 or self.is_fsdp_enabled:
            return
        trained = [p for role in self.roles for p in role.parameters()]
        has = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=self.args.device)
        has = self.accelerator.reduce(has, reduction="sum")
        used = [p for p, ranks in zip(trained, has.tolist(), strict=True) if ranks]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in dict.fromkeys(p.dtype for p in used):  # in one order on all ranks
            grads = [p.grad for p in used if p.dtype == dtype and p.grad is not None]
            flat = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in grads]), reduction="sum")
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    def compute_loss(self, *_: Any, **__: Any) -> Any:
        """Raise ArgumentError, as a step has two losses; see `training_step`."""
        raise ArgumentError("compute_loss: POPITrainer has a loss for each role; call training_step or evaluate")

    def _interval_metrics(self) -> dict[str, float]:
        packed = torch.stack(list(self._sums.values())).to(self.args.device)
        sums = dict(zip(self._sums, self.accelerator.reduce(packed, reduction="sum").tolist(), strict=True))
        seconds, (branches, computed) = time.perf_counter() - self._since, sums["sharing_factor"]
        found = {name: total / count for name, (total, count) in sums.items() if count}
        return {**found, "num_tokens": computed, "tokens_per_second": branches / max(1e-9, seconds)}

    def _start_interval(self) -> None:
        """Forget the sums and the time since the last log; float64 [2] each, the sum and the count of a logged mean."""
        super()._start_interval()
        self._sums = {name: torch.zeros(2, dtype=torch.float64) for name in (*METRICS, "sharing_factor")}
        self._since = time.perf_counter()

    # ---- evaluation ----------------------------------------------------------------------------------

    def summarize(self, users: Sequence[User], *, temperature: float = 0.0) -> list[str]:
        """Return one summary for each user, from the signals of `held_out`; greedy by default.

        Args:
            users: the users, each once.
            temperature: the sampling temperature; 0 for the most likely tokens.
        """
        draws = [held_out(user, num_signals=self.config.signals_per_user) for user in users]
        texts = self._summaries(draws, temperature)
        return [texts[user.user_id] for user in users]

    def _summaries(self, draws: Sequence[Draw], temperature: float = 0.0) -> dict[str, str]:
        self.passes.close()
        found = summarize(
            self.roles.inference,
            self.inference_prompts,
            {each.user_id: each.signals for each in draws},
            max_new_tokens=self.config.max_summary_tokens,
            temperature=temperature,
            seed=self.args.seed,
            batch_size=self.config.rollout_batch_size,
        )
        return {each.user_id: each.text for each in found}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Judge held-out pairs with a greedy summary, without one, and with another user's.

        Returns:
            PREFIX_accuracy, PREFIX_margin (nats) and PREFIX_loss with the summary; the same with `_none` and
            `_placebo`; PREFIX_summary_tokens; PREFIX_summaries_empty (share).
        """
        counts = None if eval_dataset is None else self._users("eval_dataset", eval_dataset)
        draws = self._eval_draws if counts is None else self._held_out(counts)
        if not draws:
            raise ArgumentError("eval_dataset: expected users or records, got None")
        with self._precision():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(draws).items()}
        self.passes.close()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out(self, counts: UserCounts) -> tuple[Draw, ...]:
        """The same signals and held-out pairs as in `nextquill popi evaluate`."""
        with naming("eval_dataset"):
            return hold_out(counts.users, num_signals=self.config.signals_per_user).draws

    def _measure(self, draws: Sequence[Draw]) -> dict[str, float]:
        texts: dict[str, str] = broadcast_object_list([self._summaries(draws)])[0]  # so that forwards are the same
        self.passes.close()
        scores = score_pairs(
            self.roles.generator,
            self.generator_prompts,
            draws,
            texts,
            loss=self.config.loss,
            reference_sees_context=self.config.reference_sees_summary,
            seed=self.args.seed,
            **self._forwards,
        )
        found = {
            f"{name}{suffix}": fmean(getattr(row, name) for row in scores[context])
            for context, suffix in (("summary", ""), ("none", "_none"), ("placebo", "_placebo"))
            for name in ("accuracy", "margin", "loss")
            if context in scores
        }
        found["summary_tokens"] = fmean(row.context_tokens for row in scores["summary"])
        found["summaries_empty"] = fmean(not text.strip() for text in texts.values())
        return found

    def predict(self, *_: Any, **__: Any) -> Any:
        """Raise ArgumentError; see `summarize` and `evaluate`."""
        raise ArgumentError("predict: POPITrainer has summarize and evaluate instead")

    def evaluation_loop(self, *_: Any, **__: Any) -> EvalLoopOutput:
        """Raise ArgumentError; see `evaluate`."""
        raise ArgumentError("evaluation_loop: POPITrainer has evaluate instead")

    # ---- files ---------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The settings that are saved with the roles: the config and the templates."""
        return {"config": self.config.to_dict(), "templates": self.templates.to_dict()}

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the model card into the output folder; a push to the hub asks for it."""
        write_whole(Path(str(self.args.output_dir)) / CARD_FILE, popi_card(self))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        self.passes.close()
        if not self.args.should_save:  # every rank comes here
            return
        self.roles.save(folder, self.settings(), state_dict)
        write_whole(folder / CARD_FILE, popi_card(self))  # in place of PEFT's, which names local paths
        torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # In place of a file with all weights of both models, frozen ones too.
        folder, plugin = Path(output_dir), self.accelerator.state.fsdp_plugin
        save_trained(self.roles, folder)
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_weights(Path(str(self.state.best_model_checkpoint)))

    def _load_weights(self, checkpoint: Path) -> None:
        if self.is_fsdp_enabled:
            load_trained(self.roles, checkpoint)
        else:
            self.roles.load_weights(checkpoint)


def _places(counts: UserCounts | None) -> Any:
    """A data set of the users' places."""
    return None if counts is None else range(len(counts.users))


def _collate(indices: Sequence[int]) -> dict[str, Any]:
    return {"users": torch.tensor(indices, dtype=torch.long)}
