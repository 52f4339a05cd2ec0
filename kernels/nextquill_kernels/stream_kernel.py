"""The kernels of `stream`: gather the supervised rows, multiply and reduce tile by tile, combine.

Names: b_* are values of a block, h hidden states; 1 and 0 are the factual and the counterfactual stream, e their
difference.

The best INTERLEAVE depends on how a GPU lays out the accumulator. wgmma and mma give a thread the rows r and r + 8 of a
16-row slab: runs of 8 tokens put z1 and z0 of the same logit into two registers of one thread, and z1 − z0 costs a
subtraction (on sm_90 without an exchange through shared memory). BLOCK_N / 2 means two products and two accumulators;
it suits accumulators with one row per thread (on sm_100 3 loads from shared memory, against 579).

The epilogue walks the accumulator in pieces of `_PIECE_V` columns and takes 180 to 255 registers. On the whole
accumulator at once its temporaries spilled at 128 × 256 with 8 warps on sm_90 (up to 184 bytes of stack with softcap).
"""

# ruff: noqa: N803, N806
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton.language as tl

from nextquill_kernels.launch import jit
from nextquill_kernels.logits import exp, finish

# Start of a running maximum: finite, so that a tile with nothing but -inf never computes (-inf) - (-inf).
_LOWEST = tl.constexpr(-3.4e38)
_PIECE_V = tl.constexpr(64)


@jit()
def _fold(b_z, b_top, b_sum):
    """Add the columns of b_z to the running maximum and the running sum of exp(z - maximum)."""
    b_new = tl.maximum(b_top, tl.max(b_z, 1))
    b_sum = b_sum * exp(b_top - b_new) + tl.sum(exp(b_z - b_new[:, None]), 1)
    return b_new, b_sum


