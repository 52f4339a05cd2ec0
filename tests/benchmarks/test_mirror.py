"""Suite `mirror` runs, and does not time a step with a wrong gradient."""

import csv

from benchmarks import mirror, run
from nextquill.mirror import MirrorLoss


def test_every_way_is_timed(tmp_path):
    file = tmp_path / "mirror.csv"
    assert run.main(["--suite", "mirror", "--quick", "--rounds", "2", "--csv", str(file)]) == 0
    with file.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    ways = {(row["loss"], row["provider"]) for row in rows if row["metric"] == "tokens"}
    assert {(method, way) for method in mirror.METHODS for way in (mirror.BASELINE, mirror.RESPONSE, "torch")} <= ways
    tokens = {(row["loss"], row["provider"]): float(row["value"]) for row in rows if row["metric"] == "tokens"}
    for method in mirror.METHODS:
        assert tokens[method, "torch"] < 0.6 * tokens[method, mirror.BASELINE]
    heads = {(row["provider"], row["head"]) for row in rows if row["head"]}
    assert {("divergence", "trained"), ("divergence", "frozen"), ("pair loss", "trained")} <= heads


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "MirrorLoss", lambda **options: MirrorLoss(beta=0.9, **options))
    file = tmp_path / "mirror.csv"
    assert run.main(["--suite", "mirror", "--quick", "--csv", str(file)]) == 1
    assert "differs by" in capsys.readouterr().err
    assert not file.exists()
