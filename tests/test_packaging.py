"""The shipped sdist and wheel, their metadata, and the installed package in another folder."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nextquill

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel that builds from it, made offline with the environment's own hatchling."""
    folder = tmp_path_factory.mktemp("dist")
    _run("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def metadata(wheel: Path, wheel_files: list[str]) -> Message:
    (name,) = (each for each in wheel_files if each.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def _run(*arguments: str, cwd: Path, python: Path | None = None) -> str:
    """What a command prints, run by this Python or by that of an environment; nothing but what it installs is found."""
    done = subprocess.run(
        [sys.executable if python is None else str(python / SCRIPTS / "python"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return done.stdout


def _requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def _extra(metadata: Message, name: str) -> set[str]:
    """The requirements of an extra, with nested extras resolved."""
    adds = (each for each in _requirements(metadata) if each.marker and not each.marker.evaluate({"extra": ""}))
    linux = {"extra": name, "platform_system": "Linux"}
    return {each.name for each in adds if each.marker and each.marker.evaluate(linux)}


def test_wheel_is_pure_and_ships_the_two_packages_only(wheel: Path, wheel_files: list[str]) -> None:
    assert wheel.name == f"nextquill-{nextquill.__version__}-py3-none-any.whl"
    tops = {PurePosixPath(name).parts[0] for name in wheel_files}
    assert tops == {"nextquill", "nextquill_kernels", f"nextquill-{nextquill.__version__}.dist-info"}


def test_wheel_holds_every_module(wheel_files: list[str]) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("nextquill/**/*.py")}
    sources |= {
        path.relative_to(ROOT / "kernels").as_posix() for path in ROOT.glob("kernels/nextquill_kernels/**/*.py")
    }
    shipped = {name for name in wheel_files if name.endswith(".py")}
    assert shipped == sources


def test_wheel_holds_its_data_and_nothing_else(wheel_files: list[str]) -> None:
    others = {name for name in wheel_files if ".dist-info/" not in name and not name.endswith(".py")}
    assert {
        "nextquill/py.typed",
        "nextquill_kernels/py.typed",
        "nextquill/report/page.css",
        "nextquill/report/page.js",
    } <= others
    assert {PurePosixPath(name).suffix for name in others} <= {".typed", ".css", ".js", ".yaml", ".json", ".jsonl"}


def test_wheel_carries_the_licence(wheel_files: list[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_files)


def test_sdist_can_be_worked_on(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {PurePosixPath(each.name).relative_to(f"nextquill-{nextquill.__version__}") for each in archive}
    files = (
        "pyproject.toml README.md LICENSE CONTRIBUTING.md CHANGELOG.md CITATION.cff SECURITY.md Makefile "
        "constraints.txt tests/test_packaging.py benchmarks/run.py demos/kit/run.py"
    )
    assert {PurePosixPath(each) for each in files.split()} <= names
    assert PurePosixPath("kernels/__init__.py") not in names
    assert not {each for each in names if each.suffix == ".pyc" or ".venv" in each.parts}


def test_metadata_states_version_python_and_licence(metadata: Message) -> None:
    assert metadata["Name"] == "nextquill"
    assert metadata["Version"] == nextquill.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"]
    assert metadata.get_payload()


def test_torch_is_the_only_unconditional_dependency(metadata: Message) -> None:
    assert [str(each) for each in _requirements(metadata) if each.marker is None] == ["torch>=2.8"]


def test_extras_contain_one_another(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "all", "cli", "dense", "dev", "docs", "flash-attn", "gguf", "quantize", "tensorboard", "test", "train",
        "triton", "trl", "wandb",
    }  # fmt: skip
    train, cli, test, dev = (_extra(metadata, name) for name in ("train", "cli", "test", "dev"))
    assert train < cli < test < dev
    assert "transformers" in train
    assert _extra(metadata, "all") == cli | {"triton"}  # not flash-attn, which compiles against CUDA


def test_constraints_pin_every_dependency_within_its_range(metadata: Message) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        pins[canonicalize_name(pin.name)] = specifier.version
    for needed in _requirements(metadata):
        if needed.name not in ("nextquill", "flash-attn", "sentence-transformers", "tensorboard", "wandb"):
            assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), needed


# ---- installed elsewhere -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment outside the checkout with the wheel; torch and the extras are lent by this one.

    A path file lends them: PyPI's torch would bring gigabytes of CUDA libraries. Path files of a lent folder are not
    read, so an editable nextquill there stays out of sight.
    """
    folder = tmp_path_factory.mktemp("elsewhere") / "environment"
    _run("-m", "venv", str(folder), cwd=folder.parent)
    _pip(folder, "--no-deps", "--no-index", str(wheel))
    packages = _run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, python=folder).strip()
    Path(packages, "lent.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def native_environment(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with nextquill_ext, from the wheel that builds from its sdist."""
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    found = re.search(
        r"^requires = (\[.*\])$", (ROOT / "csrc/pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    needed = ast.literal_eval(found[1]) if found else pytest.fail("csrc/pyproject.toml: no build requirements")
    try:
        _pip(environment, *needed, *(() if shutil.which("cmake") else ("cmake>=3.18",)))
    except AssertionError as error:
        pytest.skip(f"what builds nextquill_ext cannot be had: {str(error).strip().splitlines()[-1]}")
    dist = tmp_path_factory.mktemp("native")
    _run("-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT / "csrc"), cwd=dist, python=environment)
    version = nextquill.__version__
    assert [path.name for path in dist.glob("*.tar.gz")] == [f"nextquill_ext-{version}.tar.gz"]
    (built,) = dist.glob(f"nextquill_ext-{version}-*.whl")
    _pip(environment, "--no-deps", "--no-index", "--force-reinstall", str(built))  # beside one that may be lent
    return environment


def _pip(environment: Path, *arguments: str) -> None:
    _run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *arguments,
        cwd=environment,
        python=environment,
    )


_AT_WORK = """
import contextlib
import importlib.metadata
import io
import sys
from pathlib import Path
import torch
import nextquill as nq
import nextquill_kernels

for module in (nq, nextquill_kernels):
    assert Path(module.__file__).is_relative_to(sys.prefix), module.__file__

with_history, without = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
head = torch.randn(11, 8, requires_grad=True)
loss = nq.NextQuillLoss()(with_history, without, head, torch.tensor([1, 2, 3, -100, 4, 10]))
loss.backward()
assert loss.isfinite() and all(tensor.grad.abs().sum() > 0 for tensor in (with_history, without, head))
assert importlib.metadata.version("nextquill") == nq.__version__
(command,) = importlib.metadata.distribution("nextquill").entry_points.select(group="console_scripts")
with contextlib.redirect_stderr(io.StringIO()) as said:
    assert command.load()(["demo"]) == 2
assert said.getvalue().startswith("nextquill: demo: the demos are part of the source tree, not of an installed package")
print("done")
"""

_NATIVE_AT_WORK = """
import importlib.metadata
import sys
from pathlib import Path
import torch
import nextquill as nq
import nextquill_ext

assert Path(nextquill_ext.__file__).is_relative_to(sys.prefix), nextquill_ext.__file__
assert importlib.metadata.version("nextquill_ext") == nextquill_ext.__version__ == nq.__version__
rows, head, labels = torch.randn(6, 8), torch.randn(11, 8), torch.tensor([1, 2, 3, -100, 4, 10])
native, plain = (nq.linear_token_nll(rows, head, labels, impl=impl) for impl in ("native", "torch"))
torch.testing.assert_close(native, plain)
print("done")
"""


@pytest.mark.slow
def test_installed_wheel_computes_a_loss_elsewhere(environment: Path) -> None:
    assert _run("-c", _AT_WORK, cwd=environment, python=environment) == "done\n"


@pytest.mark.slow
def test_installed_command_answers_elsewhere(environment: Path) -> None:
    for flag, said in (("--help", "usage: nextquill COMMAND"), ("--version", f"nextquill {nextquill.__version__}\n")):
        command = [environment / SCRIPTS / "nextquill", flag]
        done = subprocess.run(command, cwd=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(said)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_native_wheel_from_its_sdist_works_elsewhere(native_environment: Path) -> None:
    assert _run("-c", _NATIVE_AT_WORK, cwd=native_environment, python=native_environment) == "done\n"


# ---- what is said of a version -------------------------------------------------------------------------


def test_changelog_and_citation_know_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    released = [each for each in versions if each[0] != "Unreleased"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released[0] == (nextquill.__version__, citation["date-released"])
    assert citation["version"] == nextquill.__version__


def test_changelog_names_every_former_path() -> None:
    from nextquill.integrations import _NOW

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in _NOW if f"`{name}`" not in changelog] == []