@jit()
def _left_right(b_x):
    """Return the left and the right half of the columns; no data moves if a register holds the highest column bit."""
    b_x = tl.reshape(b_x, [b_x.shape[0], 2, b_x.shape[1] // 2])
    return tl.split(tl.permute(b_x, [0, 2, 1]))


@jit()
def _token_epilogue(b_acc, start, bias_ptr, b_label, has_label, b_state, V, logit_scale, softcap,
                    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):  # fmt: skip
    """Add the columns from `start` on to the state (maximum, sum, label's logit)."""
    if b_acc.shape[1] > _PIECE_V:
        b_left, b_right = _left_right(b_acc)
        b_state = _token_epilogue(b_left, start, bias_ptr, b_label, has_label, b_state, V, logit_scale, softcap,
                                  HAS_BIAS, HAS_SCALE, HAS_CAP)  # fmt: skip
        return _token_epilogue(b_right, start + b_left.shape[1], bias_ptr, b_label, has_label, b_state, V, logit_scale,
                               softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)  # fmt: skip
    else:
        b_top, b_sum, b_at_label = b_state
        columns = start + tl.arange(0, b_acc.shape[1])
        b_bias = tl.zeros(columns.shape, tl.float32)
        if HAS_BIAS:
            b_bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        b_z = finish(b_acc, b_bias[None, :], logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
        if has_label:
            b_at_label += tl.sum(tl.where(columns[None, :] == b_label[:, None], b_z, 0.0), 1)
        b_top, b_sum = _fold(tl.where(columns[None, :] < V, b_z, float("-inf")), b_top, b_sum)
        return b_top, b_sum, b_at_label


@jit()
def _pair_epilogue(b_acc1, b_acc0, start, bias_ptr, b_label, has_label, b_state, V, logit_scale, softcap,
                   HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):  # fmt: skip
    """Add the columns from `start` on to the state (maximum, sum of z1, z0 and z1 - z0; the label's z1, z0)."""
    if b_acc1.shape[1] > _PIECE_V:
        b_left1, b_right1 = _left_right(b_acc1)
        b_left0, b_right0 = _left_right(b_acc0)
        b_state = _pair_epilogue(b_left1, b_left0, start, bias_ptr, b_label, has_label, b_state, V, logit_scale,
                                 softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)  # fmt: skip
        return _pair_epilogue(b_right1, b_right0, start + b_left1.shape[1], bias_ptr, b_label, has_label, b_state, V,
                              logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)  # fmt: skip
    else:
        b_top1, b_sum1, b_top0, b_sum0, b_tope, b_sume, b_at_label1, b_at_label0 = b_state
        columns = start + tl.arange(0, b_acc1.shape[1])
        b_bias = tl.zeros(columns.shape, tl.float32)
        if HAS_BIAS:
            b_bias = tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        b_z1 = finish(b_acc1, b_bias[None, :], logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
        b_z0 = finish(b_acc0, b_bias[None, :], logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_CAP)
        if has_label:
            is_label = columns[None, :] == b_label[:, None]
            b_at_label1 += tl.sum(tl.where(is_label, b_z1, 0.0), 1)
            b_at_label0 += tl.sum(tl.where(is_label, b_z0, 0.0), 1)
        inside = columns[None, :] < V
        b_top1, b_sum1 = _fold(tl.where(inside, b_z1, float("-inf")), b_top1, b_sum1)
        b_top0, b_sum0 = _fold(tl.where(inside, b_z0, float("-inf")), b_top0, b_sum0)
        b_tope, b_sume = _fold(tl.where(inside, b_z1 - b_z0, float("-inf")), b_tope, b_sume)
        return b_top1, b_sum1, b_top0, b_sum0, b_tope, b_sume, b_at_label1, b_at_label0


@jit()
def _product(packed, weight, row, column, stride_w, D, V,
             ROWS: tl.constexpr, RUNS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
             DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """Return RUNS products, in float32, of ROWS packed rows each, from `row` on, with the rows of W from `column` on.

    Zeros fill the packed rows up to a multiple of BLOCK_D. Rows of W beyond V are replaced by the last one (by zeros
    with descriptors), columns beyond D by zeros: memory beyond W is not read.
    """
    b_acc1 = tl.zeros([ROWS, BLOCK_V], tl.float32)
    b_acc0 = b_acc1
    if DESCRIPTORS:
        for d in tl.range(0, D, BLOCK_D, warp_specialize=WARP_SPECIALIZE):
            b_w = weight.load([column, d])
            b_h = packed.load([row, d])
            if WIDEN:
                b_w, b_h = b_w.to(tl.float32), b_h.to(tl.float32)
            b_acc1 = tl.dot(b_h, b_w.T, b_acc1, input_precision="ieee")
            if RUNS == 2:
                b_h = packed.load([row + ROWS, d])
                if WIDEN:
                    b_h = b_h.to(tl.float32)
                b_acc0 = tl.dot(b_h, b_w.T, b_acc0, input_precision="ieee")
    else:
        packed_width = tl.cdiv(D, BLOCK_D) * BLOCK_D
        offs_d = tl.arange(0, BLOCK_D)
        offs_n = row.to(tl.int64) + tl.arange(0, ROWS)
        offs_v = tl.minimum(column + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        h_ptrs = packed + offs_n[:, None] * packed_width + offs_d[None, :]
        w_ptrs = weight + offs_v[None, :] * stride_w + offs_d[:, None]
        for d in tl.range(0, D, BLOCK_D):
            if EVEN_D:
                b_w = tl.load(w_ptrs)
            else:
                b_w = tl.load(w_ptrs, mask=offs_d[:, None] < D - d, other=0.0)
            b_h = tl.load(h_ptrs)
            if WIDEN:
                b_w, b_h = b_w.to(tl.float32), b_h.to(tl.float32)
            b_acc1 = tl.dot(b_h, b_w, b_acc1, input_precision="ieee")
            if RUNS == 2:
                b_h = tl.load(h_ptrs + ROWS * packed_width)
                if WIDEN:
                    b_h = b_h.to(tl.float32)
                b_acc0 = tl.dot(b_h, b_w, b_acc0, input_precision="ieee")
            h_ptrs += BLOCK_D
            w_ptrs += BLOCK_D
    return b_acc1, b_acc0


@jit(do_not_specialize=["first_token", "slots", "tiles_v"])
def stream_fwd_kernel(
    packed, weight, bias_ptr, label_ptr, count_ptr, partial_ptr, at_label_ptr,
    first_token, slots, tiles_v, stride_w, D, V, logit_scale, softcap,
    STREAMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERLEAVE: tl.constexpr, GROUP_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Multiply one tile of rows with one tile of the vocabulary and reduce the logits.

    Writes partial_ptr [tiles_v, 2 or 6, slots], (maximum, sum) of each logsumexp, and at_label_ptr [STREAMS, slots].
    `packed` and `weight` are pointers, or with DESCRIPTORS tensor descriptors with the block of one step.
    """
    BLOCK_T: tl.constexpr = BLOCK_N // STREAMS
    RUNS: tl.constexpr = 2 if STREAMS == 2 and 2 * INTERLEAVE == BLOCK_N else 1
    active = tl.minimum(tl.load(count_ptr) - first_token, slots).to(tl.int32)
    tiles_n = tl.cdiv(tl.maximum(active, 0), BLOCK_T)
    pid = tl.program_id(0)
    if pid >= tiles_n * tiles_v:
        return
    # Consecutive programs share a tile of W and differ in their rows. GROUP_N row tiles pass over all of W before the
    # next GROUP_N do; they stay in the L2 cache (16 MiB at 128 x 4096 bf16).
    group_n = pid // (GROUP_N * tiles_v) * GROUP_N
    in_group = pid % (GROUP_N * tiles_v)
    group_size = tl.minimum(tiles_n - group_n, GROUP_N)
    tile_n = group_n + in_group % group_size
    tile_v = in_group // group_size
    start = tile_v * BLOCK_V

    offs_t = tile_n * BLOCK_T + tl.arange(0, BLOCK_T)
    b_label = tl.load(label_ptr + offs_t)
    is_here = (b_label >= start) & (b_label < tl.minimum(start + BLOCK_V, V))
    has_label = tl.max(is_here.to(tl.int32), 0) > 0

    b_acc1, b_acc0 = _product(packed, weight, tile_n * BLOCK_N, start, stride_w, D, V, BLOCK_N // RUNS, RUNS, BLOCK_V,
                              BLOCK_D, EVEN_D, DESCRIPTORS, WARP_SPECIALIZE, WIDEN)  # fmt: skip
    lowest = tl.full([BLOCK_T], _LOWEST, tl.float32)
    zero = tl.zeros([BLOCK_T], tl.float32)
    partial_ptr += tile_v.to(tl.int64) * (STREAMS * 4 - 2) * slots + offs_t
    if STREAMS == 1:
        b_top, b_sum, b_at_label = _token_epilogue(
            b_acc1, start, bias_ptr, b_label, has_label, (lowest, zero, zero), V, logit_scale, softcap,
            HAS_BIAS, HAS_SCALE, HAS_CAP)  # fmt: skip
        tl.store(partial_ptr, b_top)
        tl.store(partial_ptr + slots, b_sum)
        tl.store(at_label_ptr + offs_t, b_at_label, mask=is_here)
    else:
        if RUNS == 1:
            b_runs = tl.reshape(b_acc1, [BLOCK_T // INTERLEAVE, 2, INTERLEAVE, BLOCK_V])
            b_acc1, b_acc0 = tl.split(tl.permute(b_runs, [0, 2, 3, 1]))
            b_acc1 = tl.reshape(b_acc1, [BLOCK_T, BLOCK_V])
            b_acc0 = tl.reshape(b_acc0, [BLOCK_T, BLOCK_V])
        b_top1, b_sum1, b_top0, b_sum0, b_tope, b_sume, b_at_label1, b_at_label0 = _pair_epilogue(
            b_acc1, b_acc0, start, bias_ptr, b_label, has_label,
            (lowest, zero, lowest, zero, lowest, zero, zero, zero), V, logit_scale, softcap,
            HAS_BIAS, HAS_SCALE, HAS_CAP)  # fmt: skip
        tl.store(partial_ptr, b_top1)
        tl.store(partial_ptr + slots, b_sum1)
        tl.store(partial_ptr + 2 * slots, b_top0)
        tl.store(partial_ptr + 3 * slots, b_sum0)
        tl.store(partial_ptr + 4 * slots, b_tope)
        tl.store(partial_ptr + 5 * slots, b_sume)
        tl.store(at_label_ptr + offs_t, b_at_label1, mask=is_here)
        tl.store(at_label_ptr + slots + offs_t, b_at_label0, mask=is_here)


@jit(do_not_specialize=["first_token", "stride_label"], do_not_specialize_on_alignment=["label_ptr"])
def gather_kernel(
    h1_ptr, h0_ptr, order_ptr, count_ptr, label_ptr, packed_ptr, packed_label_ptr,
    first_token, stride_n1, stride_d1, stride_n0, stride_d0, stride_label, D, V, packed_width,
    STREAMS: tl.constexpr, BLOCK_T: tl.constexpr, INTERLEAVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy COLUMNS columns of ROWS supervised tokens to the packed buffer, and their labels (V or more becomes V)."""
    count = tl.load(count_ptr) - first_token
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tl.cdiv(count, BLOCK_T) * BLOCK_T:
        return
    is_row = slot < count
    source = tl.load(order_ptr + first_token + slot, mask=is_row, other=0)
    if tl.program_id(1) == 0:
        b_label = tl.load(label_ptr + source * stride_label, mask=is_row, other=-1)
        tl.store(packed_label_ptr + slot, tl.minimum(b_label, V).to(tl.int32))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    read = is_row[:, None] & (column < D)[None, :]
    write = (column < packed_width)[None, :]
    row = slot.to(tl.int64) if STREAMS == 1 else slot.to(tl.int64) // INTERLEAVE * (2 * INTERLEAVE) + slot % INTERLEAVE
    target = packed_ptr + row[:, None] * packed_width + column[None, :]
    offs_d = column.to(tl.int64)
    b_h = tl.load(h1_ptr + source[:, None] * stride_n1 + offs_d[None, :] * stride_d1, mask=read, other=0.0)
    tl.store(target, b_h, mask=write)
    if STREAMS == 2:
        b_h = tl.load(h0_ptr + source[:, None] * stride_n0 + offs_d[None, :] * stride_d0, mask=read, other=0.0)
        tl.store(target + INTERLEAVE * packed_width, b_h, mask=write)


@jit()
def _merge(partial_ptr, tiles_v, stride, slots, offs, TILES: tl.constexpr, ROWS: tl.constexpr):
    """Return maximum and sum over all tiles of the vocabulary, TILES at a time, in the same order in every run."""
    b_top = tl.full([ROWS], _LOWEST, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, tiles_v, TILES):
        tile = first + tl.arange(0, TILES)
        is_tile = (tile < tiles_v)[:, None]
        ptrs = partial_ptr + tile.to(tl.int64)[:, None] * stride + offs[None, :]
        b_tops = tl.load(ptrs, mask=is_tile, other=_LOWEST)
        b_sums = tl.load(ptrs + slots, mask=is_tile, other=0.0)
        b_new = tl.maximum(b_top, tl.max(b_tops, 0))
        b_weights = exp(b_tops - b_new[None, :])
        b_sum = b_sum * exp(b_top - b_new) + tl.sum(b_sums * b_weights, 0)
        b_top = b_new
    return b_top, tl.log(b_sum)


@jit(do_not_specialize=["first_token", "slots", "tiles_v", "N", "stride_out"])
def combine_kernel(
    partial_ptr, at_label_ptr, order_ptr, count_ptr, out_ptr, first_token, slots, tiles_v, N, stride_out,
    STREAMS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write logsumexps and NLLs of ROWS tokens to the rows they came from; 0 to ignored rows.

    nll = (maximum - z[y]) + log(sum): the large terms cancel first, so an nll near 0 keeps its relative precision.
    """
    STATS: tl.constexpr = 2 * STREAMS - 1
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = first_token + slot
    is_token = (slot < slots) & (token < N)
    row = tl.load(order_ptr + token, mask=is_token, other=0)
    out_ptr += row
    count = tl.load(count_ptr)
    if first_token + tl.program_id(0) * ROWS >= count:
        for k in tl.static_range(2 * STATS):
            tl.store(out_ptr + k * stride_out, tl.zeros([ROWS], tl.float32), mask=is_token)
        return
    is_row = token < count
    stride = 2 * STATS * slots
    offs = tl.minimum(slot, slots - 1)
    b_z1 = tl.load(at_label_ptr + offs)
    b_top, b_log = _merge(partial_ptr, tiles_v, stride, slots, offs, TILES, ROWS)
    tl.store(out_ptr, tl.where(is_row, b_top + b_log, 0.0), mask=is_token)
    tl.store(out_ptr + STATS * stride_out, tl.where(is_row, (b_top - b_z1) + b_log, 0.0), mask=is_token)
    if STREAMS == 2:
        b_z0 = tl.load(at_label_ptr + slots + offs)
        b_top, b_log = _merge(partial_ptr + 2 * slots, tiles_v, stride, slots, offs, TILES, ROWS)
        tl.store(out_ptr + stride_out, tl.where(is_row, b_top + b_log, 0.0), mask=is_token)
        tl.store(out_ptr + 4 * stride_out, tl.where(is_row, (b_top - b_z0) + b_log, 0.0), mask=is_token)
        b_top, b_log = _merge(partial_ptr + 4 * slots, tiles_v, stride, slots, offs, TILES, ROWS)
        tl.store(out_ptr + 2 * stride_out, tl.where(is_row, b_top + b_log, 0.0), mask=is_token)
        tl.store(out_ptr + 5 * stride_out, tl.where(is_row, (b_top - (b_z1 - b_z0)) + b_log, 0.0), mask=is_token)
