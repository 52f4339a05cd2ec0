"""`nextquill completion`: a shell script that completes commands and flags, made from their help."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nextquill.cli.flags import option
from nextquill.cli.main import COMMANDS, OK, main
from nextquill.cli.parsing import parse
from nextquill.cli.popi import SUBCOMMANDS

DESCRIPTION = (
    "Print a script that completes commands and flags on Tab. Write it to a file once, as it reads the help of every "
    "command, and source that file when a shell starts: nextquill completion bash > ~/.nextquill-completion.sh"
)


@dataclass
class CompletionOptions:
    """Shell: the one to complete in; the flag's name may be left out."""

    shell: str = option("The shell.", "bash", choices=["bash", "zsh"])


OPTIONS = (CompletionOptions,)
# Words that do not begin with a dash are values: an empty answer lets the shell complete file names.
_SCRIPT = """{start}_nextquill() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" name="${{COMP_WORDS[1]}}" words=""
    [[ $name == popi && $COMP_CWORD -gt 2 ]] && name="popi ${{COMP_WORDS[2]}}"
    if [[ $COMP_CWORD == 1 ]]; then words="{commands}"
    elif [[ $COMP_CWORD == 2 && $name == popi ]]; then words="{subcommands}"
    elif [[ $word == -* ]]; then
        case $name in
{flags}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _nextquill nextquill
"""


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    named = bool(arguments) and not arguments[0].startswith("-")
    (options,) = parse("completion", DESCRIPTION, OPTIONS, ["--shell", *arguments] if named else arguments)
    names = [name for name in COMMANDS if name != "popi"] + [f"popi {name}" for name in SUBCOMMANDS]
    flags = "\n".join(f'            "{name}") words="{" ".join(_flags(name))}" ;;' for name in names)
    start = "autoload -U bashcompinit && bashcompinit\n" if options.shell == "zsh" else ""
    print(
        _SCRIPT.format(start=start, commands=" ".join(COMMANDS), subcommands=" ".join(SUBCOMMANDS), flags=flags), end=""
    )
    return OK


def _flags(command: str) -> list[str]:
    """The flags that a command's help names; none where it runs in a checkout only."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        main([*command.split(), "--help"])
    return sorted(set(re.findall(r"(?<!\S)--\w+", out.getvalue())))
