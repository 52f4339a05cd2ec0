"""The documentation is true: names, links, figures, code and commands are checked against the package."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import pytest
import yaml

from nextquill.cli import parsing
from nextquill.cli.main import COMMANDS, main
from nextquill.cli.popi import SUBCOMMANDS
from nextquill.comparison.arms import ARMS, BASE
from nextquill.data import parse_record, read_jsonl
from nextquill.data.loaders import FORMATS
from nextquill.evaluation.results import read_evaluation, read_item_effects
from nextquill.generation.writer import prompt_for
from tests.snippets import blocks, commands, make_model, run, run_page, write_files
from tests.test_architecture import MAY_IMPORT

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: Packages whose names are for use inside the library.
INTERNAL = {"nextquill.ops", "nextquill.reference"}


def all_blocks(*languages: str) -> list:
    return [pytest.param(block, id=block.id) for page in PAGES for block in blocks(page, *languages)]


# ---- the reference -------------------------------------------------------------------------------------


def documented() -> dict[str, set[str]]:
    """The names that the reference shows, by the module that defines them."""
    shown: dict[str, set[str]] = {}
    for page in (DOCS / "reference").glob("*.md"):
        for found in re.finditer(
            r"^::: (\S+)\n((?:    .*\n|\n(?=    ))*)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            options = (yaml.safe_load(found[2]) or {}).get("options", {})
            members = options.get("members")
            names = public_names(found[1], constants=False) if members is None else set(members or ())
            shown.setdefault(found[1], set()).update(names)
    return shown


def public_names(module: str, *, constants: bool = True) -> set[str]:
    """The public names that a module defines at its top level. Constants are only shown on request."""
    path = ROOT.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif constants and isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


PACKAGES = sorted(
    name
    for path in (ROOT / "nextquill").rglob("__init__.py")
    if "__all__" in path.read_text(encoding="utf-8")
    and (name := ".".join(path.parent.relative_to(ROOT).parts)) not in INTERNAL
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    shown = documented()
    everywhere = set().union(*shown.values())
    module = importlib.import_module(package)

    def is_shown(name):
        value = getattr(module, name)
        home = getattr(value, "__module__", None)
        if isinstance(value, type(sys)):
            return value.__name__ in shown
        return name in (everywhere if home is None or not home.startswith("nextquill") else shown.get(home, ()))

    assert [name for name in module.__all__ if not is_shown(name)] == []


def test_the_reference_names_nothing_that_is_not_there():
    missing = [f"{module}.{name}" for module, names in documented().items() for name in names - public_names(module)]
    assert missing == []


def test_a_name_that_is_left_out_is_noticed(monkeypatch):
    shown = documented()
    shown["nextquill.losses"].discard("PerCELoss")
    monkeypatch.setitem(globals(), "documented", lambda: shown)
    with pytest.raises(AssertionError, match="PerCELoss"):
        test_every_public_name_is_in_the_reference("nextquill")


# ---- pages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_to_files(page):
    """Links as GitHub reads them; the site's build also checks them and their anchors."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_lines_are_not_long(page):
    lines = [
        line
        for line in page.read_text(encoding="utf-8").splitlines()
        if not line.startswith(
            ("|", "{", "Examples/s", "Times", "Speed", "Peak memory of the process:")
        )  # tables, data, and the lines below generated tables
    ]
    assert [line for line in lines if len(line) > 120] == []


def test_figures_of_the_guide_are_the_ones_that_were_measured():
    """Each number with a decimal point is in the README, the benchmarks' tables or the negative results."""
    pages = (ROOT / "README.md", DOCS / "benchmarks.md", DOCS / "design" / "negative-results.md")
    sources = "".join(page.read_text(encoding="utf-8") for page in pages)
    measured = {float(number) for number in re.findall(r"\d*\.\d+", sources)}
    guide = (DOCS / "guides" / "choosing-a-loss.md").read_text(encoding="utf-8")
    assert [number for number in re.findall(r"\d*\.\d+", guide) if float(number) not in measured] == []


@pytest.mark.parametrize("block", [param for param in all_blocks("json") if param.values[0].title is None])
def test_records_are_records(block):
    parse_record(json.loads(block.text), block.id)


