"""POPI in the study: who is trained on and measured, what a run's result holds, and the tables."""

import dataclasses
import json
import random

import pytest

from benchmarks.study import popi
from benchmarks.study.folder import RUNS
from nextquill.errors import ArgumentError, OutputExistsError
from nextquill.models.loading import load_model
from nextquill.popi.users import check_users

WORDS = [f"word{place}" for place in range(40)]


def write_pairs(path, users, each=4):
    lines = []
    for user in users:
        draw = random.Random(user)
        reasons = [" ".join(draw.choices(WORDS, k=5)) for _ in range(3 + 2 * each)]
        for place in range(each):
            chosen, rejected = reasons[3 + 2 * place : 5 + 2 * place]
            pair = {"prompt": f"Why {place}?", "chosen": chosen, "rejected": rejected}
            lines.append({"user_id": f"u{user}", "history": reasons[:3], **pair})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set and a model."""
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "preferences_train.jsonl", range(8))
    write_pairs(folder / "preferences_test_unseen.jsonl", range(20, 25))
    records = popi._records("toy", folder / "preferences_train.jsonl")
    model, tokenizer = load_model("tiny", records=lambda: records)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def study(world, out, data=None, **changes):
    preset = dataclasses.replace(popi.PRESETS["smoke"], **changes)
    return popi.PopiStudy(out, preset, str(world / "model"), "toy", data or world)


def flags(world, out, *others):
    return ["--preset", "smoke", "--model", str(world / "model"), "--data", f"toy={world}", "--out", str(out), *others]


def test_the_untrained_model_comes_first_and_the_others_need_it(world, tmp_path):
    runs = study(world, tmp_path, seeds=(1, 2)).runs()
    assert [run.name for run in runs] == ["base", "popi-seed1", "popi-seed2"]
    assert [run.needs for run in runs] == [(), ("base",), ("base",)]


def test_signals_are_texts_of_people_who_are_in_one_set(world, tmp_path):
    made = study(world, tmp_path)
    train, test = made.users()
    assert {user.user_id.split()[0] for user in train}.isdisjoint(user.user_id for user in test)
    assert (len(train), len(test)) == (8, 4), "16 pairs of 8 people, two for each; four of five test people"
    assert sum(len(user.pairs) for user in test) == 8
    size = made.preset.config.pairs_per_user
    assert all(len(user.pairs) == size and len(user.items) == 3 for user in train)
    assert check_users(train, num_pairs=size, num_signals=3).skipped == 0
    assert made.users() == (train, test)


def test_unusable_data_is_named(world, tmp_path, capsys):
    with pytest.raises(ArgumentError, match="data: expected at least 9 test people in toy, got 4"):
        study(world, tmp_path, least=9).users()
    with pytest.raises(ArgumentError, match=r"data: expected toy=.* to hold preferences_train.jsonl"):
        study(world, tmp_path, tmp_path).users()
    write_pairs(tmp_path / "preferences_train.jsonl", range(4))
    write_pairs(tmp_path / "preferences_test_unseen.jsonl", [3, 20, 21])
    with pytest.raises(ArgumentError, match=r"'u3' is in preferences_train.jsonl and in preferences_test_unseen.jsonl"):
        study(world, tmp_path, tmp_path).users()
    assert popi.main([*flags(world, tmp_path / "out"), "--data", f"more={world}"]) == 1
    assert "study: data: expected one data set, NAME=FOLDER, got 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        popi.main(flags(world, tmp_path / "out", "--run", "popi-seed9"))
    assert "--run: expected one of base, popi-seed1, got 'popi-seed9'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    """The folder of a finished study, whose runs were made in this process."""
    out = tmp_path_factory.mktemp("popi") / "out"
    study(world, out).open()
    for name in ("base", "popi-seed1"):
        assert popi.main(flags(world, out, "--run", name)) == 0
    return out


def results(out):
    return (json.loads((out / RUNS / f"{name}.json").read_text()) for name in ("base", "popi-seed1"))


def test_a_result_has_every_context_and_the_summaries(out, world):
    base, trained = results(out)
    assert set(base["scores"]) == {"none", "signals", "summary", "placebo"}
    assert set(trained["scores"]) == {"none", "signals", "summary", "placebo", "before"}
    assert all(margin == 0 for _, _, margin, *_ in base["scores"]["none"]), "the untrained model is its own reference"
    assert any(margin != 0 for _, _, margin, *_ in trained["scores"]["none"])
    assert trained["steps"] == 2
    assert not list((out / "work").glob("popi-seed1")), "a finished run leaves nothing there"
    for result in (base, trained):
        assert len(result["scores"]["summary"]) == 8
        assert set(result["summaries"]) == {row[0] for row in result["scores"]["summary"]}
        assert all(text.startswith(popi.TEMPLATES.opening) for text in result["summaries"].values() if text)
        assert [len(sample["signals"]) for sample in result["samples"]] == [3] * 4
        assert 0 <= result["written"]["ended"] <= 1


def test_the_driver_has_nothing_left_to_do(out, world, capsys):
    before = [path.read_bytes() for path in sorted((out / RUNS).iterdir())]
    assert popi.main(flags(world, out)) == 0
    assert [path.read_bytes() for path in sorted((out / RUNS).iterdir())] == before


def test_a_study_with_other_settings_is_refused(out, world):
    with pytest.raises(OutputExistsError, match="holds a study with another preset"):
        study(world, out, steps=3).open()


def test_tables_state_every_context_and_difference(out, tmp_path):
    shown = popi.markdown(out)
    assert "2 runs are finished: 8 pairs of 4 people" in shown
    assert "| untrained | no context | 0.50 [0.50, 0.50] |" in shown
    assert "| POPI, 1 seed | own summary before training |" in shown
    base, trained = results(out)
    right = [(row[2] > 0) + (row[2] == 0) / 2 for row in trained["scores"]["summary"]]
    assert f"| POPI, 1 seed | own summary | {sum(right) / len(right):.2f} [" in shown
    assert "| POPI, 1 seed | another's summary | " in shown.split("own summary minus")[1]
    (tmp_path / RUNS).mkdir()
    assert popi.markdown(tmp_path) == "Not run yet.\n"
    (tmp_path / RUNS / "base.json").write_text(json.dumps(base))
    assert "| person | untrained |\n" in popi.markdown(tmp_path), "tables come with every finished run"


def test_a_models_text_stays_in_its_cell():
    assert popi._cell("a | b\n<script>") == "a \\| b &lt;script>"
