"""What the core asks of those who use it: something that loads a value for a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

V_co = TypeVar("V_co", covariant=True)


class Loader(Protocol[V_co]):
    """Loads values. Each call takes a text, and the options of who asked for it.

    A value is shared by all who ask, so nobody may change it: a tuple is a good one. It also
    costs the garbage collector nothing, if what is in it does not.
    """

    @property
    def native_async(self) -> bool:
        """Whether `aload` has a client of its own, and needs no thread."""

    @property
    def loads_many(self) -> bool:
        """Whether `load_many` is one call of the model."""

    def load(self, text: str, options: Any) -> V_co:
        """Load one value; the calling thread waits."""

    async def aload(self, text: str, options: Any) -> V_co:
        """Load one value on the running loop."""

    def load_many(self, texts: list[str]) -> Sequence[V_co]:
        """Load the values of several texts, in their order."""


class Key(Protocol):
    """Finds out what texts must share to be the same."""

    def __call__(self, text: str, variant: Hashable = None, /) -> Hashable:
        """Return the key of a text, and of what parts it from others that are the same."""
