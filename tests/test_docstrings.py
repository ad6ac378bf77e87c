"""Whatever is public says what it does, and what each of its parameters is."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import prefetch_embeddings


def _public_names() -> Iterator[tuple[str, Any]]:
    """Yield each public name with what it is: modules with an `__all__`, and what these list."""
    found = pkgutil.walk_packages(prefetch_embeddings.__path__, "prefetch_embeddings.")
    for module_name in ["prefetch_embeddings", *(info.name for info in found)]:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None)
        if names is not None:
            yield module_name, module
            for name in names:
                if not isinstance(getattr(module, name), frozenset):  # plain data says nothing
                    yield f"{module_name}.{name}", getattr(module, name)


def _public_members(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield a class' own public methods and properties, inherited ones of this package too."""
    if not inspect.isclass(thing) or issubclass(thing, enum.Enum):
        return
    for member in dir(thing):
        owner = next(base for base in thing.__mro__ if member in vars(base))
        if member.startswith("_") or not owner.__module__.startswith("prefetch_embeddings"):
            continue
        attribute = vars(owner)[member]
        if isinstance(attribute, property | functools.cached_property):
            yield f"{name}.{member}", attribute
        elif isinstance(attribute, classmethod | staticmethod):
            yield f"{name}.{member}", attribute.__func__
        elif inspect.isfunction(attribute):
            yield f"{name}.{member}", attribute


PUBLIC = dict(_public_names())
MEMBERS = {
    name: member
    for class_name, thing in PUBLIC.items()
    for name, member in _public_members(class_name, thing)
}
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
