"""`completion`: what bash offers on Tab, from the script as printed."""

import shutil
import subprocess

import pytest

from nextquill.cli.main import COMMANDS

ASK = """
source "$1"; shift
COMP_WORDS=(nextquill "$@"); COMP_CWORD=$#
_nextquill
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def offered(nextquill, tmp_path_factory):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    script = tmp_path_factory.mktemp("completion") / "script"
    script.write_text(nextquill("completion", "bash").out)

    def ask(*words):
        run = subprocess.run(["bash", "-c", ASK, "-", script, *words], capture_output=True, text=True, check=True)
        assert run.stderr == ""
        return run.stdout.split()

    return ask


def test_commands_and_flags_are_offered(offered):
    assert offered("") == list(COMMANDS)
    assert offered("gen") == ["generate"]
    assert offered("popi", "su") == ["summarize", "summaries"]
    assert offered("generate", "--guid") == ["--guidance", "--guidance_against"]
    assert offered("train", "--train_f") == ["--train_file"]
    assert offered("popi", "train", "--group") == ["--group_size"]


def test_values_are_left_to_the_shell(offered):
    assert offered("train", "--train_file", "") == []
    assert offered("convert", "posts") == []


def test_zsh_gets_the_same_script_after_its_own_start(nextquill):
    bash, zsh = (nextquill("completion", "--shell", shell).out for shell in ("bash", "zsh"))
    assert zsh == "autoload -U bashcompinit && bashcompinit\n" + bash
    refused = nextquill("completion", "fish")
    assert refused.code == 2
    assert "argument --shell: invalid choice: 'fish'" in refused.err
