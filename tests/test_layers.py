"""Imports point downwards, in the order in which `docs/how-it-works.md` lists the modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield what a module imports of this package when it runs, and not for its types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, module = node.module.partition(".")
            if package == "prefetch_embeddings":
                yield from [module.partition(".")[0]] if module else [n.name for n in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            yield from _imported(node)


def _modules() -> Iterator[tuple[str, Path]]:
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.name != "__init__.py":
            yield place.with_suffix("").parts[0], path


def test_every_module_is_listed() -> None:
    assert {name for name, _ in _modules()} == set(LAYERS)


@pytest.mark.parametrize(("module", "path"), [pytest.param(n, p, id=p.stem) for n, p in _modules()])
def test_imports_point_downwards(module: str, path: Path) -> None:
    for other in _imported(ast.parse(path.read_text("utf-8"))):
        assert LAYERS[other] >= LAYERS[module], f"{module} knows {other}"


def test_an_import_that_points_upwards_is_seen() -> None:
    source = "def f():\n    from prefetch_embeddings.embeddings import PrefetchingEmbeddings"
    assert list(_imported(ast.parse(source))) == ["embeddings"]
    assert LAYERS["embeddings"] < LAYERS["flights"]
