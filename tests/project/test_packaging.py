"""What the wheel and the sdist contain. Both are built as an installer would, without a network."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling builds the wheel")

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
PACKAGE = "prefetch_embeddings"


def _build(root: Path, into: Path, target: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    subprocess.run(command, check=True, cwd=root, capture_output=True)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the sdist; return its one folder."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(_build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from the sdist: so both are complete."""
    return zipfile.ZipFile(_build(sdist, tmp_path_factory.mktemp("wheel"), "wheel"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py")}
    assert names == {*modules, f"{PACKAGE}/py.typed"}


def test_the_wheel_says_what_it_needs_and_under_which_licence(wheel: zipfile.ZipFile) -> None:
    (metadata_name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(metadata_name))
    assert metadata["License-Expression"] == "MIT"
    assert metadata_name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(need.split(">")[0].split("<")[0] for need in needed) == [
        "langchain-core",
        "redis",
    ]


def test_the_sdist_holds_what_the_tests_need(sdist: Path) -> None:
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml"):
        assert (sdist / name).is_file(), name
    for folder in ("src", "tests", "examples", "benchmarks", "docs"):
        assert (sdist / folder).is_dir(), folder
    assert not list(sdist.rglob("__pycache__"))
    assert not list(sdist.glob(".venv*"))
