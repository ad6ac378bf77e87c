"""What the package offers: every public name, and the public members of every public class."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

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
                if not isinstance(getattr(module, name), frozenset | Mapping):  # plain data
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
        elif inspect.isfunction(attribute) and "pydantic" not in attribute.__module__:
            yield f"{name}.{member}", attribute


def fields(thing: Any) -> list[str]:
    """Return the names of a dataclass' public fields, or of an enumeration's members."""
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if not field.name.startswith("_")]
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return list(thing.__members__)
    return []


PUBLIC = dict(_public_names())
MEMBERS = {
    name: member
    for class_name, thing in PUBLIC.items()
    for name, member in _public_members(class_name, thing)
}
