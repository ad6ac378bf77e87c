"""The rules of the house that a program can check: sizes, no circles, and privacy among modules."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.test_layers import imported, modules

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_CLASS = 320  # about 300

TOO_LONG_YET = {
    "speech",
    "speech.UtterancePrefetcher",
}
"""What is to be taken apart."""

TOUCHED_YET: dict[str, set[str]] = {}
"""Private names of others that are to be done without."""

MODULES = dict(modules())
EACH_MODULE = pytest.mark.parametrize("module", MODULES)


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def _too_long(module: str, path: Path) -> Iterator[str]:
    source = path.read_text("utf-8")
    if len(source.splitlines()) > MOST_LINES_OF_A_FILE:
        yield module
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MOST_LINES_OF_A_CLASS:
                yield f"{module}.{node.name}"


def test_no_file_and_no_class_is_too_long() -> None:
    assert {name for item in MODULES.items() for name in _too_long(*item)} == TOO_LONG_YET


def test_imports_close_no_circle() -> None:
    graph = {module: set(imported(_tree(module))) & MODULES.keys() for module in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is one


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _own_names(tree: ast.AST) -> set[str]:
    """Return the private names that a module gives to its own functions, classes and attributes."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if _is_private(name)}


def _modules_of_bases(tree: ast.AST) -> set[str]:
    """Return the modules of this package that hold a base class of one of this module's classes."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {ast.unparse(base).partition("[")[0] for cls in classes for base in cls.bases}
    return {
        node.module.removeprefix("prefetch_embeddings.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        if node.module.removeprefix("prefetch_embeddings.") in MODULES
        if bases & {alias.name for alias in node.names}
    }


def _touched(tree: ast.AST) -> set[str]:
    """Return the private names that a module touches and that are not its own."""
    own = _own_names(tree).union(*(_own_names(_tree(base)) for base in _modules_of_bases(tree)))
    touched = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if ast.unparse(node.value) == "super()" or node.attr not in own:
                touched.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            touched |= {alias.name for alias in node.names if _is_private(alias.name)} - {
                name.rpartition(".")[2] for name in MODULES
            }
    return touched


@EACH_MODULE
def test_no_private_name_of_others_is_touched(module: str) -> None:
    assert _touched(_tree(module)) == TOUCHED_YET.get(module, set())


@pytest.mark.parametrize(
    "line",
    [
        "threading._shutdown()",
        "executor._work_queue.put(1)",
        "from asyncio.events import _get_running_loop",
        "class Mine(Theirs):\n    def _f(self):\n        super()._f()",
        "class Mine(Theirs):\n    def f(self):\n        self._theirs = self._inherited",
    ],
)
def test_a_private_name_of_others_is_seen(line: str) -> None:
    assert len(_touched(ast.parse(line))) == 1


def test_ones_own_private_names_are_nobodys_business() -> None:
    source = "class A:\n    def __init__(self):\n        self._x = 0\ndef f(a):\n    return a._x"
    assert not _touched(ast.parse(source))
