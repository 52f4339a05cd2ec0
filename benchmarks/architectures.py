"""Which architectures share prefixes exactly: `python -m benchmarks.architectures`.

Every causal language model of the installed transformers is built with a tiny configuration (`tiny_configs`) and random
weights. The loss and every gradient of a batch under `attention="auto"` are compared with the model's own logits of
separate unpadded rows. The results go to `results/architectures/transformers.csv`.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.float64 import all_in_float64
from benchmarks.measure import RESULTS
from benchmarks.tiny_configs import VOCABULARY, tiny_config
from nextquill import NextQuillError, PairLoss
from nextquill.data import Branch, EncodedExample
from nextquill.models.branch_passes import PairPasses
from nextquill.models.recurrent import layers_with_state

FILE = RESULTS / "architectures" / "transformers.csv"
#: Largest relative errors of the loss and of a parameter's gradient.
LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 2e-5
_SECONDS = 90


@dataclass(frozen=True)
class Result:
    """How one architecture runs.

    Attributes:
        architecture, model: the `model_type` and its class.
        result: "exact" over trees, "padded", "wrong", "refused", or "not built" where transformers fails.
        attention: what "auto" took: "kernels", "mask" or "padded".
        reason: why it is not one of our kernels, without what depends on the processor.
    """

    architecture: str
    model: str
    result: str
    attention: str
    reason: str
    transformers: str = transformers.__version__


def check(kind: str) -> Result:
    """Build and compare one architecture."""
    try:
        model = tiny_model(kind)
    except Exception as error:  # noqa: BLE001
        return Result(kind, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]), "not built", "", _line(error))
    try:
        # In float32 linear attention rounds more than the limit, also in separate rows.
        with all_in_float64(model) if layers_with_state(model) else nullcontext():
            return Result(kind, type(model).__name__, *_compared(model))
    except NextQuillError as error:
        return Result(kind, type(model).__name__, "refused", "", _reason(error, model))
    except Exception as error:  # noqa: BLE001
        return Result(kind, type(model).__name__, "not built", "", _line(error))


def tiny_model(kind: str) -> nn.Module:
    """A random tiny model of this kind in eval mode, in float64, or in float32 if it runs in no wider dtype.

    Its biases and sinks, usually initialised to zero, are random.
    """
    config, error = tiny_config(kind), Exception()
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                nn.init.normal_(parameter, std=0.3)
        try:
            with torch.no_grad():
                model(input_ids=torch.tensor([_examples()[0].factual.input_ids]), use_cache=False)
        except Exception as problem:  # noqa: BLE001
            error = problem
        else:
            return model
    raise error


def _compared(model: nn.Module) -> tuple[str, str, str]:
    """The result, the attention and the reason."""
    examples = _examples()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with PairPasses(model, _LOSS, "auto") as passes:
            attention = "padded" if passes.trees is None else passes.trees.attention
            loss, _ = passes.training_loss(passes.collator()(examples))
            got = _gradients(model, loss)
    fallbacks = [each.message for each in seen if str(each.message).startswith("attention: 'auto'")]
    reason = "".join(_reason(message, model) for message in fallbacks)
    expected = _separate(model, examples)
    error = _error(got, _gradients(model, expected))
    loss_error = float(((loss - expected).abs() / expected.abs()).detach())
    result = "padded" if attention == "padded" else "exact"
    if not (loss_error <= LOSS_LIMIT and error <= GRADIENT_LIMIT):
        result, reason = "wrong", f"relative error of the loss {loss_error:.1e}, of a gradient {error:.1e}; {reason}"
    return result, "kernels" if attention == "auto" else attention, reason


_LOSS = PairLoss(lambda pair: torch.ones_like(pair.factual), anchor=1.0)


def _examples() -> list[EncodedExample]:
    """Two users with two texts each, whose branches share a system prompt, histories and the beginnings of texts."""
    ids = torch.randint(2, VOCABULARY, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    system, query, histories, texts = ids[:3], ids[3:6], (ids[6:13], ids[13:20]), (ids[20:26], ids[20:22] + ids[30:33])
    return [
        EncodedExample(f"user{user}", 2 * user + number, Branch(system + history + query, text),
                       Branch(system + query, text), None, 1, 1)
        for user, history in enumerate(histories) for number, text in enumerate(texts)
    ]  # fmt: skip


def _separate(model: nn.Module, examples: list[EncodedExample]) -> Tensor:
    """The loss from the model's own logits of every branch alone."""

    def nll(branch: Branch) -> Tensor:
        ids = torch.tensor([branch.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        return cross_entropy(logits[branch.prompt_length - 1 : -1], ids[0, branch.prompt_length :])

    return torch.stack([nll(each.factual) + nll(each.counterfactual) for each in examples]).mean()


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient; a tiny gradient is measured by the largest one."""
    if got.keys() != expected.keys():
        return float("inf")
    floor = 1e-3 * max(float(each.norm()) for each in expected.values())
    return max(float((got[name] - want).norm()) / max(float(want.norm()), floor) for name, want in expected.items())


def _reason(message: object, model: nn.Module) -> str:
    """The reason in a message that names a model, without errors of rounding and advice."""
    text = re.sub(r" \(relative error [^)]*\)", "", str(message).rpartition(f"{type(model).__name__}: ")[2])
    return re.sub(r"; use attention=.*|, so neither trees .*", "", " ".join(text.split()))[:300]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ---- all of them -----------------------------------------------------------------------------------


def check_apart(kind: str) -> Result:
    """`check` in a process of its own, so that a crash or a hang costs one row."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(check(kind)))
    process.start()
    send.close()
    try:
        if receive.poll(_SECONDS):
            return receive.recv()
        why = f"no answer in {_SECONDS} seconds"
    except EOFError:
        why = "the process ended without an answer"
    finally:
        process.kill()
        process.join()
    return Result(kind, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]), "not built", "", why)


def main() -> int:
    """Check the architectures named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="model types; by default all, which replaces the file")
    chosen = parser.parse_args().architectures
    torch.set_num_threads(1)
    results = []
    for kind in chosen or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        begun = time.monotonic()
        results.append(found := check_apart(kind))
        shown = (found.architecture, found.result, found.attention, found.reason)
        print(*filter(None, shown), f"{time.monotonic() - begun:.1f} s", sep=" | ", flush=True)
    if not chosen:
        with FILE.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [field.name for field in fields(Result)])
            writer.writeheader()
            writer.writerows(map(asdict, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
