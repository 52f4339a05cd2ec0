"""Suite `prepare` runs, makes the records it describes, and does not time wrong results."""

import sys

import pytest

from benchmarks import measure, prepare, run
from nextquill.data import ExampleEncoder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "prepare.csv"
    assert run.main(["--suite", "prepare", "--quick", "--csv", str(file)]) == 0
    import csv

    with file.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_figures_are_there_for_both_kinds_of_records(rows):
    found = {(row["case"].split(", ")[0], row["provider"], row["metric"]) for row in rows}
    for case in prepare.CASES:
        assert {(case, name, "rate") for name in ("tokenizer", "prepare", "packed")} <= found
        metrics = ("throughput", "per_cpu_second")
        assert {(case, name, metric) for name in ("prepare", "packed") for metric in metrics} <= found
    if sys.platform.startswith("linux"):
        assert ("new texts", "prepare", "peak") in found


@pytest.mark.slow
def test_packing_takes_its_share(rows):
    rates = {row["provider"]: float(row["value"]) for row in rows if row["metric"] == "rate"}
    assert 0 < rates["packed"] < rates["prepare"]


def test_records_are_the_same_every_time_and_as_long_as_said():
    for case in prepare.CASES:
        records = list(prepare.make_records(case, 21, seed=3))
        assert records == list(prepare.make_records(case, 21, seed=3))
        assert records != list(prepare.make_records(case, 21, seed=4))
    assert len({record.user_id for record in records}) == 3
    assert records[1].history[:-1] == records[0].history[1:], "a log: what was written last stands last"
    texts = [item.text for record in prepare.make_records("new texts", 30, seed=0) for item in record.history]
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_records_have_about_two_thousand_tokens():
    encoder = ExampleEncoder(prepare.make_tokenizer(prepare.VOCABULARY), max_length=prepare.MAX_LENGTH)
    examples = encoder.encode_all(prepare.make_records("new texts", 50, seed=0))
    mean = sum(len(example.factual.input_ids) for example in examples) / 50
    assert 1800 < mean < 2048
    assert sum(example.history_kept < example.history_total for example in examples) > 40


def test_wrong_examples_are_not_timed(monkeypatch, capsys, tmp_path):
    own = prepare.PreparedDataset.__getitem__
    monkeypatch.setattr(prepare.PreparedDataset, "__getitem__", lambda self, i: own(self, (i + 1) % len(self)))
    assert run.main(["--suite", "prepare", "--quick", "--csv", str(tmp_path / "p.csv")]) == 1
    assert "record 0 differs from the record encoded alone" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_a_run_has_a_full_size(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(prepare, "run", lambda options: seen.append(options.full) or [])
    run.main(["--suite", "prepare", "--full", "--csv", str(tmp_path / "p.csv")])
    run.main(["--suite", "prepare", "--csv", str(tmp_path / "p.csv")])
    assert seen == [True, False]
    count, rounds = prepare.SIZES["full"]
    assert count * rounds == 100_000


def test_committed_figures_meet_what_is_claimed():
    path = measure.RESULTS / "prepare.csv"
    if not path.exists():
        pytest.skip("not measured yet")
    from benchmarks import table

    ratios = {
        (row["case"], row["provider"]): float(row["value"])
        for row in table.read("prepare.csv")
        if row["metric"] == "throughput"
    }
    assert {provider for _, provider in ratios} == {"prepare", "packed"}
    assert min(ratios.values()) >= 0.6, ratios
