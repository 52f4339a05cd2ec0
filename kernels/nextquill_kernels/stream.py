"""Label statistics straight from the hidden states: a matrix product that reduces its logits and stores none.

    z1 = cap(scale · (h1 Wᵀ + b))        z0 = cap(scale · (h0 Wᵀ + b))        cap(x) = c·tanh(x/c), or x
    nll_f = lse(z1) − z1[y]              nll_c = lse(z0) − z0[y]              nll_e = lse(z1 − z0) − (z1 − z0)[y]

Three steps, all on the device, without waiting for it:

1. `gather_kernel` packs the supervised rows (label >= 0) of both streams into one buffer, zero-padded to whole tiles.
   Ignored rows are not read, so they may hold anything.
2. `stream_fwd_kernel` multiplies a tile of BLOCK_N packed rows with a tile of BLOCK_V rows of W. The rows of a tile
   are BLOCK_N / 2 tokens of both streams in runs of INTERLEAVE tokens (factual run, counterfactual run, factual run,
   ...), so that one product of an ordinary GEMM size serves both streams with one load of W. For each token and stream
   a program writes the largest logit z_max, the sum of exp(z - z_max), and the label's logit if it is in the tile.
3. `combine_kernel` merges these over the vocabulary in a fixed order and writes the results to their rows.

No atomics: results are bitwise repeatable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nextquill_kernels.crosscompile import SHARED_LIMIT, TARGETS, CompileCase
from nextquill_kernels.launch import (
    INTERPRETED,
    PORTABLE_TARGET,
    cdiv,
    check_together,
    on_device,
    shared_memory_of,
    target_of,
    warn_portable,
)
from nextquill_kernels.stream_kernel import combine_kernel, gather_kernel, stream_fwd_kernel
from nextquill_kernels.tiles import FAMILIES, PORTABLE, Tile, entries, lookup

# Rows per pass: bounds the packed copy (2 x 8192 x D) and the partial results, whatever N is.
_MAX_TOKENS = 8192
_MAX_PARTIAL_BYTES = 2**28
_GATHER_ROWS = 8
_GATHER_D = 512
_COMBINE_TILES = 32
_COMBINE_ROWS = 16  # at 32, sm_80 spills 12 bytes with triton 3.6

# For a W without aligned rows. They are loaded 2 or 4 bytes at a time through registers, of which a full-sized tile has
# none left.
UNALIGNED = Tile(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=3, group_n=16, interleave=8)

TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def label_stats(
    hiddens: tuple[Tensor, ...],
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    tile: Tile | None = None,
) -> Tensor:
    """Compute lse(z) and the label's lse(z) - z[y] for each z: z1, or z1, z0 and z1 - z0; no logits are stored.

    Args:
        hiddens: one or two streams of hidden states, h1 and h0 [N, D], bfloat16, float16 or float32, any strides.
        weight: [V, D], same dtype. Any row stride; copied if its last stride is not 1.
        labels: [N], int64. A row with a negative label is ignored: its results are 0 and it is not read. A label of V
            or more makes the row's nll NaN.
        bias: [V], any float dtype.
        softcap: c > 0 of cap(x) = c·tanh(x/c), or None.
        logit_scale: the scale, finite; it may be negative.
        tile: tile sizes; by default those of the table for this GPU.

    Returns:
        [2, N] or [6, N] float32, in nats: the logsumexps, then the NLLs. Not finite if a logit of the row is not.

    Raises:
        TypeError, ValueError: a dtype, shape or value other than the above.
        RuntimeError: no kernel can run on the tensors' device.
    """
    _check(hiddens, weight, labels, bias, softcap, logit_scale)
    streams, tokens = len(hiddens), labels.shape[0]
    vocabulary, dim = weight.shape
    if weight.stride(1) != 1 and dim > 1:
        weight = weight.contiguous()
    if tile is None:
        tile = _tile_for(weight, streams)
    bias = bias if bias is None else bias.contiguous()
    out = torch.empty(4 * streams - 2, tokens, dtype=torch.float32, device=weight.device)
    if not tokens:
        return out

    block_t = tile.block_n // streams
    tiles_v = cdiv(vocabulary, tile.block_v)
    per_token = 4 * (4 * streams - 2) * tiles_v
    affordable = max(1, min(_MAX_TOKENS, _MAX_PARTIAL_BYTES // per_token) // block_t)
    slots = min(affordable, cdiv(tokens, block_t)) * block_t
    packed_width = cdiv(dim, tile.block_d) * tile.block_d
    packed = weight.new_empty(streams * slots, packed_width)
    packed_labels = torch.empty(slots, dtype=torch.int32, device=weight.device)
    partials = out.new_empty(tiles_v, 4 * streams - 2, slots)
    runs = _runs(tile, streams)
    descriptors = tile.descriptors and _describable(weight)
    operands: tuple[Any, Any] = (packed, weight)
    if descriptors:
        operands = (
            TensorDescriptor.from_tensor(packed, [tile.block_n // runs, tile.block_d]),
            TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_d]),
        )
    # Supervised rows first, in their order; none of this waits for the device.
    ignored = labels < 0
    order = torch.argsort(ignored.to(torch.uint8), stable=True)
    count = tokens - ignored.sum()
    first, last = hiddens[0], hiddens[-1]
    with on_device(weight):
        for first_token in range(0, tokens, slots):
            at_label = out.new_full((streams, slots), float("nan"))
            gather_kernel[(cdiv(slots, _GATHER_ROWS), cdiv(packed_width, _GATHER_D))](
                first, last, order, count, labels, packed, packed_labels,
                first_token, *first.stride(), *last.stride(), labels.stride(0), dim, vocabulary, packed_width,
                STREAMS=streams, BLOCK_T=block_t, INTERLEAVE=tile.interleave, ROWS=_GATHER_ROWS, COLUMNS=_GATHER_D,
            )  # fmt: skip
            stream_fwd_kernel[(slots // block_t * tiles_v,)](
                *operands, bias, packed_labels, count, partials, at_label,
                first_token, slots, tiles_v, weight.stride(0), dim, vocabulary, float(logit_scale), float(softcap or 0),
                STREAMS=streams, **_tile_constants(tile), HAS_BIAS=bias is not None, HAS_SCALE=logit_scale != 1,
                HAS_CAP=softcap is not None, EVEN_D=dim % tile.block_d == 0, DESCRIPTORS=descriptors,
                WIDEN=INTERPRETED and weight.dtype == torch.bfloat16,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            combine_kernel[(cdiv(slots, _COMBINE_ROWS),)](
                partials, at_label, order, count, out, first_token, slots, tiles_v, tokens, out.stride(0),
                STREAMS=streams, TILES=_COMBINE_TILES, ROWS=_COMBINE_ROWS,
            )  # fmt: skip
    return out


def _check(
    hiddens: tuple[Tensor, ...],
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> None:
    names = ("hidden",) if len(hiddens) == 1 else ("hidden_factual", "hidden_counterfactual")
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"weight: expected shape [V, D] with V, D > 0, got {list(weight.shape)}")
    if weight.dtype not in TYPE_NAMES:
        raise TypeError(f"weight: expected bfloat16, float16 or float32, got {weight.dtype}")
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 of shape [N], got {labels.dtype} of shape {list(labels.shape)}")
    for name, hidden in zip(names, hiddens, strict=True):
        if hidden.shape != (labels.shape[0], weight.shape[1]):
            expected = [labels.shape[0], weight.shape[1]]
            raise ValueError(f"{name}: expected shape [N, D] = {expected}, got {list(hidden.shape)}")
        if hidden.dtype != weight.dtype:
            raise TypeError(f"{name}: expected {weight.dtype} as weight, got {hidden.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if bias is not None and bias.dtype not in TYPE_NAMES:
        raise TypeError(f"bias: expected bfloat16, float16 or float32, got {bias.dtype}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"logit_scale: expected a finite number, got {scale}")
    check_together(weight=weight, **dict(zip(names, hiddens, strict=True)), labels=labels, bias=bias)


def _describable(weight: Tensor) -> bool:
    """Whether TMA can address `weight`: base and row stride multiples of 16 bytes."""
    row_bytes = weight.stride(0) * weight.element_size()
    return weight.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and row_bytes > 0


def _tile_for(weight: Tensor, streams: int) -> Tile:
    """Return the table's tile for this GPU, or the tile for rows that cannot be loaded 16 bytes at a time."""
    target = target_of(weight.device)
    tile = lookup(FAMILIES[streams - 1], target, weight.dtype, weight.shape[1])
    unaligned = weight.stride(0) % 16 or weight.data_ptr() % 16
    if target != PORTABLE_TARGET and unaligned and not (tile.descriptors and _describable(weight)):
        tile = UNALIGNED
    memory = shared_memory_of(weight.device)
    if memory >= SHARED_LIMIT.get(target, memory + 1):
        return tile  # compiled for as much
    fitted = tile.fitted(weight.element_size(), memory)
    if fitted is PORTABLE and tile is not PORTABLE:
        warn_portable(weight.device, f"a program may use only {memory} bytes of its shared memory")
    return fitted


