"""The notebook runs in a fresh kernel, and is committed with the outputs of such a run."""

from __future__ import annotations

import getpass
import itertools
import json
import tempfile
from pathlib import Path

import nbformat
import pytest

from examples.refresh_notebook import NOTEBOOK, executed, read

ROOT = Path(__file__).parents[2]


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def assert_whole(notebook: nbformat.NotebookNode) -> None:
    """Assert that every cell ran, in order and without an error, and that there is much to see."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = list(itertools.chain.from_iterable(cell.outputs for cell in cells))
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "retrieval from partials" in printed


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return read(NOTEBOOK)


def test_it_is_committed_with_its_outputs(committed: nbformat.NotebookNode) -> None:
    nbformat.validate(committed)
    assert_whole(committed)


def test_it_tells_nothing_about_the_machine_it_ran_on(committed: nbformat.NotebookNode) -> None:
    text = json.dumps(committed)
    for telling in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "site-packages"):
        assert telling not in text
    user = getpass.getuser()
    assert f'"{user}"' not in text
    assert f"/{user}/" not in text
    assert set(committed.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in committed.cells)


def test_its_cells_are_short(committed: nbformat.NotebookNode) -> None:
    assert all(len(cell.source.splitlines()) <= 30 for cell in code_cells(committed))


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_runs_in_a_fresh_kernel(committed: nbformat.NotebookNode) -> None:
    fresh = executed()
    assert_whole(fresh)
    assert [cell.source for cell in fresh.cells] == [cell.source for cell in committed.cells]
