"""A compiled model has the same loss and gradients, and a constant number of graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nextquill import NextQuillLoss, PairLoss, PerCELoss
from nextquill.models.branch_passes import PairPasses
from tests.models.model_helpers import make_records, make_trainer, random_examples, tiny_model

# Dynamo itself reads .grad of what goes from one graph to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

LOSSES = {"both passes": lambda: NextQuillLoss(threshold=0.0), "constant": lambda: PerCELoss(0.1, 2.0)}
#: A pass has a graph of its own with and without gradient, once for its first shapes and once for all others.
GRAPHS = {"both passes": 2, "constant": 4}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_graphs_stay_and_gradients_are_the_same(name: str, kind: str) -> None:
    model, reference = tiny_model(kind), tiny_model(kind)
    loss: PairLoss = LOSSES[name]()
    passes, plain = PairPasses(model, loss), PairPasses(reference, loss)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for seed, count in enumerate((3, 5, 2, 4, 6)):
        batch = passes.collator()(random_examples(count, seed))
        for each in (model, reference):
            each.zero_grad()
        value, _ = passes.training_loss(batch, call=compiled)
        expected, _ = plain.training_loss(batch)
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
        if seed > 0:
            assert counter.frame_count == GRAPHS[name], f"graphs after batch {seed}"


@pytest.mark.slow
def test_trainer_compiles_its_model(tmp_path) -> None:
    results = []
    for name, options in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        trainer = make_trainer(tmp_path / name, eval_dataset=make_records(6), optim="sgd", **options)
        trainer.train()
        results.append((trainer.evaluate()["eval_loss"], list(trainer.model.parameters())))
    (plain, expected), (compiled, got) = results
    assert compiled == pytest.approx(plain, rel=1e-6)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
