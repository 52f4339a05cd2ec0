"""Causal attention kernels for sequences of different lengths, with the last query aligned with the last key.

`torch` and `flash_attn` run on GPUs in half precision. `emulated` is a loop over segments in plain PyTorch, for any
device and dtype; the others are compared with it before their first use in a process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentTypeError, BackendUnavailableError
from nextquill.tree.dense_blocks import Piece
from nextquill.tree.kernels import MATH, AttentionKernel, ScoreRule
from nextquill.tree.prefix_tree import build_prefix_tree
from nextquill.tree.segments import TreeLayout
from nextquill.tree.varlen_plan import VarlenPlan, varlen_plan

VARLEN_KERNELS = ("auto", "torch", "flash_attn", "emulated")


def why_not(
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    head_size: int | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> str | None:
    """Return why a kernel cannot run here, or None if it can; "auto" can if any kernel can."""
    device = torch.device(device)
    if kernel == "emulated":
        return None
    if kernel == "auto":
        reasons = {name: why_not(dtype, device, head_size=head_size, softcap=softcap, kernel=name) for name in _FAST}
        return None if None in reasons.values() else "; ".join(f"{name}: {why}" for name, why in reasons.items())
    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    if dtype not in _HALF:
        return f"needs float16 or bfloat16, got {dtype}"
    if kernel == "torch" and softcap is not None:
        return "has no softcap"
    if head_size is not None and (head_size % 8 or head_size > 256):
        return f"needs a head size that is a multiple of 8 and at most 256, got {head_size}"
    problem = _torch_problem() if kernel == "torch" else _flash_attn_problem()
    return problem or _device_problem(device, head_size)


_HALF = (torch.float16, torch.bfloat16)
_FAST = ("torch", "flash_attn")


def _device_problem(device: torch.device, head_size: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device, found none"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    # The tile of the backward needs more shared memory than these GPUs have (99 KiB).
    if head_size is not None and head_size > 192 and capability != (8, 0) and capability[0] not in (9, 10):
        return f"needs a head size of at most 192 on compute capability {capability[0]}.{capability[1]}"
    return None


def _torch_problem() -> str | None:
    if torch.version.hip is not None:
        return "is not supported on ROCm, where its logsumexps are laid out otherwise"
    available = torch.backends.cuda.is_flash_attention_available()
    return None if available else "this PyTorch was built without FlashAttention"


@functools.cache
def _flash_attn_problem() -> str | None:
    try:
        version = importlib.metadata.version("flash-attn")
        if [int(part) for part in re.findall(r"\d+", version)[:2]] < [2, 7]:
            return f"needs flash-attn 2.7, found {version}"
        importlib.import_module("flash_attn.flash_attn_interface")
    except importlib.metadata.PackageNotFoundError:
        return "flash-attn is not installed"
    except (ImportError, OSError) as error:
        return f"flash-attn cannot be imported: {error}"
    return None


# ---- the kernels --------------------------------------------------------------------------------------


def _torch_forward(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    # torch.nn.attention.varlen calls this operator, but exists only since torch 2.10, with scale and window since 2.11.
    out, lse, *_rest = torch.ops.aten._flash_attention_forward(
        query, key, value, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys, 0.0,
        plan.window is None, False, scale=rule.scale, **_torch_window(plan.window),
    )  # fmt: skip
    return out, lse


def _torch_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: VarlenPlan, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.empty(2, dtype=torch.uint64, device=query.device)  # state of dropout, not read
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys, 0.0,
        plan.window is None, random, random.new_empty(0), scale=rule.scale, **_torch_window(plan.window),
    )  # fmt: skip
    return grads


def _torch_window(window: int | None) -> dict[str, int]:
    # The left size excludes the query itself, hence one less; the docs of varlen_attn ("size W") suggest otherwise.
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _flash_attn_forward(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
        query, key, value, plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
        **_flash_attn_options(plan.window, rule), return_softmax=False,
    )  # fmt: skip
    return out, lse


def _flash_attn_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: VarlenPlan, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
        grad, query, key, value, out, lse, *grads,
        plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
        **_flash_attn_options(plan.window, rule), deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return grads


def _flash_attn_options(window: int | None, rule: ScoreRule) -> dict[str, Any]:
    left, right = (-1, -1) if window is None else (window - 1, 0)
    return {
        "dropout_p": 0.0,
        "softmax_scale": rule.scale,
        "causal": True,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": rule.softcap or 0.0,
        "alibi_slopes": None,
    }


def _emulated_forward(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    parts = []
    for q0, q1, k0, k1 in plan.spans:
        q, k, v = _heads_first(query[q0:q1]), _heads_first(key[k0:k1]), _heads_first(value[k0:k1])
        parts.append(MATH.forward(q, k, v, _aligned(q1 - q0, k1 - k0, plan.window), rule))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2)[0].transpose(0, 1).to(query.dtype).contiguous(), torch.cat(lses, 2)[0]


def _emulated_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: VarlenPlan, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for q0, q1, k0, k1 in plan.spans:
        g, q, o = (_heads_first(tensor[q0:q1]) for tensor in (grad, query, out))
        k, v = _heads_first(key[k0:k1]), _heads_first(value[k0:k1])
        piece = _aligned(q1 - q0, k1 - k0, plan.window)
        parts.append(MATH.backward(g, q, k, v, o, lse[None, :, q0:q1], piece, rule))
    dq, dk, dv = (torch.cat(each, 2)[0].transpose(0, 1) for each in zip(*parts, strict=True))
    return dq, dk, dv


def _aligned(queries: int, keys: int, window: int | None) -> Piece:
    """Return the mask of a segment: causal, with the last query aligned with the last key."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return Piece(slice(queries), slice(keys), is_own=False, mask=visible)


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]


