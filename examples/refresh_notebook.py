"""Runs the notebook in a fresh kernel: ``python -m examples.refresh_notebook`` keeps its outputs.

Needs ``nbclient`` and ``ipykernel``.
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOK = Path(__file__).with_name("prefetching_rag.ipynb")
TIMEOUT_SECONDS = 120
SHORT_FOLDER = "/tmp"  # noqa: S108 - the path of a socket has room for some 100 characters


def read(path: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """Read a notebook."""
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    return notebook


def executed(path: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """Run a notebook, in its own folder, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = read(path)
    with tempfile.TemporaryDirectory(prefix="nb-", dir=SHORT_FOLDER) as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,
            config=_own_sockets(folder),
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _in_one_piece(cell.outputs)
    return notebook


def _own_sockets(folder: str) -> Config:
    """Settings of a kernel that talks through sockets in `folder`.

    Jupyter picks TCP ports that are free, and hopes that they still are when the kernel opens them.
    """
    config = Config()
    config.KernelManager.transport = "ipc"
    config.KernelManager.connection_file = f"{folder}/kernel.json"
    return config


def _in_one_piece(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs with what was printed at different moments put together."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


if __name__ == "__main__":
    fresh = executed()
    nbformat.validate(fresh)
    nbformat.write(fresh, NOTEBOOK)  # type: ignore[no-untyped-call]
