"""`run_demo` end to end in its quick form, and the basis of its figures."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from demos.kit.run import DemoResult
from demos.losses.measuring import BASE, LossRow, UnseenUsers, exact_match, f1_score
from demos.losses.recipe import LossRecipe
from demos.losses.run import run_demo
from demos.losses.training import build_model, hidden_states, make_batch, make_contestants, with_own_histories
from demos.losses.world import LossWorld, encode

FILES = {"demo.png", "demo.html", "results.json", "results.csv"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult[Any, Any], str, list[tuple[str, int, int]]]:
    printed, calls = io.StringIO(), []
    folder = tmp_path_factory.mktemp("demo") / "made" / "by run_demo"
    console = Console(file=printed, width=80)
    result = run_demo(folder, seed=7, seeds=2, quick=True, console=console, progress=lambda *call: calls.append(call))
    return result, printed.getvalue(), calls


def rows_of(result: DemoResult[Any, Any]) -> list[LossRow]:
    return [row for run in result.runs for row in run.rows]


def without_seconds(record: dict[str, Any]) -> dict[str, Any]:
    timed = {"seconds", "timing", "seconds_per_step", "time_vs_sft"}
    rows = [{key: value for key, value in row.items() if key not in timed} for row in record["rows"]]
    return {key: value for key, value in record.items() if key not in timed} | {"rows": rows}


def test_quick_run_writes_exactly_its_files(quick: Any) -> None:
    result, printed, _ = quick
    folder = result.paths["demo.png"].parent
    assert {path.name for path in folder.iterdir()} == FILES == set(result.paths)
    assert result.paths["demo.png"].read_bytes().startswith(b"\x89PNG")
    html = result.paths["demo.html"].read_text(encoding="utf-8")
    assert html.count('class="variant"') == 9
    assert "&lt;eos&gt;" in html
    rows = list(csv.DictReader(io.StringIO(result.paths["results.csv"].read_text(encoding="utf-8"))))
    assert len(rows) == len(rows_of(result)) == 2 * (1 + 6 * 2)
    assert float(rows[-1]["personal_nll"]) == rows_of(result)[-1].personal_nll
    assert max(len(line) for line in printed.splitlines() if "Written" not in line) <= 80


def test_quick_run_says_that_it_compares_nothing(quick: Any) -> None:
    result, printed, _ = quick
    assert "compares nothing" in result.report.findings[0].heading
    assert "smoke test" in result.report.findings[0].text
    assert "compares nothing" in printed


def test_progress_reaches_the_end_of_each_phase(quick: Any) -> None:
    _, _, calls = quick
    last = {what: (done, at_most) for what, done, at_most in calls}
    assert [what.split(", ")[1][0] for what in last] == ["A", "B", "C"] * 2
    assert all(done == at_most for done, at_most in last.values())


@pytest.mark.slow
def test_same_seed_same_figures_whatever_the_threads_and_global_seed(quick: Any) -> None:
    result, _, _ = quick
    folder = result.paths["demo.png"].parent
    before = json.loads(result.paths["results.json"].read_text(encoding="utf-8"))
    (folder / "notes.txt").write_text("not mine", encoding="utf-8")
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    run_demo(folder, seed=7, seeds=2, quick=True, console=Console(file=io.StringIO()))
    after = json.loads(result.paths["results.json"].read_text(encoding="utf-8"))
    assert without_seconds(before) == without_seconds(after)
    # The second run replaced its own files, left others, and left torch's state as it was.
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_each_seed_is_another_draw(quick: Any) -> None:
    result, _, _ = quick
    bases = [row for row in rows_of(result) if row.method == BASE]
    assert [row.seed for row in bases] == [7, 8] == [run.seed for run in result.runs]
    assert bases[0].personal_nll != bases[1].personal_nll


def test_rows_hold_each_method_at_each_checkpoint(quick: Any) -> None:
    result, _, _ = quick
    compared = [row for row in rows_of(result) if row.method != BASE]
    assert {row.learning_rate for row in rows_of(result) if row.method == BASE} == {None}
    assert {row.step for row in compared} == {2, 4}
    rates = {row.method: row.learning_rate for row in compared}
    assert rates.pop("SFT, 2× LR") == pytest.approx(8e-4)
    assert set(rates.values()) == {4e-4}
    assert len(rates) == 5
    assert all(row.seconds_per_step > 0 and row.time_vs_sft > 0 for row in compared)
    assert {row.time_vs_sft for row in rows_of(result) if row.method == "SFT"} == {1.0}


def test_defaults_of_the_recipe() -> None:
    assert LossRecipe.of(seed=0, seeds=None) == LossRecipe()
    assert LossRecipe().checkpoints == (0, 8, 16, 24, 28)


def test_exact_match_is_what_greedy_decoding_reproduces() -> None:
    """Compared with real decoding, on a model with so little training that some responses are right and some wrong."""
    world = LossWorld(0, dev_users=1, test_users=6)
    model = build_model(0)
    contestant = make_contestants(model, 4e-3)[0]
    batch = with_own_histories(world.test[:3])
    for _ in range(40):
        contestant.step(batch, None)
    test = UnseenUsers(world.test)
    with torch.no_grad():
        logits = hidden_states(contestant.model, test.own) @ contestant.model.lm_head.weight.T
    decoded = 0
    for index, example in enumerate(world.test):
        reference = encode(example.response)
        start = int(test.own.rows[test.own.sequence_ids == index][0]) - index * test.own.input_ids.shape[1] + 1
        ids = test.own.input_ids[index : index + 1, :start]
        for _ in reference:
            with torch.no_grad():
                ids = torch.cat([ids, contestant.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        decoded += ids[0, start:].tolist() == reference
    assert 0 < decoded < len(world.test)
    assert exact_match(logits, test.own) == pytest.approx(decoded / len(world.test))


def test_batch_rows_predict_their_labels_and_ignore_padding() -> None:
    world = LossWorld(1, dev_users=1, test_users=3)
    batch = with_own_histories(world.test)
    assert torch.equal(batch.input_ids.flatten()[batch.rows + 1], batch.labels)
    model = build_model(1)
    alone = make_batch(world.test[1:2], [world.test[1].history])
    with torch.no_grad():
        together = hidden_states(model, batch, chunk=2)[batch.sequence_ids == 1]
        torch.testing.assert_close(together, hidden_states(model, alone), rtol=1e-5, atol=1e-5)


def test_f1_counts_over_all_tokens() -> None:
    truth = torch.tensor([True, True, False, False])
    assert f1_score(truth, truth) == 1.0
    assert f1_score(torch.tensor([True, False, True, False]), truth) == 0.5
    assert f1_score(~truth, truth) == 0.0
    assert f1_score(torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)) == 0.0
