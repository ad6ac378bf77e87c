"""Checks of arguments when a thing is made: errors name the parameter, and what is right."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from typing import Any

from langchain_core.embeddings import Embeddings


def check_model(name: str, model: Any) -> None:
    """Raise a `TypeError` if a model is none."""
    if isinstance(model, Embeddings):
        return
    if isinstance(model, type) and issubclass(model, Embeddings):
        raise TypeError(f"{name} must be an instance, {model.__name__}(...), not the class")
    raise TypeError(
        f"{name} must be a LangChain Embeddings, such as OpenAIEmbeddings(), not {kind_of(model)}"
    )


def check_count(name: str, count: Any, *, least: int = 1) -> None:
    """Raise if a number of things is no whole number, or less than `least`."""
    try:
        whole = None if isinstance(count, bool) else operator.index(count)
    except TypeError:
        whole = None
    if whole is None:
        raise TypeError(f"{name} must be an int, not {kind_of(count)}")
    if whole < least:
        raise ValueError(f"{name} must be at least {least}, not {whole}")


def check_counts(**counts: Any) -> None:
    """Do what `check_count` does, for several numbers of at least 1."""
    for name, count in counts.items():
        check_count(name, count)


def check_seconds(
    name: str, seconds: Any, *, or_none: bool = False, or_zero: bool = False, endless: bool = False
) -> None:
    """Raise if a duration is no number, or not one that time can have.

    Args:
        name: The parameter's name.
        seconds: What was passed in.
        or_none: Whether None will do.
        or_zero: Whether 0 will do.
        endless: Whether infinity will do.
    """
    if or_none and seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        none = " or None" if or_none else ""
        raise TypeError(f"{name} must be a number of seconds{none}, not {kind_of(seconds)}")
    number = float(seconds)
    if not (number >= 0 if or_zero else number > 0) or (math.isinf(number) and not endless):
        least = "at least 0" if or_zero else "more than 0"
        finite = "" if endless else ", and finite"
        raise ValueError(f"{name} must be {least} seconds{finite}, not {seconds}")


def check_flag(name: str, flag: Any) -> None:
    """Raise a `TypeError` if a switch is neither True nor False."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, not {kind_of(flag)}")


def check_function(name: str, function: Any) -> None:
    """Raise a `TypeError` if what is to be called cannot be, or only awaited; None will do."""
    if function is None:
        return
    if not callable(function):
        raise TypeError(f"{name} must be a function or None, not {kind_of(function)}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object's own
    ):
        raise TypeError(f"{name} must be a plain function, not a coroutine function")


def check_functions(**functions: Any) -> None:
    """Do what `check_function` does, for several functions."""
    for name, function in functions.items():
        check_function(name, function)


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raise a `TypeError` if a value is not of its kind; None will do."""
    if value is not None and not isinstance(value, kind):
        what = f"a {kind.__name__}, such as {example}"
        raise TypeError(f"{name} must be {what}, not {kind_of(value)}")


def kind_of(value: object) -> str:
    """Say what something is without showing it: it may be a text or a secret."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return "a function"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
