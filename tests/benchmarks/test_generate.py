"""Suite `generate` runs with its peers, and does not time wrong tokens."""

import csv

import pytest

from benchmarks import generate, run, table


def test_plain_and_guided_decoding_are_timed_beside_their_peers(tmp_path, monkeypatch):
    file = tmp_path / "generate.csv"
    assert run.main(["--suite", "generate", "--quick", "--rounds", "2", "--csv", str(file)]) == 0
    with file.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["provider"], row["metric"], row["rounds"]) for row in rows] == [
        *((name, "time a token", "2") for name in (generate.PLAIN, generate.GUIDED)),
        *((f"transformers, {name}", "time a token", "2") for name in ("plain", "guided")),
        *((f"transformers, {name}", "time", "2") for name in ("a call each", "one batch", "cached history")),
        *((name, "time", "2") for name in (generate.PLAIN, generate.GUIDED)),
    ]
    assert all(float(row["value"]) > 0 for row in rows)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    shown = table.TABLES["generate"]()
    assert shown.count("| time |") == 4
    assert shown.count("| time a token |") == 3


@pytest.mark.parametrize("guided", [False, True])
def test_a_wrong_token_is_not_timed(guided, tmp_path, monkeypatch, capsys):
    honest = generate.Ours.__call__

    def wrong(self):
        honest(self)
        if guided == (self.prompts[0].against is not None):
            self.responses[0][1] = (self.responses[0][1] + 1) % 256

    monkeypatch.setattr(generate.Ours, "__call__", wrong)
    file = tmp_path / "generate.csv"
    assert run.main(["--suite", "generate", "--quick", "--csv", str(file)]) == 1
    assert "from best" in capsys.readouterr().err
    assert not file.exists()
