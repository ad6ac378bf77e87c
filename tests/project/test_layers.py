"""Imports point downwards, in the order in which `docs/how-it-works.md` lists the modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/prefetch_embeddings"


def _layers() -> dict[str, int]:
    """Return in which row each module stands; the row at the bottom has the highest number."""
    page = (ROOT / "docs/how-it-works.md").read_text("utf-8")
    _, _, table = page.partition("## Where what is\n")
    rows = re.findall(r"^\| (`.*?) \|", table.partition("\n## ")[0], re.M)
    listed = [(name, n) for n, row in enumerate(rows) for name in re.findall("`(.*?)`", row)]
    layers = dict(listed)
    assert len(layers) == len(listed), "a module stands in two rows"
    return layers


LAYERS = _layers()


def _layer(module: str) -> int:
    """Return the row of a module, or of the nearest package around it that has one."""
    while module not in LAYERS:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} has no row"
    return LAYERS[module]


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield what a module imports of this package when it runs, and not for its types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, module = node.module.partition(".")
            if package == "prefetch_embeddings":
                for name in node.names:
                    full = f"{module}.{name.name}" if module else name.name
                    yield full if _is_module(full) else module
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            yield from imported(node)


def _is_module(name: str) -> bool:
    place = PACKAGE.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def test_every_module_is_listed_and_nothing_else() -> None:
    for name, _ in modules():
        _layer(name)
    for name in LAYERS:
        assert _is_module(name), f"{name} is listed, and not there"


@pytest.mark.parametrize(("module", "path"), [pytest.param(n, p, id=n) for n, p in modules()])
def test_imports_point_downwards(module: str, path: Path) -> None:
    for other in imported(ast.parse(path.read_text("utf-8"))):
        assert _layer(other) >= _layer(module), f"{module} knows {other}"


def test_an_import_that_points_upwards_is_seen() -> None:
    source = "def f():\n    from prefetch_embeddings.embeddings import PrefetchingEmbeddings"
    assert list(imported(ast.parse(source))) == ["embeddings"]
    assert _layer("embeddings") < _layer("_flights.map")
