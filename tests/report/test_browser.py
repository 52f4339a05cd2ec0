"""The page in a real browser: it opens fast, works by pointer and by key, and makes no requests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextquill.report.html import render_page
from nextquill.report.run_page import runs_page
from nextquill.report.runs import read_run
from tests.report.browser import CHROMIUM, Browser
from tests.report.example_runs import write_evaluation, write_training

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

HOSTILE = [
    "<script>document.title='owned'</script>",
    " <img src=x onerror=\"document.title='owned'\">",
    *(" \"quoted'", "\u202e", " مرحبا", " שלום", " " + "x" * 300, "\n", " 👩‍👩‍👧‍👦", "\x00", "", "\ud800"),
    *(" </p></article>", "-->", " " + "long " * 2000),
]


def hostile(draw: random.Random, count: int) -> list[str]:
    return [draw.choice(HOSTILE) for _ in range(count)]


def write_page(path: Path, folders: list[Path], examples: int) -> Path:
    path.write_text(render_page(runs_page([read_run(folder) for folder in folders], examples=examples)), "utf-8")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    for name, gain in (("a", 0.0), ("b", 0.3)):
        write_evaluation(write_training(root / name) / "evaluation", gain=gain)
    return write_page(root / "page.html", [root / "a", root / "b"], 6)


@pytest.fixture
def browser(page: Path) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(page)
        yield browser
        assert browser.errors == []


def readout(browser: Browser) -> str:
    text = browser.run("(r => r.hidden ? '' : r.textContent)(document.querySelector('#readout'))")
    assert isinstance(text, str)
    return text


def test_sixty_thousand_tokens_open_in_two_seconds(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "big", examples=200, tokens=300, items_of=range(20))
    path = write_page(tmp_path / "big.html", [folder], 200)
    assert path.stat().st_size < 5e6
    loads = []
    for _ in range(3):  # the machine may be busy once
        with Browser() as browser:
            browser.open(path)
            assert browser.run("document.querySelectorAll('.tokens > span').length") == 60_000
            loads.append(browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(loads) < 2000, loads


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_nothing_is_wider_than_the_screen_and_no_text_comes_alive(
    page: Path, tmp_path: Path, kind: str, width: int
) -> None:
    if kind == "hostile":
        page = write_page(tmp_path / "x.html", [write_evaluation(tmp_path / "x", examples=6, text=hostile)], 6)
    with Browser(width, 20_000) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.title").startswith("nextquill: ")
        assert browser.run("document.querySelectorAll('article').length") == 6
        assert browser.run("document.querySelectorAll('article img').length") == 0
        assert browser.errors == []


def test_pointing_at_a_token_says_its_probabilities(browser: Browser) -> None:
    browser.point(".tokens > span:nth-child(5)")
    own, none, other = browser.run("document.querySelector('.tokens > span:nth-child(5)').dataset.p").split(" ")
    said = readout(browser)
    for line in (f"with the history: {own}%", f"without it: {none}%", f"with another user's: {other}%", "points"):
        assert line in said
    browser.point("h1")
    assert readout(browser) == ""


def test_each_response_is_one_tab_stop_with_arrows_inside(browser: Browser) -> None:
    focused = "[...document.querySelectorAll('.tokens > span')].indexOf(document.activeElement)"
    browser.run("document.querySelector('.tokens > span').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.run(focused) == 2
    assert browser.run("document.activeElement.getAttribute('aria-label')") == ", ".join(readout(browser).split("\n"))
    browser.press("End")
    assert browser.run(focused) == 24
    browser.press("ArrowRight")
    assert browser.run(focused) == 24, "not into the next response"
    browser.press("Escape")
    assert readout(browser) == ""
    assert browser.run("document.querySelectorAll('.tokens')[0].querySelectorAll('[tabindex]').length") == 1
    assert browser.run("document.querySelectorAll('.tokens [aria-label]').length") == 1


def test_a_token_shows_its_items_and_an_item_its_tokens(browser: Browser) -> None:
    at = "(e => [...e.querySelectorAll('.items li')].map(row => row.dataset.e.split(' ').map(Number)))"
    variant = "document.querySelector('.variant:has(.items)')"
    effects = browser.run(f"{at}({variant})")
    totals = browser.run(f"[...{variant}.querySelectorAll('.nats')].map(e => Number(e.textContent))")
    assert totals == pytest.approx([sum(row) for row in effects], abs=0.02)
    browser.point(".variant:has(.items) .tokens > span:nth-child(3)")
    shown = browser.run(f"[...{variant}.querySelectorAll('.nats')].map(e => Number(e.textContent))")
    assert shown == pytest.approx([row[2] for row in effects], abs=0.006)
    browser.point("h1")
    assert browser.run(f"[...{variant}.querySelectorAll('.nats')].map(e => Number(e.textContent))") == totals

    classes = f"[...{variant}.querySelectorAll('.tokens > span')].map(e => e.className)"
    before = browser.run(classes)
    browser.run(f"{variant}.querySelector('.items button').click()")
    full = browser.run(f"Number({variant}.querySelector('.items').dataset.full)")
    for name, effect in zip(browser.run(classes), effects[0], strict=True):
        size = round(min(1, abs(effect) / full) * 10)
        assert name in ({"", f"p{size}"} if effect > 0 else {"", f"n{size}"})
        assert bool(name) == (abs(effect) / full >= 0.05)
    assert "coloured by what they lose without" in browser.run(f"{variant}.querySelector('.coloured').textContent")
    browser.run(f"{variant}.querySelector('.items button').click()")
    assert browser.run(classes) == before


def test_curves_are_read_by_pointer_and_by_key(browser: Browser) -> None:
    for _ in range(2):  # the cards above are laid out on the way, which moves the plot
        browser.point(".plot")
    assert readout(browser).startswith("steps 30\na, training: ") or readout(browser).startswith("steps 26\n")
    browser.run("document.querySelector('.plot').focus()")
    browser.press("End")
    data = browser.run("[...document.querySelectorAll('.plot')[0].querySelectorAll('.curve')].map(e => e.dataset.y)")
    last = [values.split(" ")[-1] for values in data]
    assert readout(browser).split("\n")[0] == "steps 60"
    assert [line.split(": ")[1] for line in readout(browser).split("\n")[1:]] == last
    browser.press("ArrowLeft")
    assert readout(browser).split("\n")[0] == "steps 58"


def test_without_script_everything_is_there(page: Path) -> None:
    """Only the parts made by scripts are missing; the text is the same."""
    texts = []
    for script in (True, False):
        with Browser(1440, 20_000, script=script) as browser:
            browser.open(page)
            text = browser.call("DOM.getOuterHTML", nodeId=browser.call("DOM.getDocument", depth=-1)["root"]["nodeId"])
            texts.append(text["outerHTML"].split("<script>")[0].replace(' class="js"', ""))
    assert texts[0] == texts[1]


def test_printing_shows_every_card(page: Path, tmp_path: Path) -> None:
    with Browser() as browser:
        browser.open(page)
        browser.pdf(tmp_path / "page.pdf")
        browser.call("Emulation.setEmulatedMedia", media="print")
        shown = browser.run("[...document.querySelectorAll('.card')].map(e => getComputedStyle(e).contentVisibility)")
    assert set(shown) == {"visible"}
    assert (tmp_path / "page.pdf").stat().st_size > 50_000
