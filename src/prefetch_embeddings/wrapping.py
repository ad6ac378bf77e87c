"""What makes a wrapper pass for the model that it wraps: the model's names, copies and pickles."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Self, TypeVar

from langchain_core.embeddings import Embeddings

from prefetch_embeddings.reporting import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    _Arguments = ParamSpec("_Arguments")
    _Wrapper = TypeVar("_Wrapper", bound="WrapsAModel")

LOOKED_FOR: Final = frozenset(
    {
        "async_client",
        "batch_size",
        "chunk_size",
        "client",
        "deployment",
        "dimension",
        "dimensions",
        "encode_kwargs",
        "model",
        "model_id",
        "model_kwargs",
        "model_name",
        "query_encode_kwargs",
        "query_instruction",
        "tokenizer",
    }
)
"""What stores, indexing caches, splitters and evaluators read of a model to tell which it is."""

_MARK: Final = "_remembers_arguments"

METHODS: Final = ("embed_", "aembed_")
"""How the methods begin that stores look for: `embed_image`, `embed_query_inline` and others."""


def remembers_arguments(
    init: Callable[Concatenate[_Wrapper, _Arguments], None],
) -> Callable[Concatenate[_Wrapper, _Arguments], None]:
    """Have an `__init__` of a `WrapsAModel` write down what a copy has to be made with."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self: _Wrapper, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        _, *arguments = signature.bind(self, *args, **kwargs).arguments.items()
        before = frozenset(vars(self))
        self._made_with = dict(arguments)
        init(self, *args, **kwargs)
        self._made = frozenset(vars(self)) - before

    setattr(remembering, _MARK, True)
    return remembering


class WrapsAModel(Embeddings):
    """The base of wrappers: they show the model's names, and copies of them start empty.

    Of what is looked for by name, a wrapper has exactly what its model has. Any other name that it
    does not have itself is an error, so that a misspelt method is seen.

    A copy is made by the `__init__` that is marked with `remembers_arguments`, with the same
    arguments. `copy.copy` shares the model, `copy.deepcopy` copies it, and `pickle` takes it along.
    What a subclass has set on the object is copied with it.
    """

    # Set when made, and never changed:
    _made_with: dict[str, Any]  # by `remembers_arguments`, before the marked `__init__` runs
    _made: frozenset[str]  # the attributes that the marked `__init__` has set

    @property
    def underlying_embeddings(self) -> Embeddings:
        """The wrapped model."""
        model: Embeddings = self._made_with["underlying_embeddings"]
        return model

    if not TYPE_CHECKING:  # for a type checker there is no attribute but those that are declared

        def __getattr__(self, name: str) -> Any:
            if name in LOOKED_FOR or name.startswith(METHODS):
                try:
                    return getattr(self.underlying_embeddings, name)
                except AttributeError:
                    pass
            kind = type(self).__name__
            raise AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=self)

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return without_what_cannot_be_pickled(self._made_with), self._set_by_subclass()

    def __setstate__(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        arguments, set_by_subclass = state
        vars(self).update(set_by_subclass)
        _marked_init(type(self))(self, **arguments)

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__((self._made_with, self._set_by_subclass()))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = type(self).__new__(type(self))  # the model may know its wrapper
        model = copy.deepcopy(self.underlying_embeddings, memo)
        arguments = {**self._made_with, "underlying_embeddings": model}
        copied.__setstate__((arguments, copy.deepcopy(self._set_by_subclass(), memo)))
        return copied

    def _set_by_subclass(self) -> dict[str, Any]:
        mine = self._made | {"_made"}
        return {name: value for name, value in vars(self).items() if name not in mine}


class ClosedByWith:
    """What is closed at the end of a `with` or an `async with`."""

    def close(self) -> None:
        """Close it. Does not wait."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def _marked_init(kind: type) -> Callable[..., None]:
    """Return the `__init__` that `remembers_arguments` marks, not that of a user's subclass."""
    inits: list[Any] = [vars(place).get("__init__") for place in kind.__mro__]
    marked: Callable[..., None] = next(init for init in inits if hasattr(init, _MARK))
    return marked


def without_what_cannot_be_pickled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what a wrapper was made with, without an `on_event` that cannot be pickled."""
    if _can_be_pickled(arguments.get("on_event")):
        return arguments
    logger.warning("a pickled wrapper leaves its on_event behind, which cannot be pickled")
    return {**arguments, "on_event": None}


def _can_be_pickled(function: Any) -> bool:
    if function is None:
        return True
    try:
        pickle.dumps(function)
    except Exception:  # noqa: BLE001 - whatever its state raises
        return False
    return True
