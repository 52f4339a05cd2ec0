"""One of the processes of `test_distributed.py`: `distributed_worker.py FOLDER`, under torchrun."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import nextquill as nq
from nextquill.data import Branch, EncodedExample
from nextquill.data.examples import Anchor
from nextquill.mirror import MirrorTrainer
from nextquill.models.branch_passes import PairPasses
from tests.mirror.mirror_helpers import make_trainer
from tests.models.model_helpers import make_records, shared_examples, tiny_model
from tests.sharding import CHECKPOINTING
from tests.training.distributed_worker import by_layer

TIMEOUT = float(os.environ.get("NEXTQUILL_TEST_TIMEOUT", "150"))


def train(folder: Path, processes: int) -> MirrorTrainer:
    """Train three steps of eight examples with two rollouts each; two processes run layers again in the backward."""
    size, accumulation = (8, 1) if processes == 1 else (2, 2)
    trainer = make_trainer(
        folder, tiny_model().double(), make_records(16), loss=nq.MirrorLoss(alpha=0.5), num_rollouts=2, max_steps=3,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.3,
        save_strategy="steps", save_steps=2, ddp_timeout=60, **{CHECKPOINTING: processes > 1},
    )  # fmt: skip
    trainer.train()
    return trainer


def anchored_examples() -> list[EncodedExample]:
    """Five examples with an anchor each; the second has no token that counts."""
    found = []
    for example in shared_examples(5):
        labels = [-100 if example.index == 1 or place % 2 else 7 + place for place in range(4)]
        branch = Branch(example.factual.prompt_ids, [7, 8, 9, 10])
        anchor = Anchor(branch, Branch([0], labels).to_arrays()[1])
        teacher = Branch([*example.counterfactual.prompt_ids, 5], example.factual.response_ids)
        found.append(EncodedExample(example.user_id, example.index, example.factual, teacher, None, 1, 1, None, anchor))
    return found


def gradients(*, sharded: bool) -> dict[str, Tensor]:
    """Gradients of all examples on one process, or of this process's share under FSDP2."""
    loss = nq.MirrorLoss(alpha=0.5)
    loss.term_means, loss.num_anchors = (0.1, 4.0), 4.0
    model, examples = tiny_model(dtype=torch.float64).train(), anchored_examples()
    with PairPasses(model, loss) as passes:
        collate = passes.collator(max_tokens=60)
        own = examples[:4] if dist.get_rank() == 0 else examples[4:]
        batch = collate(own if sharded else examples)
        items = 5 / dist.get_world_size() if sharded else 5
        if sharded:
            loss_of_all = passes.loss
            loss_of_all.num_anchors = 4.0 / dist.get_world_size()
        passes.backward(batch, items, by_layer(model) if sharded else None)
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        assert isinstance(gradient, DTensor) is sharded
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def main() -> None:
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    trainer = train(folder, processes=2)
    result = {
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
        "means": trainer.term_means.sums,
        "sharded": gradients(sharded=True),
        "expected": gradients(sharded=False),
    }
    torch.save(result, folder / f"result_{rank}.pt")
    trainer.model_wrapped = trainer.model  # DDP must not outlive its process group
    del trainer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
