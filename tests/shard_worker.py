"""The processes of `test_vocabulary_shard.py`, which divide a vocabulary; each runs all cases and writes what it found.

A case runs once with the whole head in float64, on each process alone, and once on all processes together. Then come
calls that must be refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import nextquill as nq
from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.ops import chunks, shard_exchange
from tests.helpers import HeadCase, make_case, relative_error

N, D = 23, 19
IDS = (torch.arange(N) // 6) % 3
CHUNK_BYTES = 2000
LOSSES: dict[str, Callable[..., nq.PairLoss]] = {
    "official": lambda **o: nq.NextQuillLoss(anchor=0.1, **o),
    "detached": lambda **o: nq.NextQuillLoss(detach_counterfactual=True, **o),
    "anchored": lambda **o: nq.PairLoss(lambda pair: pair.factual, anchor=0.2, **o),
    "perce": nq.PerCELoss,
    "user": lambda **o: nq.PairLoss(lambda pair: pair.factual / pair.factual.max(), alpha=0.3, **o),
    "mirror": nq.MirrorLoss,
}


@dataclass(frozen=True)
class Case:
    """A computation and the sizes of the parts, by the number of processes."""

    run: Callable[[HeadCase, Any, Tensor | None], dict[str, Tensor]]
    sizes: dict[int, Sequence[int]]
    dtype: torch.dtype = torch.float64
    bias: bool = True
    labels: Callable[[Tensor], Tensor] = lambda labels: labels
    weight: str = "part"


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


def pair_jsd(case: HeadCase, weight: Any, bias: Tensor | None, **options: Any) -> dict[str, Tensor]:
    jsd = nq.linear_pair_jsd(case.factual, case.counterfactual, weight, case.labels, bias=bias, **options)
    (jsd * torch.arange(1, N + 1)).sum().backward()
    return {"jsd": jsd}


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
    "pair-chunks-cap": Case(lambda *a: pair_nll(*a, chunk_bytes=CHUNK_BYTES, **_CAPPED), _UNEVEN),
    "pair-float32": Case(pair_nll, _EVEN, torch.float32),
    "stats": Case(pair_stats, _UNEVEN),
    "stats-cap": Case(lambda *a: pair_stats(*a, **_CAPPED), _UNEVEN),
    "stats-float32": Case(pair_stats, _UNEVEN, torch.float32),
    **{f"jsd-beta-{beta}": Case(partial(pair_jsd, beta=beta), _UNEVEN) for beta in (0, 0.3, 1)},
    "jsd-chunks-cap": Case(partial(pair_jsd, chunk_bytes=CHUNK_BYTES, **_CAPPED), _UNEVEN),
    "jsd-float32": Case(pair_jsd, _UNEVEN, torch.float32),
    "jsd-float32-torch": Case(partial(pair_jsd, impl="torch"), _EVEN, torch.float32),
    "mirror-float32": Case(loss_of("mirror"), _UNEVEN, torch.float32),
    "masked": Case(masked, _UNEVEN, labels=lambda y: torch.where(y < 0, y, y.clamp(min=5))),
    "far": Case(far, _UNEVEN),
    "compiled": Case(compiled, _UNEVEN),
    "dtensor": Case(loss_of("official"), {2: (19, 18), 4: (10, 10, 10, 7)}, weight="dtensor"),
    "dtensor-replicated": Case(loss_of("official"), _UNEVEN, weight="replicated"),
}


@dataclass
class Watched:
    """What a call exchanged and held: exchanges of statistics, sums of dh, and the columns of its largest buffer."""

    gathers: int = 0
    sums: int = 0
    columns: int = 0


@contextmanager
def watched() -> Iterator[Watched]:
    seen, opened = Watched(), shard_exchange.OpenShard
    combine, share, add = opened.combine_, opened.add_shares_, opened.sum_
    fill = chunks.LogitsBuffer.fill

    def gathering(self: Any, *args: Any) -> None:
        seen.gathers += 1
        combine(self, *args)

    def sharing(self: Any, tensor: Tensor) -> None:
        seen.gathers += 1
        share(self, tensor)

    def adding(self: Any, tensor: Tensor) -> Any:
        seen.sums += 1
        return add(self, tensor)

    def filling(self: Any, *args: Any) -> Any:
        seen.columns = max(seen.columns, self._memory.shape[1])
        return fill(self, *args)

    opened.combine_, opened.add_shares_, opened.sum_ = gathering, sharing, adding
    chunks.LogitsBuffer.fill = filling
    try:
        yield seen
    finally:
        opened.combine_, opened.add_shares_, opened.sum_ = combine, share, add
        chunks.LogitsBuffer.fill = fill


def own_tokens(sizes: Sequence[int]) -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def divided(case: HeadCase, sizes: Sequence[int], kind: str) -> tuple[Any, Any, Tensor | None]:
    """What a call gets as weight, and the leaves that get the gradients of weight and bias."""
    given = (case.weight.detach(), None if case.bias is None else case.bias.detach())
    if kind == "part":
        own = own_tokens(sizes)
        part, bias = (None if each is None else each[own].clone().requires_grad_() for each in given)
        return nq.VocabularyShard(part, own.start, sum(sizes)), part, bias
    mesh = init_device_mesh("cpu", (len(sizes),))
    placement = [Shard(0) if kind == "dtensor" else Replicate()]
    weight, bias = (
        None if each is None else distribute_tensor(each, mesh, placement).requires_grad_() for each in given
    )
    return weight, weight, bias


def check(case: Case) -> dict[str, Any]:
    """The error of each value and gradient, relative to the largest of its kind, and what the call exchanged."""
    sizes = case.sizes[dist.get_world_size()]
    made = make_case(N, D, sum(sizes), dtype=case.dtype, bias=case.bias)
    made = replace(made, labels=case.labels(made.labels))
    truth, own = made.double(), made.leaves("factual", "counterfactual")
    expected = case.run(truth, truth.weight, truth.bias)
    weight, leaf, bias = divided(own, sizes, case.weight)
    with watched() as seen:
        got = case.run(own, weight, bias)
    errors = {key: relative_error(value, expected[key]) for key, value in got.items()}
    columns = slice(None) if case.weight == "replicated" else own_tokens(sizes)
    for key, actual, wanted, rows in (
        ("dh1", own.factual.grad, truth.factual.grad, slice(None)),
        ("dh0", own.counterfactual.grad, truth.counterfactual.grad, slice(None)),
        ("dW", leaf.grad, truth.weight.grad, columns),
        ("db", None if bias is None else bias.grad, None if truth.bias is None else truth.bias.grad, columns),
    ):
        assert (actual is None) == (wanted is None), key
        if actual is not None and wanted is not None:
            errors[key] = relative_error(actual.to_local() if isinstance(actual, DTensor) else actual, wanted[rows])
    return {"errors": errors, "own": columns.stop and columns.stop - columns.start, **asdict(seen)}


def pieces_have_the_bits_of_the_whole() -> bool:
    """Whether statistics that are exchanged in pieces, and dh, have the same bits as those exchanged at once."""
    sizes, labels = (5, 9, 3, 1)[: dist.get_world_size()], torch.arange(N) % 4
    own = own_tokens(sizes)
    shard = shard_exchange.OpenShard(dist.group.WORLD, tuple(accumulate((0, *sizes[:-1]))), own.start, 0, 0, sum(sizes))
    found = torch.randn(11, N, generator=torch.Generator().manual_seed(dist.get_rank())).abs()
    whole, pieces = found.clone(), found.clone()
    shard.combine_(whole, labels)
    for rows in torch.arange(N).split(5):
        piece = pieces[:, rows]
        shard.combine_(piece, labels[rows])
        pieces[:, rows] = piece
    return torch.equal(whole, pieces) and not torch.equal(whole, found)


# ---- calls that are refused ------------------------------------------------------------------------


def call(
    sizes: Sequence[int], *, vocabulary: int | None = None, gap: int = 0, shift: int = 0, **options: Any
) -> Tensor:
    """A loss of processes with parts of these sizes; rank 1 differs as asked."""
    rank, case = dist.get_rank(), make_case(N, D, 40)
    own = own_tokens(sizes)
    start = own.start + gap * rank
    part = nq.VocabularyShard(case.weight[own], start, vocabulary or sum(sizes), options.get("group"))
    rows, labels = slice(0, N - (shift if rank else 0)), case.labels.clamp(max=5)
    hidden = case.factual + options.get("noise", 0.0) * rank * case.counterfactual
    if rank:
        labels = torch.where(torch.arange(N) == options.get("other_label", -1), 6, labels)
    return nq.SFTLoss()(hidden[rows], None, part, labels[rows], options.get("bias"))


def columnwise() -> Tensor:
    case, mesh = make_case(N, D, 40), init_device_mesh("cpu", (dist.get_world_size(),))
    return nq.SFTLoss()(case.factual, None, distribute_tensor(case.weight, mesh, [Shard(1)]), case.labels)


def labels_that_differ_later() -> Tensor:
    """The first call is compared; in a later one the row of another label has no nll on any process."""
    call((13, 17))
    case, own = make_case(N, D, 40), own_tokens((13, 17))
    part = nq.VocabularyShard(case.weight[own], own.start, 30)
    labels = case.labels.clamp(max=5)
    labels[3] = dist.get_rank()
    nll = nq.linear_token_nll(case.factual, part, labels)
    assert nll.isnan().nonzero().tolist() == [[3]]
    raise ArgumentError("later labels: NaN")


REFUSED: dict[str, Callable[[], Any]] = {
    "total": lambda: call((10, 11), vocabulary=21 + dist.get_rank()),
    "more-than-total": lambda: call((10, 11), vocabulary=20),
    "gap": lambda: call((10, 12), gap=1),
    "empty": lambda: call((10, 0)),
    "rows": lambda: call((10, 13), shift=1),
    "labels": lambda: call((10, 14), other_label=4),
    "hidden": lambda: call((10, 15), noise=0.5),
    "alone": lambda: call((10, 16), group=dist.new_subgroups(1)[0]),
    "whole-bias": lambda: call((10, 17), bias=torch.zeros(27)),
    "start": lambda: call((10, 17), gap=0.5),
    "columns": columnwise,
    "later-labels": labels_that_differ_later,
}


def message_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ArgumentError, ArgumentTypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def work(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[name] = check(case)
        Path(folder, f"found-{rank}.json").write_text(json.dumps(found))
    Path(folder, f"pieces-{rank}.json").write_text(json.dumps(pieces_have_the_bits_of_the_whole()))
    if processes == 2:
        messages = {name: message_of(function) for name, function in REFUSED.items()}
        Path(folder, f"refused-{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()
