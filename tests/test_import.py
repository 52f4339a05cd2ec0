"""`import nextquill` takes almost no time, and its names need only torch."""

import importlib
import json

import pytest

import nextquill as nq
from tests.helpers import run_python

OPTIONAL = ("triton", "transformers", "datasets", "matplotlib", "rich", "peft", "accelerate", "tokenizers", "yaml",
            "tqdm", "rouge_score", "huggingface_hub", "safetensors", "numpy.testing", "torch._dynamo")  # fmt: skip
NEEDING_MORE = ("HistoryGuidance", "MirrorTrainer", "NextQuillTrainer", "PairPasses", "UserPrompt", "Writer",
                "prompt_for")  # fmt: skip
NEEDING_TORCH_ALONE = [name for name in nq.__all__ if name not in NEEDING_MORE]
MODULES = ["errors", "functional", "losses", "outputs", "tree", "weighting"]


def imported(statement, after="pass"):
    """The modules that a statement imports in a fresh process, after another statement."""
    code = "import json, sys; {}; before = set(sys.modules); {}; print(json.dumps([*({{*sys.modules}} - before)]))"
    return set(json.loads(run_python(code.format(after, statement))))


def test_the_package_alone_imports_no_torch():
    assert not {name.partition(".")[0] for name in imported("import nextquill")} & {*OPTIONAL, "torch", "numpy"}


def test_its_names_bring_nothing_that_torch_does_not():
    use = f"import nextquill as nq; [getattr(nq, name) for name in {[*MODULES, *NEEDING_TORCH_ALONE]!r}]"
    found = imported(f"{use}; nq.tree.build_prefix_tree", after="import torch")
    assert {name.partition(".")[0] for name in found} == {"nextquill"}
    assert not found & {"nextquill.data", "nextquill.models", "nextquill.training", "nextquill.cli"}
    assert {f"nextquill.{name}" for name in MODULES} <= found


def test_losses_and_public_names_work_with_every_optional_package_missing():
    blocked = [name for name in OPTIONAL if not name.startswith(("torch", "numpy"))]
    run_python(
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "import torch, nextquill as nq\n"
        f"missing = [n for n in {NEEDING_TORCH_ALONE!r} if not hasattr(nq, n)]\nassert not missing, missing\n"
        "assert 'NextQuillLoss' in dir(nq) and 'NextQuillTrainer' not in dir(nq)\n"
        "h = torch.randn(6, 4, requires_grad=True)\n"
        "nq.NextQuillLoss()(h, torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5).backward()\n"
        "assert h.grad.any()\n"
    )


def test_public_names_are_sorted_and_unknown_ones_are_refused():
    assert list(nq.__all__) == sorted(nq.__all__)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = nq.nothing_of_this_name


FORMER = """
import importlib
from nextquill import integrations as former
for name, now in former._NOW.items():
    assert name == "ATTENTIONS" or importlib.import_module(now)
    for statement in (f"import {former.__name__}.{name}", f"from {former.__name__} import {name}"):
        try:
            exec(statement)
        except ImportError as error:
            assert str(error) == f"{former.__name__}.{name} is now {now}", error
        else:
            raise AssertionError(f"{statement} succeeded")
"""


def test_former_paths_name_the_new_ones():
    run_python(FORMER)


@pytest.mark.parametrize(("former", "now"), [("nextquill.demo", "demos.losses"), ("nextquill.popi.demo", "demos.popi")])
def test_former_demos_name_the_new_ones(former, now):
    package, _, name = former.rpartition(".")
    for statement in (f"import {former}", f"import {former}.run", f"from {package} import {name}"):
        with pytest.raises(ImportError, match=rf"^{former} is now {now}, in the source tree only$"):
            exec(statement)
    assert importlib.import_module(now)
