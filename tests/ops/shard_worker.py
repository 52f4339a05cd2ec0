"""The processes of `test_vocabulary_shard.py`, which divide a vocabulary; each runs every case and writes its errors.

A case runs once with the whole head in float64, on each process alone, and once on all processes together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import nextquill as nq
from nextquill.ops import chunks, vocabulary_shard
from tests.helpers import HeadCase, make_case, relative_error

N, D = 23, 19
IDS = (torch.arange(N) // 6) % 3
CHUNK_BYTES = 5 * 160 * 8
LOSSES: dict[str, Callable[..., nq.PairLoss]] = {
    "official": lambda **o: nq.NextQuillLoss(anchor=0.1, **o),
    "detached": lambda **o: nq.NextQuillLoss(detach_counterfactual=True, **o),
    "anchored": lambda **o: nq.PairLoss(lambda pair: pair.factual, anchor=0.2, **o),
    "perce": nq.PerCELoss,
    "user": lambda **o: nq.PairLoss(lambda pair: pair.factual / pair.factual.max(), alpha=0.3, **o),
}


@dataclass(frozen=True)
class Case:
    """A computation and the sizes of the parts, by the number of processes."""

    run: Callable[[HeadCase, Any, Tensor | None], dict[str, Tensor]]
    sizes: dict[int, Sequence[int]]
    dtype: torch.dtype = torch.float64
    bias: bool = True
    labels: Callable[[Tensor], Tensor] = lambda labels: labels
    weight: str = "shard"


def loss_of(name: str, **options: Any) -> Callable[..., dict[str, Tensor]]:
    def run(case: HeadCase, weight: Any, bias: Tensor | None) -> dict[str, Tensor]:
        loss = LOSSES[name](**options)
        output = loss.compute(case.factual, case.counterfactual, weight, case.labels, bias, IDS)
        (3 * output.loss).backward()
        found = {"loss": output.loss, "weights": output.token_weights, **output.pair_nll._asdict()}
        return {key: value for key, value in found.items() if value is not None}

    return run


def sft(case: HeadCase, weight: Any, bias: Tensor | None) -> dict[str, Tensor]:
    loss = nq.SFTLoss()(case.factual, None, weight, case.labels, bias, IDS)
    loss.backward()
    return {"loss": loss}


def token_nll(case: HeadCase, weight: Any, bias: Tensor | None, **options: Any) -> dict[str, Tensor]:
    nll = nq.linear_token_nll(case.factual, weight, case.labels, bias=bias, **options)
    (nll * torch.arange(1, N + 1)).sum().backward()
    return {"nll": nll}


def pair_nll(case: HeadCase, weight: Any, bias: Tensor | None, **options: Any) -> dict[str, Tensor]:
    pair = nq.linear_pair_nll(case.factual, case.counterfactual, weight, case.labels, bias=bias, **options)
    (pair.factual * torch.arange(N) - 2 * pair.counterfactual + pair.effect.square()).sum().backward()
    return pair._asdict()


def pair_stats(case: HeadCase, weight: Any, bias: Tensor | None, **options: Any) -> dict[str, Tensor]:
    stats = nq.linear_pair_stats(case.factual, case.counterfactual, weight, case.labels, bias=bias, **options)
    return {"kl": stats.kl, "entropy": stats.entropy, **stats.pair_nll._asdict()}


def compiled(case: HeadCase, weight: Any, bias: Tensor | None) -> dict[str, Tensor]:
    part, loss_fn = getattr(weight, "weight", weight), nq.NextQuillLoss()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(h1: Tensor, h0: Tensor, own: Tensor, y: Tensor) -> Tensor:
        given = weight.with_weight(own) if part is not weight else own
        return loss_fn(h1, h0, given, y, bias)

    value = loss(case.factual, case.counterfactual, part, case.labels)
    value.backward()
    return {"loss": value}


def masked(case: HeadCase, weight: Any, bias: Tensor | None) -> dict[str, Tensor]:
    """All columns of the first part but one are masked: its share of every sum is 0."""
    assert bias is not None
    start = weight.start if isinstance(weight, nq.VocabularyShard) else 0
    columns = torch.arange(start, start + len(bias))
    return token_nll(case, weight, bias.masked_fill(columns < 3, -torch.inf))


def far(case: HeadCase, weight: Any, bias: Tensor | None) -> dict[str, Tensor]:
    """The parts' largest logits are far apart, so that their ratio overflows in any dtype."""
    assert bias is not None
    start = weight.start if isinstance(weight, nq.VocabularyShard) else 0
    columns = torch.arange(start, start + len(bias))
    return token_nll(case, weight, bias + 2000.0 * (columns < 3))