def _runs(tile: Tile, streams: int) -> int:
    """Return the number of products per step: two if the tile holds one run of each stream."""
    return 2 if streams == 2 and 2 * tile.interleave == tile.block_n else 1


def _tile_constants(tile: Tile) -> dict[str, int]:
    """Return the constants of the streaming kernel that are fields of the tile."""
    names = ("block_n", "block_v", "block_d", "interleave", "group_n", "warp_specialize")
    return {name.upper(): getattr(tile, name) for name in names}


def compile_cases(thorough: bool = False) -> list[CompileCase]:
    """Return each tile of the table once, with bias, scale and softcap, which take the most registers.

    `thorough` adds the kernel without these options, and the kernel that replaces a tile with descriptors if W is not
    aligned.
    """
    cases: dict[object, CompileCase] = {}
    for entry in entries():
        if entry.target not in TARGETS:
            continue
        dtype = "bf16" if entry.dtype_class == "half" else "fp32"
        streams = FAMILIES.index(entry.family) + 1
        pointers = dataclasses.replace(entry.tile, descriptors=False, warp_specialize=False)
        variants = [("", entry.tile, True, True)]
        if thorough:
            variants += [("_plain", entry.tile, True, False), ("_pointers", pointers, True, True)]
            variants += [("_unaligned", UNALIGNED, False, True)]
        for suffix, tile, aligned, with_options in variants:
            name = f"stream/{entry.family}_{dtype}_{entry.bucket}{suffix}"
            # Tiles that differ in their order only are compiled once.
            key = (entry.target, streams, dtype, dataclasses.replace(tile, group_n=1), aligned, with_options)
            if key not in cases:
                cases[key] = compile_case(name, streams, dtype, tile, entry.target, aligned, with_options)
    return [*cases.values(), *_small_cases(1), *_small_cases(2)]


