"""The fenced blocks of a page: found, and run as a reader would, in the folder where one is."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nextquill.cli.main import main
from nextquill.models.tiny_models import SCRATCH_SIZES, build_model, build_tokenizer

ROOT = Path(__file__).parent.parent
#: What a reader runs but a test cannot: it installs, downloads, uploads or serves, or is `make`, tested by CI itself.
NOT_RUN = ("pip", "hf", "make", "vllm", "transformers")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Block(NamedTuple):
    """A fenced block on a page."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [
        Block(page, text.count("\n", 0, each.start()) + 1, *each.groups())
        for each in found
        if each[1] in languages and "--8<--" not in each[3]
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each line of a shell block; a line that ends with a backslash is joined to the next."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run(words: list[str]) -> str:
    """Run `nextquill` in this process; what it prints, to both streams.

    Raises:
        AssertionError: it fails.
    """
    assert words[0] == "nextquill", words
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(words[1:])
    assert code == 0, f"{shlex.join(words)}: {out.getvalue()}"
    return out.getvalue()


def write_files(page: Path) -> None:
    """Write the blocks with a title, which is a file's name."""
    for block in blocks(page, "python", "json", "csv"):
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")


def run_page(page: Path) -> dict[str, str]:
    """Run every block from top to bottom, each Python block by itself: it must name all that it uses.

    Returns:
        What each block that ran printed, by its id.
    """
    write_files(page)
    printed = {}
    for block in blocks(page, "python", "bash"):
        if block.title is not None:
            continue
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, block.id, "exec"), {"__name__": "__main__"})
            printed[block.id] = out.getvalue()
        else:
            run_here = [words for words in commands(block) if words[0] not in NOT_RUN]
            printed[block.id] = "".join(map(run, run_here))
    return printed


def make_model(folder: Path) -> None:
    """Write a tiny chat model, new and untrained, as pages expect one in the folder `model`."""
    size = SCRATCH_SIZES["tiny"]
    tokenizer = build_tokenizer([page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")], 600)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    build_model(size, 0, vocabulary=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