_UNEVEN, _EVEN = {2: (3, 34), 4: (3, 1, 16, 17)}, {2: (16, 16), 4: (8, 8, 8, 8)}
_CAPPED = {"softcap": 3.0, "logit_scale": -0.7}
CASES = {
    **{f"{name}-uneven": Case(loss_of(name), _UNEVEN) for name in LOSSES},
    **{f"{name}-chunks": Case(loss_of(name, chunk_bytes=CHUNK_BYTES), _UNEVEN) for name in LOSSES},
    "official-even-cap": Case(loss_of("official", **_CAPPED), _EVEN),
    "official-token": Case(loss_of("official", reduction="token", **_CAPPED), _UNEVEN, bias=False),
    "official-float32": Case(loss_of("official"), _UNEVEN, torch.float32),
    "official-float32-torch": Case(loss_of("official", impl="torch", **_CAPPED), _UNEVEN, torch.float32),
    "perce-float32": Case(loss_of("perce", chunk_bytes=CHUNK_BYTES), _EVEN, torch.float32),
    "no-label-in-first": Case(loss_of("official"), _UNEVEN, labels=lambda y: torch.where(y < 0, y, y.clamp(min=5))),
    "no-label-at-all": Case(loss_of("official"), _UNEVEN, labels=lambda y: torch.full_like(y, -100)),
    "sft": Case(sft, _UNEVEN),
    "token": Case(token_nll, _UNEVEN),
    "token-float32": Case(token_nll, _UNEVEN, torch.float32),
    "pair": Case(pair_nll, _UNEVEN),
    "pair-chunks-cap": Case(
        lambda *a: pair_nll(*a, chunk_bytes=CHUNK_BYTES, **_CAPPED), _UNEVEN
    ),
    "pair-float32": Case(pair_nll, _EVEN, torch.float32),
    "stats": Case(pair_stats, _UNEVEN),
    "stats-cap": Case(lambda *a: pair_stats(*a, **_CAPPED), _UNEVEN),
    "stats-float32": Case(pair_stats, _UNEVEN, torch.float32),
    "masked": Case(masked, _UNEVEN, labels=lambda y: torch.where(y < 0, y, y.clamp(min=5))),
    "far": Case(far, _UNEVEN),
    "compiled": Case(compiled, _UNEVEN),
    "dtensor": Case(loss_of("official"), {2: (19, 18), 4: (10, 10, 10, 7)}, weight="dtensor"),
    "dtensor-replicated": Case(loss_of("official"), _UNEVEN, weight="replicated"),
}


def check(case: Case) -> dict[str, float]:
    """The error of each value and gradient, relative to the largest of its kind."""
    sizes = case.sizes[dist.get_world_size()]
    whole = make_case(N, D, sum(sizes), dtype=case.dtype, bias=case.bias)
    whole = replace(whole, labels=case.labels(whole.labels))
    truth, own = whole.double(), whole.leaves()
    expected = case.run(truth, truth.weight, truth.bias)
    rank = dist.get_rank()
    start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
    if case.weight == "shard":
        part = own.weight.detach()[start:stop].requires_grad_()
        bias = None if own.bias is None else own.bias.detach()[start:stop].requires_grad_()
        got = case.run(own, nq.VocabularyShard(part, start, sum(sizes)), bias)
    else:
        mesh = init_device_mesh("cpu", (len(sizes),))
        placement = [Shard(0) if case.weight == "dtensor" else Replicate()]
        part, bias = (
            None if tensor is None else distribute_tensor(tensor.detach(), mesh, placement).requires_grad_()
            for tensor in (own.weight, own.bias)
        )
        got = case.run(own, part, bias)
        if case.weight == "replicated":
            start, stop = 0, sum(sizes)
    errors = {key: relative_error(value, expected[key]) for key, value in got.items()}
    pairs = {
        "dh1": (own.factual.grad, truth.factual.grad),
        "dh0": (own.counterfactual.grad, truth.counterfactual.grad),
        "dW": (_local(part.grad), None if truth.weight.grad is None else truth.weight.grad[start:stop]),
    }
    if bias is not None:
        pairs["db"] = (_local(bias.grad), None if truth.bias.grad is None else truth.bias.grad[start:stop])
    for key, (actual, wanted) in pairs.items():
        assert (actual is None) == (wanted is None), f"{key}: {actual is None}"
        if actual is not None and wanted is not None:
            errors[key] = relative_error(actual, wanted)
    return errors


def _local(gradient: Any) -> Any:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def work(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    errors = {}
    for name, case in CASES.items():
        errors[name] = check(case)
        Path(folder, f"errors-{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()