def test_the_picture_of_the_parts_names_packages_and_commands():
    picture = (DOCS / "parts.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="name"[^>]*>(\w+)<', picture)
    packages = {path.parent.name for path in (ROOT / "nextquill").glob("*/__init__.py")}
    assert packages - {*names, "reference", "storage", "integrations"} == set()
    assert [name for name in names if importlib.util.find_spec(f"nextquill.{name}") is None] == []
    commands = re.search(r">nextquill ([a-z· ]+)<", picture)
    assert commands is not None
    assert sorted(commands[1].split(" · ")) == sorted(COMMANDS)


def test_the_map_of_imports_is_that_of_the_architecture():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Who imports whom") : text.index("## How a result is believed")]
    arrows = re.findall(r"(\w+) ─► (?=(\w+))", section)
    assert len(arrows) > 10
    assert [(a, b) for a, b in arrows if a in MAY_IMPORT and b in MAY_IMPORT and b not in MAY_IMPORT[a]] == []
    parts = {name for arrow in arrows for name in arrow} | {"nextquill_ext", "reference"}
    assert parts <= {*MAY_IMPORT, "nextquill_ext", "triton", "torch"}
    packages = {path.parent.name for path in (ROOT / "nextquill").glob("*/__init__.py")} - {"integrations"}
    assert [name for name in packages if not re.search(rf"\b{name}\b", section)] == []


# ---- code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", all_blocks("python"))
def test_python_is_valid(block):
    ast.parse(block.text, filename=block.id)


def test_every_example_program_is_shown():
    """Programs are shown in a form that ruff's formatter does not change, as it would take a single line for Python."""
    shown = re.findall(r"^--8<--\nexamples/(\w+\.py)\n--8<--$", (DOCS / "examples.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_the_worked_example_prints_what_its_comments_say():
    names, checked = {}, 0
    for block in blocks(DOCS / "guides" / "reading-effects.md", "python"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block.text, block.id, "exec"), names)
        said = re.findall(r"^print\(.*?\)  # ([\d.]+) and ([\d.]+):", block.text, re.MULTILINE)
        printed = [re.findall(r"-?\d+\.\d+", line) for line in out.getvalue().splitlines()]
        assert [[f"{float(number):.4f}" for number in pair] for pair in said] == printed
        checked += len(said)
    assert checked == 5


# ---- commands ------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Stops a command after its words are parsed."""


def check_command(words: list[str]) -> None:
    """Let nextquill parse a command's flags without running it.

    Raises:
        AssertionError: nextquill refuses them; the message is its own.
    """
    with (
        mock.patch.object(parsing, "_instantiate", side_effect=Parsed),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            code = main(words)
        except Parsed:
            return
    raise AssertionError(f"nextquill {shlex.join(words)}: exit code {code}: {said.getvalue()}")


@pytest.mark.parametrize("block", all_blocks("bash"))
def test_commands_and_flags_exist(block):
    for words in commands(block):
        if words[0] == "nextquill":
            check_command(words[1:])
        elif "nextquill.cli.main" in words:
            assert words[words.index("nextquill.cli.main") + 1] in COMMANDS


@pytest.mark.parametrize(
    "words",
    [
        ["trian"],
        ["train", "--train_file", "a.jsonl", "--model", "tiny"],  # without --output_dir
        ["train", "--train_file", "a", "--model", "tiny", "--output_dir", "o", "--los", "sft"],
        ["train", "--train_file", "a", "--model", "tiny", "--output_dir", "o", "--loss", "stf"],
    ],
    ids=["command", "missing", "flag", "value"],
)
def test_a_wrong_command_is_noticed(words):
    with pytest.raises(AssertionError, match="exit code 2"):
        check_command(words)


def test_every_format_is_shown_and_its_example_is_converted(tmp_path, monkeypatch):
    page = DOCS / "guides" / "data-formats.md"
    monkeypatch.chdir(tmp_path)
    converted = set()
    for block in blocks(page, "json", "csv", "bash"):
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "bash" and "hf://" not in block.text:
            for words in commands(block):
                run(words)
                assert read_jsonl(words[words.index("--output_file") + 1])
                converted.add(words[words.index("--format") + 1])
    assert converted == set(FORMATS)
    assert re.findall(r"^## (\w+): ", page.read_text(encoding="utf-8"), re.MULTILINE)[: len(FORMATS)] == list(
        dict.fromkeys(words[words.index("--format") + 1] for block in blocks(page, "bash") for words in commands(block))
    )


def test_every_arm_is_in_the_guide_on_comparing():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "guides" / "compare.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [BASE, *ARMS]


@pytest.mark.slow
def test_the_way_from_a_log_to_a_report_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(DOCS / "guides" / "from-log-to-report.md", "python", "bash"):
        if block.language == "python":
            exec(compile(block.text, block.id, "exec"), {})
        else:
            for words in commands(block):
                run(words)
    page = Path("report.html").read_text(encoding="utf-8")
    assert "runs/sft" in page or "sft" in page
    evaluated = read_evaluation(Path("runs/causal/evaluation"))
    assert evaluated.num_examples == 24
    assert {"nll_factual", "effect_placebo"} <= set(evaluated.metrics)
    assert len(read_item_effects(Path("runs/causal/evaluation"))) == 3


def run_tutorial() -> None:
    """Run the way from a log to texts, with the model in `model`, and check what it leaves."""
    run_page(DOCS / "guides" / "from-log-to-texts.md")
    assert read_evaluation(Path("runs/mine/evaluation")).num_examples == 24
    assert Path("report.html").is_file()
    lines = [json.loads(line) for line in Path("texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["history"] for line in lines] == ["own history"] * 2 + ["no history"] * 2 + ["history of user1"] * 2


def test_the_way_from_a_log_to_texts_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    run_tutorial()


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
@pytest.mark.skipif("NEXTQUILL_REAL_MODEL" not in os.environ, reason="NEXTQUILL_REAL_MODEL names no model's folder")
def test_the_way_from_a_log_to_texts_with_a_real_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(Path(os.environ["NEXTQUILL_REAL_MODEL"]).resolve())
    began = time.process_time()
    run_tutorial()
    assert time.process_time() - began < 30 * 60, "the tutorial promises half an hour"
    base, trained = (read_evaluation(Path(run)).metrics for run in ("runs/base", "runs/mine/evaluation"))
    assert trained["nll_factual"].value < base["nll_factual"].value
    assert trained["effect_placebo"].value > 0


def test_the_first_run_of_the_index_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run_page(DOCS / "index.md")
    assert "1 texts of the user in the prompt" in "".join(printed.values())


@pytest.mark.parametrize("name", ["data-formats", "migrating", "popi"])
def test_the_python_of_a_guide_runs_as_printed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    page = DOCS / "guides" / f"{name}.md"
    write_files(page)
    for block in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, block.id, "exec"), {})


def test_writing_runs_as_printed(tmp_path, monkeypatch):
    """The block that asks a server gets its answer from here."""
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    page = DOCS / "guides" / "writing.md"
    printed = "".join(run_page(page).values())
    assert "history of ben" in printed
    assert len(Path("texts.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    asked = []

    def answer(request):
        asked.append(json.loads(request.data))
        return io.BytesIO(b'{"choices": [{"text": "Fine, cheers!"}]}')

    monkeypatch.setattr("urllib.request.urlopen", answer)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(Path("ask.py").read_text(encoding="utf-8"), "ask.py", "exec"), {})
    assert out.getvalue() == "Fine, cheers!\n"
    assert asked[0]["prompt"] == prompt_for("merged", "Review of: Cafe Nero", ["Nice soup, cheers!"]).ids


# ---- the site ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    command_line = (tmp_path / "reference" / "command-line.html").read_text(encoding="utf-8")
    names = [*(name for name in COMMANDS if name != "popi"), *(f"popi-{name}" for name in SUBCOMMANDS)]
    assert [name for name in names if f'id="nextquill-{name}"' not in command_line] == []
    examples = re.sub("<[^>]*>", "", (tmp_path / "examples.html").read_text(encoding="utf-8"))
    assert "import torch" in examples
    assert "8 &lt;" not in examples
    inventory = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode("utf-8")
    shown = {line.split(" ", 1)[0] for line in inventory.splitlines()}
    assert [
        f"{module}.{name}"
        for module, names in documented().items()
        for name in names
        if f"{module}.{name}" not in shown
    ] == []
    for page in tmp_path.rglob("*.html"):
        elements = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert [each for each in elements if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", each)] == []
