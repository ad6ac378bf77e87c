"""Whatever is public says what it does, and what each of its parameters is."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from typing import Any

import pytest

from tests.project.surface import MEMBERS, PUBLIC

EVERYTHING = PUBLIC | MEMBERS
CALLABLES = {
    name: thing
    for name, thing in EVERYTHING.items()
    if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, enum.Enum))
}


def _sections(docstring: str | None) -> dict[str, list[str]]:
    """Return the names that each Google-style section describes."""
    sections: dict[str, list[str]] = {}
    section: list[str] | None = None
    for line in inspect.cleandoc(docstring or "").splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            section = sections.setdefault(heading[1], [])
        elif line and not line.startswith(" "):
            section = None
        elif section is not None and (entry := re.match(r"    \*{0,2}(\w+):", line)):
            section.append(entry[1])
    return sections


def _parameters(thing: Any) -> list[str]:
    function = thing.__init__ if inspect.isclass(thing) else thing
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _is_to_be_called(thing: Any) -> bool:
    """Tell whether it has several arguments of its own to explain."""
    if dataclasses.is_dataclass(thing):
        return False  # its attributes are explained
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return False
    function = thing.__init__ if inspect.isclass(thing) else thing
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    own = kinds[1:] if inspect.isclass(thing) else kinds
    return sum(kind is not inspect.Parameter.VAR_KEYWORD for kind in own) > 1


def test_the_public_surface_is_found() -> None:
    assert "prefetch_embeddings.PrefetchingEmbeddings" in PUBLIC
    assert "prefetch_embeddings.testing.ScriptedEmbeddings" in PUBLIC
    assert "prefetch_embeddings.instrumentation.prometheus.instrument" in PUBLIC
    assert "prefetch_embeddings.PrefetchingEmbeddings.underlying_embeddings" in MEMBERS
    assert "prefetch_embeddings.PrefetchingEmbeddings.aembed_query" in MEMBERS
    assert not any("._" in name for name in EVERYTHING)


@pytest.mark.parametrize("name", EVERYTHING)
def test_it_has_a_docstring(name: str) -> None:
    thing = EVERYTHING[name]
    docstring = thing.__doc__
    assert docstring, f"{name} says nothing"
    if inspect.isclass(thing):
        assert not docstring.startswith(f"{thing.__name__}("), "made by dataclasses"
    first = inspect.cleandoc(docstring).split("\n\n")[0]
    assert first.endswith((".", ":", "?")), f"{name} begins with no sentence: {first}"


@pytest.mark.parametrize("name", CALLABLES)
def test_an_args_section_names_every_parameter_in_order(name: str) -> None:
    thing = CALLABLES[name]
    docstrings = [thing.__doc__]
    if inspect.isclass(thing):  # either place will do
        docstrings.append(thing.__init__.__doc__)
    for docstring in docstrings:
        listed = _sections(docstring).get("Args")
        assert listed in (None, _parameters(thing))


@pytest.mark.parametrize(
    "name",
    [name for name, thing in PUBLIC.items() if name in CALLABLES and _is_to_be_called(thing)],
)
def test_what_a_user_makes_or_calls_lists_its_arguments(name: str) -> None:
    thing = PUBLIC[name]
    docstrings = [thing.__doc__, thing.__init__.__doc__ if inspect.isclass(thing) else None]
    assert any("Args" in _sections(docstring) for docstring in docstrings)


@pytest.mark.parametrize(
    "name", [name for name, thing in PUBLIC.items() if dataclasses.is_dataclass(thing)]
)
def test_a_dataclass_describes_its_fields_in_order(name: str) -> None:
    kind = PUBLIC[name]
    fields = [name for name in vars(kind).get("__annotations__", ()) if not name.startswith("_")]
    assert _sections(kind.__doc__).get("Attributes", []) == fields


def test_a_section_is_read_as_written() -> None:
    docstring = """Do this.

    Note: not a section.

    Args:
        a: One
            more: indented.
        **options: Others.

    Returns:
        An `x`: not an entry.
    """
    assert _sections(docstring) == {"Args": ["a", "options"], "Returns": []}
