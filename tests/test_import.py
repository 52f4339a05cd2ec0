"""`import nextquill` needs torch and nothing else."""

import json

import pytest

import nextquill as nq
from tests.helpers import run_python

OPTIONAL = ("triton", "transformers", "datasets", "matplotlib", "rich", "peft", "accelerate", "tokenizers", "yaml",
            "tqdm", "rouge_score", "huggingface_hub", "safetensors", "numpy.testing", "torch._dynamo")  # fmt: skip
LIST_MODULES = "import json, sys; import {}; print(json.dumps(sorted(sys.modules)))"


def test_import_brings_nothing_that_torch_does_not():
    torch_alone, ours = (set(json.loads(run_python(LIST_MODULES.format(name)))) for name in ("torch", "nextquill"))
    extra = {name for name in ours - torch_alone if name.partition(".")[0] != "nextquill"}
    assert not extra
    assert not {name for name in ours if name.startswith(("nextquill.data", "nextquill.integrations", "nextquill.cli"))}
    assert not ours & (set(OPTIONAL) - torch_alone)


def test_losses_and_public_names_work_with_every_optional_package_missing():
    blocked = [name for name in OPTIONAL if not name.startswith(("torch", "numpy"))]
    names = [name for name in nq.__all__ if name not in ("NextQuillTrainer", "PairPasses")]
    run_python(
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "import torch, nextquill as nq\n"
        f"missing = [n for n in {names!r} if not hasattr(nq, n)]\nassert not missing, missing\n"
        "h = torch.randn(6, 4, requires_grad=True)\n"
        "nq.NextQuillLoss()(h, torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5).backward()\n"
        "assert h.grad.any()\n"
    )


def test_public_names_are_sorted_and_unknown_ones_are_refused():
    assert list(nq.__all__) == sorted(nq.__all__)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = nq.nothing_of_this_name
