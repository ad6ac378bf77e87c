"""One failure, raised to many callers: each gets an exception, and a traceback, of its own."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


def own_copy(error: Exception, traceback: TracebackType | None) -> Exception:
    """Return a copy of `error` to raise.

    Raising an exception adds to the traceback it carries. Raised to many callers, one object would
    collect all their frames (and hold them). A copy starts from `traceback`, where the model
    failed, and adds only the frames of its own caller.

    Args:
        error: The exception that the model raised.
        traceback: Its traceback when the flight failed.
    """
    return (_twin(error) or error).with_traceback(traceback)


def _twin(error: Exception) -> Exception | None:
    """Return a copy, None where there can be none."""
    kind = type(error)
    with suppress(Exception):  # constructors may want more than `args`, or refuse to be changed
        twin = copy.copy(error)
        if type(twin) is kind and twin is not error and twin.args == error.args:
            return _completed(twin, error)
    with suppress(Exception):
        return _completed(kind.__new__(kind, *error.args), error)
    return None


def _completed(twin: Exception, error: Exception) -> Exception:
    """Give `twin` what neither a constructor nor `args` carries."""
    for name in (name for kind in type(error).__mro__ for name in _slots(kind)):
        if hasattr(error, name):
            object.__setattr__(twin, name, getattr(error, name))
    vars(twin).update(vars(error))
    if hasattr(error, "__notes__"):
        object.__setattr__(twin, "__notes__", list(error.__notes__))  # each may add its own
    BaseException.__setattr__(twin, "__cause__", error.__cause__)
    BaseException.__setattr__(twin, "__context__", error.__context__)
    BaseException.__setattr__(twin, "__suppress_context__", error.__suppress_context__)
    return twin


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