def _small_cases(streams: int) -> list[CompileCase]:
    """Return cases of the gather and the combine kernel."""
    sizes = dict.fromkeys(("first_token", "stride_n1", "stride_n0", "stride_label", "D", "V", "packed_width"), "i32")
    rows = {"order_ptr": "*i64", "count_ptr": "*i64"}
    gather = {"h1_ptr": "*bf16", "h0_ptr": "*bf16", **rows, "label_ptr": "*i64", "packed_ptr": "*bf16"}
    combine = {"partial_ptr": "*fp32", "at_label_ptr": "*fp32", **rows, "out_ptr": "*fp32"}
    family = FAMILIES[streams - 1]
    return [
        CompileCase(
            name=f"stream/{family}_gather",
            kernel=gather_kernel,
            signature={**gather, "packed_label_ptr": "*i32", **sizes},
            constexprs={
                "stride_d1": 1,
                "stride_d0": 1,
                "STREAMS": streams,
                "BLOCK_T": 64,
                "INTERLEAVE": 8,
                "ROWS": _GATHER_ROWS,
                "COLUMNS": _GATHER_D,
            },
            divisible_by_16=[name for name in gather if name != "label_ptr"]
            + ["packed_label_ptr", "stride_n1", "stride_n0", "D", "packed_width"],
        ),
        CompileCase(
            name=f"stream/{family}_combine",
            kernel=combine_kernel,
            signature={**combine, **dict.fromkeys(("first_token", "slots", "tiles_v", "N", "stride_out"), "i32")},
            constexprs={"STREAMS": streams, "TILES": _COMBINE_TILES, "ROWS": _COMBINE_ROWS},
            divisible_by_16=list(combine),
        ),
    ]


def compile_case(
    name: str, streams: int, dtype: str, tile: Tile, target: str, aligned: bool = True, with_options: bool = False
) -> CompileCase:
    """Return a case of the streaming kernel with `tile`, for `nextquill_kernels.crosscompile`.

    Args:
        name: name of the case.
        streams: number of streams of hidden states, 1 or 2.
        dtype: dtype of hidden states and weight: "bf16", "fp16" or "fp32".
        tile: tile sizes.
        target: the target that the tile is meant for.
        aligned: whether D and the row stride of the weight are multiples of 16, and D one of the tile's block_d.
        with_options: with bias, scale and softcap.
    """
    runs = _runs(tile, streams)
    pointer = f"*{dtype}"
    signature = {
        "packed": f"tensordesc<{dtype}[{tile.block_n // runs}, {tile.block_d}]>" if tile.descriptors else pointer,
        "weight": f"tensordesc<{dtype}[{tile.block_v}, {tile.block_d}]>" if tile.descriptors else pointer,
        "bias_ptr": pointer if with_options else None,
        "label_ptr": "*i32",
        "count_ptr": "*i64",
        "partial_ptr": "*fp32",
        "at_label_ptr": "*fp32",
        **dict.fromkeys(("first_token", "slots", "tiles_v", "stride_w", "D", "V"), "i32"),
        "logit_scale": "fp32",
        "softcap": "fp32",
    }
    constexprs = {
        "STREAMS": streams,
        **_tile_constants(tile),
        **dict.fromkeys(("HAS_BIAS", "HAS_SCALE", "HAS_CAP"), with_options),
        "EVEN_D": aligned,
        "DESCRIPTORS": tile.descriptors,
        "WIDEN": False,
    }
    divisible = [name for name, kind in signature.items() if kind and kind.startswith("*")]
    return CompileCase(
        name=name,
        kernel=stream_fwd_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=[*divisible, "stride_w", "D"] if aligned else divisible,
        targets=(target,),
    )
