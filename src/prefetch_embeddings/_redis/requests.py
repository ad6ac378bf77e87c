"""What a lookup asks of Redis, and what it is told: the words between a lookup and who runs it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from prefetch_embeddings._redis.codec import Role
    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.lease import Lease

POLL_SECONDS: Final = 0.05
"""How long a waiter pauses that cannot have itself woken."""


class Slot(NamedTuple):
    """Where the vector of one text belongs."""

    text: str
    role: Role
    digest: str
    key: str


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """Commands whose answers are needed.

    Attributes:
        commands: What is sent.
        keys: Of each command, the key that says where it goes.
        charged: Whether it is paid for out of the time that Redis may cost the call. Otherwise it
            may take that time once more, and costs nothing if it is answered.
        late: What is done with answers that come after the caller has left.
    """

    commands: Sequence[Command]
    keys: Sequence[str | bytes]
    charged: bool = True
    late: Callable[[list[Any]], None] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """A command that blocks for `seconds`; answered by the seconds that have passed."""

    command: Command
    key: str
    seconds: float


class NoReply:
    """What a lookup gets in an answer's place if Redis was not asked, or brought nothing."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind


SKIPPED: Final = NoReply(Kind.SKIPPED)
FAILED: Final = NoReply(Kind.MISS)


class Found(NamedTuple):
    """What a lookup for one text came to: a vector, or else perhaps the right to make the call."""

    vector: list[float] | None
    lease: Lease | None = None


NOTHING: Final = Found(None)

Request: TypeAlias = Ask | Wait
if TYPE_CHECKING:
    Steps: TypeAlias = Generator[Request, Any, Found]
    BatchSteps: TypeAlias = Generator[Request, Any, dict[Slot, list[float]]]
