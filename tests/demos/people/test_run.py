"""The demo of a real model, with a tiny one: its files, its figures, and what it refuses before it reads a text."""

from __future__ import annotations

import dataclasses
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from rich.console import Console

from demos.people import measuring, picture, run
from demos.people.measuring import (
    Answer,
    People,
    PeopleRecipe,
    ReadText,
    by_word,
    copied_from,
    partners,
    sample,
    split_words,
    strongest,
)
from nextquill.data import HistoryItem
from nextquill.errors import BudgetError, NextQuillError, OutputExistsError, UnsupportedModelError
from nextquill.models.tiny_models import SCRATCH_SIZES, build_model, build_tokenizer, training_texts

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save_model(folder: Path, positions: int = 4096) -> str:
    size = dataclasses.replace(SCRATCH_SIZES["tiny"], positions=positions)
    tokenizer = build_tokenizer(training_texts(sample(PeopleRecipe())), size.vocabulary)
    tokenizer.chat_template = CHAT
    model = build_model(
        size, 0, vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(scope="module")
def ran(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, People, str]:
    folder, out = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    people = run.run_demo(folder, model, quick=True, console=Console(file=out, width=100))
    return folder, people, out.getvalue()


def test_the_files_hold_what_was_measured(ran: tuple[Path, People, str]) -> None:
    folder, people, out = ran
    assert sorted(path.name for path in folder.iterdir()) == ["demo.html", "people.svg", "results.json"]
    assert People.from_json((folder / "results.json").read_text(encoding="utf-8")) == people
    records = sample(run._QUICK)
    assert ["".join(text.words) for text in people.texts] == [record.response for record in records]
    shown = [text for text in people.texts if text.items]
    assert [len(text.items) for text in shown] == [12]
    page = (folder / "demo.html").read_text(encoding="utf-8")
    assert page.count('data-against="other"') == len(shown)
    for answer in people.answers:
        assert list(answer.written) == ["0", "0.5", "1"]
        assert answer.own == records[answer.index].response
        assert f"as {answer.user}, γ = 0.5" in page
    assert "The run took" in out
    assert "people.svg" in out


def test_words_have_the_probabilities_of_separate_passes(ran: tuple[Path, People, str], model: str) -> None:
    people, records = ran[1], sample(run._QUICK)
    text, record = people.texts[0], records[0]
    other = next(each for each in records if each.user_id == partners(records)[record.user_id])
    writer = measuring.load_writer(model)
    for found, history in ((text.own, record.history), (text.none, ()), (text.other, other.history)):
        prompt, _ = writer.encoder.encode_prompt(record.query, history)
        response = writer.tokenizer(record.response, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = writer.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(response), reduction="none")
        pieces = [writer.tokenizer.decode([token]) for token in response]
        expected = (-by_word(nll, split_words(pieces)[1])).exp()
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, atol=1e-4, rtol=0)


def test_findings_follow_the_figures() -> None:
    items = [[3.0, 0.1, 0.9], [0.0, 0.0, 2.0], *[[0.0] * 3] * 10]
    text = ReadText(0, "w0580", ["a", " b", " c"], [0.2, 0.5, 0.6], [0.2, 0.5, 0.3], [0.2, 0.6, 0.3], "", items)
    assert strongest(text) == (1, 2, 2.0)  # the largest loss is of a word that the own history does not raise
    assert strongest(dataclasses.replace(text, own=text.other)) is None
    records = sample(PeopleRecipe())
    answer = Answer(0, "w0580", "It is odd", {"0": records[0].history[0].text, "1": "something else entirely"})
    texts = [dataclasses.replace(text, user=user) for user in "abc"]
    worth, words, past, guided = run.findings(People("m", texts, [answer]), records)
    assert "reads who is writing" in worth[0]
    assert "0.17 nats [0.17, 0.17]" in worth[1]  # (log 5/6 + log 2) / 3
    assert words[0] == "33% of the words become clearly more likely, 33% less"
    assert records[0].history[1].text in past[1]
    assert "100% at γ = 0, 0% at γ = 1" in guided[1]
    swapped = [dataclasses.replace(each, own=each.other, other=each.own, items=[]) for each in texts]
    assert [heading for heading, _ in run.findings(People("m", swapped, [answer]), records)] == [
        "No clear use of a person's own history", words[0], "What guidance does",
    ]  # fmt: skip


def test_words_and_copied_triples() -> None:
    words, starts = split_words(["A", "2", " is", " un", "clear", "."])
    assert words == ["A2", " is", " unclear."]
    assert by_word(torch.tensor([[1.0, 2, 4, 8, 16, 32]]), starts).tolist() == [[3, 4, 56]]
    past = [HistoryItem("I say A2 is unclear"), HistoryItem("is unclear. And more")]
    assert copied_from("A2 is UNCLEAR and odd", past) == (2, 3, [(0, 17)])
    assert copied_from("a b c d", [HistoryItem("a b"), HistoryItem("c d")]) == (0, 2, [])


def test_the_sample_is_what_its_note_says() -> None:
    records = sample(PeopleRecipe(texts=99))
    histories = {record.user_id: record.history for record in records}
    assert len(records) == 96
    assert len(histories) == 12
    assert {len(history) for history in histories.values()} == {12}
    first = {record.user_id: record.query for record in reversed(records)}
    assert all(first[user] == first[other] for user, other in partners(records).items())


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (64, "model_name_or_path: .*tokens"),
        (512, "model_name_or_path: expected a context that holds the 12 past texts"),
    ],
)
def test_a_short_context_is_refused(tmp_path: Path, positions: int, message: str) -> None:
    name = save_model(tmp_path / "short", positions)
    with pytest.raises(NextQuillError, match=message) as error:
        run.run_demo(tmp_path / "out", name, quick=True)
    assert isinstance(error.value, BudgetError) == (positions == 64)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_without_a_model_and_a_file_in_the_way_are_refused(tmp_path: Path, model: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModelError, match="no model in"):
        run.run_demo(tmp_path / "out", str(tmp_path / "empty"), quick=True)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="output_dir: expected a folder"):
        run.run_demo(tmp_path / "file", model, quick=True)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_the_picture_is_drawn_from_the_committed_results() -> None:
    drawn = picture.PICTURE.read_text(encoding="utf-8")
    people = People.from_json(picture.RESULTS.read_text(encoding="utf-8"))
    records = sample(PeopleRecipe())
    assert drawn == picture.picture(people, records), "run python -m demos.people.picture"
    swapped = dataclasses.replace(
        people, texts=[dataclasses.replace(t, own=t.other, other=t.own) for t in people.texts]
    )
    assert picture.picture(swapped, records) != drawn
    root = ET.fromstring(drawn)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    placed = [each for each in root.iter() if each.tag.endswith("text") and "textLength" in each.attrib]
    assert len(placed) == len(re.findall("textLength", drawn)) > 10
    assert all(float(t.attrib["x"]) + float(t.attrib["textLength"]) <= width for t in placed)
    assert all(float(t.attrib["y"]) < height for t in placed)
