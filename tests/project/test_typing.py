"""Pyright agrees with mypy on what a user's code may do. (Mypy checks all of `tests/` anyway.)"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from inspect import ismodule
from pathlib import Path
from typing import Any

from tests.project.surface import MEMBERS, PUBLIC, fields

API = Path(__file__).parent / "typing_api.py"


WRONG = """
from typing import assert_type
from prefetch_embeddings import PrefetchingEmbeddings
def check(embeddings: PrefetchingEmbeddings) -> None:
    assert_type(embeddings.is_ready("q"), int)
    embeddings.clear()  # type: ignore
"""


def _pyright(*arguments: str) -> list[dict[str, Any]]:
    """Return what pyright finds."""
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.stdout.startswith("{"), run.stdout + run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)["generalDiagnostics"]
    return found


def test_pyright_accepts_the_users_code_and_finds_its_errors(tmp_path: Path) -> None:
    (tmp_path / "api.py").write_text(API.read_text())
    (tmp_path / "wrong.py").write_text(WRONG)
    settings = {
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        "reportUnnecessaryTypeIgnoreComment": "error",
        # The file shows errors and unused values on purpose:
        "reportUnusedExpression": "none",
        "reportUnnecessaryComparison": "none",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    found = _pyright("--pythonpath", sys.executable, "--project", str(tmp_path))
    assert not [told for told in found if told["file"].endswith("api.py")]
    rules = [told["rule"] for told in found if told["file"].endswith("wrong.py")]
    assert rules == ["reportAssertTypeFailure", "reportUnnecessaryTypeIgnoreComment"]


def test_the_users_code_uses_the_whole_surface() -> None:
    nodes = list(ast.walk(ast.parse(API.read_text())))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words = {node.id for node in nodes if isinstance(node, ast.Name)} | attributes
    public = {name.rpartition(".")[2] for name, thing in PUBLIC.items() if not ismodule(thing)}
    members = {name.rpartition(".")[2] for name in MEMBERS}
    members |= {name for thing in PUBLIC.values() for name in fields(thing)}
    assert not public - words
    assert not members - attributes
