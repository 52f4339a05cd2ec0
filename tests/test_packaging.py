"""The shipped sdist and wheel, their metadata, and the installed package in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nextquill

ROOT = Path(__file__).resolve().parents[1]


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


def _run(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
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
    files = "pyproject.toml README.md LICENSE CONTRIBUTING.md Makefile constraints.txt tests/test_packaging.py"
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
        "all", "cli", "dense", "dev", "docs", "flash-attn", "test", "train", "triton", "trl",
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
        if needed.name not in ("nextquill", "flash-attn", "sentence-transformers"):
            assert needed.specifier.contains(pins[canonicalize_name(needed.name)]), needed


_AT_WORK = """
import importlib.metadata
from pathlib import Path
import torch
import nextquill as nq
import nextquill_kernels

target = Path({target!r})
assert Path(nq.__file__).is_relative_to(target), nq.__file__
assert Path(nextquill_kernels.__file__).is_relative_to(target), nextquill_kernels.__file__

with_history, without = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
head = torch.randn(11, 8, requires_grad=True)
loss = nq.NextQuillLoss()(with_history, without, head, torch.tensor([1, 2, 3, -100, 4, 10]))
loss.backward()
assert loss.isfinite() and all(tensor.grad.abs().sum() > 0 for tensor in (with_history, without, head))

(installed,) = importlib.metadata.distributions(name="nextquill", path=[str(target)])
assert installed.version == nq.__version__
(command,) = installed.entry_points.select(group="console_scripts")
assert command.name == "nextquill" and callable(command.load())
print("done")
"""


@pytest.mark.slow
def test_installed_wheel_computes_a_loss_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"),
        *("--target", str(target), str(wheel)),
        cwd=elsewhere,
    )
    source = _AT_WORK.format(target=str(target.resolve()))
    assert _run("-c", source, cwd=elsewhere, PYTHONPATH=str(target)) == "done\n"