EMULATED = AttentionKernel("emulated", _emulated_forward, _emulated_backward)
_KERNELS = {
    "torch": AttentionKernel("torch", _torch_forward, _torch_backward),
    "flash_attn": AttentionKernel("flash_attn", _flash_attn_forward, _flash_attn_backward),
}


def choose_kernel(name: str, query: Tensor, softcap: float | None) -> AttentionKernel:
    """Return the kernel of that name, checked on this device.

    Args:
        name: "auto", a kernel's name or "emulated".
        query: [1, H, T, D], float16 or bfloat16; any floating dtype for "emulated".
        softcap: c of c · tanh(x / c) on the scores, or None.

    Raises:
        ArgumentTypeError: the kernel does not take the query's dtype.
        BackendUnavailableError: the kernel cannot run here, or its results are wrong.
    """
    if name == "emulated":
        return EMULATED
    if query.dtype not in _HALF:
        raise ArgumentTypeError(f"query: kernel {name!r} expects float16 or bfloat16, got {query.dtype}")
    reasons = {}
    for each in _FAST if name == "auto" else (name,):
        reason = why_not(query.dtype, query.device, head_size=query.shape[3], softcap=softcap, kernel=each)
        reasons[each] = f"kernel {each!r} {reason}" if reason else failure(_KERNELS[each], query.device)
        if reasons[each] is None:
            return _KERNELS[each]
    raise BackendUnavailableError("; ".join(str(reason) for reason in reasons.values()))


def why_auto_fails(
    dtype: torch.dtype, device: torch.device, *, head_size: int | None = None, softcap: float | None = None
) -> str | None:
    """Return what is wrong with the results of each kernel that can run here, or None if one has the right ones."""
    names = [
        name for name in _FAST if not why_not(dtype, device, head_size=head_size, softcap=softcap, kernel=name)
    ]  # fmt: skip
    failures = [failure(_KERNELS[name], device) for name in names]
    return None if None in failures else "; ".join(map(str, failures))


@functools.cache
def failure(kernel: AttentionKernel, device: torch.device) -> str | None:
    """Return what is wrong with a kernel's results on a device, or the error that it raises there; None if all is well.

    Found once in a process: an operator asks before each call.
    """
    try:
        _verify(kernel, device)
    except torch.OutOfMemoryError:
        raise
    except BackendUnavailableError as error:
        return str(error)
    except (RuntimeError, TypeError) as error:
        return f"kernel {kernel.name!r} on {device}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _verify(kernel: AttentionKernel, device: torch.device) -> None:
    """Compare a kernel with the emulated one, on segments that end inside and beyond a tile of 64 or 128 keys.

    With top-left alignment, or a window that is off by one, the errors would be as large as the results.
    """
    trunk = list(range(1, 151))
    tree = build_prefix_tree([[*trunk, 200], [*trunk, *range(300, 340)], [*trunk[:70], 400, 401], [500] * 3])
    layout = TreeLayout.of_tree(tree)
    rng = torch.Generator().manual_seed(0)  # do not change the process' own generator
    for window, softcap in ((None, None), (3, None), *(((None, 2.0),) if kernel.name == "flash_attn" else ())):
        plan = varlen_plan(layout.segments, window, device)
        half = [torch.randn(n, h, 64, generator=rng).half().to(device) for n, h in ((len(tree), 4), (len(tree), 2))]
        query, key = half[0], half[1].index_select(0, plan.rows)
        value, grad = key.flip(2), query.flip(2)
        options = (plan, ScoreRule(0.125, softcap))
        out, lse = kernel.forward(query, key, value, *options)
        actual = (out, lse, *kernel.backward(grad, query, key, value, out, lse, *options))
        with torch.autocast(device.type, enabled=False):
            exact = [tensor.float() for tensor in (query, key, value)]
            out, lse = EMULATED.forward(*exact, *options)
            expected = (out, lse, *EMULATED.backward(grad.float(), *exact, out, lse, *options))
        for name, a, e in zip(("output", "logsumexp", "query", "key", "value"), actual, expected, strict=True):
            if a.shape != e.shape or not (a.float() - e).abs().max() <= 0.02 * e.abs().max():
                raise BackendUnavailableError(
                    f"kernel {kernel.name!r} on {device}: its {name} is not that of bottom-right aligned causal "
                    f"attention with window={window}, softcap={softcap}; PyTorch {torch.__version__}"
                )
