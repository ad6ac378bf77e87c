"""What is asked of Redis, in which order, and what the answers mean; it does no I/O.

A lookup is written once, for threads and for coroutines: it yields requests, is sent what came of
them, and returns what it found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prefetch_embeddings._redis import lease
from prefetch_embeddings._redis.jobs import Refusal
from prefetch_embeddings._redis.recorder import RedisCacheEventKind as Kind
from prefetch_embeddings._redis.requests import NOTHING, Ask, Found, NoReply, Wait

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefetch_embeddings._redis.jobs import Command
    from prefetch_embeddings._redis.recorder import RedisRecorder
    from prefetch_embeddings._redis.requests import BatchSteps, Slot, Steps
    from prefetch_embeddings._redis.shelf import Shelf
    from prefetch_embeddings.existing import ExistingCache

PIPELINE: Final = 128
"""Commands of one request, so that a large batch keeps what came in time."""

OWNERS: Final = 2
"""So many owners are waited for, one after the other: with one that dies there is one more call."""


class Lookups:
    """Looks for vectors on a shelf, in older caches, and with other processes that are at it.

    Args:
        shelf: Where vectors belong.
        recorder: Counts.
        read_through: Older caches.
        lease_seconds: How long an owner may take; None: no single flight.
        longest_block: The longest that a command may block.
    """

    def __init__(
        self,
        shelf: Shelf,
        recorder: RedisRecorder,
        *,
        read_through: Sequence[ExistingCache],
        lease_seconds: float | None,
        longest_block: float,
    ) -> None:
        self._shelf = shelf
        self._writer = shelf.writer
        self._recorder = recorder
        self._read_through = read_through
        self._lease_seconds = lease_seconds
        self._longest_block = longest_block

    def one(self, slot: Slot) -> Steps:
        """Find one vector, or else the right to make the call."""
        vector = self._writer.find(slot.key)
        if vector is not None:
            self._recorder.count(Kind.HIT)
            return Found(vector)
        [reply] = yield Ask([("GET", slot.key)], [slot.key])
        if isinstance(reply, NoReply):
            self._recorder.count(reply.kind)
            return NOTHING
        vector, corrupt = self._shelf.judge(slot, reply)
        found = NOTHING if vector is None else Found(vector)
        if vector is None:
            older = yield from self._older([slot])
            if older:
                found = Found(older[slot])
            elif self._lease_seconds is not None:
                found = yield from self._join(slot, self._lease_seconds, ignore_value=corrupt)
        self._recorder.count(Kind.MISS if found.vector is None else Kind.HIT)
        return found

    def many(self, slots: Sequence[Slot]) -> BatchSteps:
        """Find those vectors that are there."""
        slots = list(dict.fromkeys(slots))
        vectors = {}
        for slot in slots:
            if (vector := self._writer.find(slot.key)) is not None:
                vectors[slot] = vector
        unknown = [slot for slot in slots if slot not in vectors]
        answered: list[Slot] = []
        skipped = 0
        for start in range(0, len(unknown), PIPELINE):
            some = unknown[start : start + PIPELINE]
            # Not one MGET: in a cluster its keys must share a slot, and for a key that holds
            # something else than a string it says the same as for one that holds nothing.
            replies = yield Ask([("GET", slot.key) for slot in some], [slot.key for slot in some])
            for slot, reply in zip(some, replies, strict=True):
                if isinstance(reply, NoReply):
                    skipped += reply.kind is Kind.SKIPPED
                    continue
                answered.append(slot)
                vector, _ = self._shelf.judge(slot, reply)
                if vector is not None:
                    vectors[slot] = vector
        missing = [slot for slot in answered if slot not in vectors]
        vectors.update((yield from self._older(missing)))
        self._recorder.count(Kind.HIT, len(vectors))
        self._recorder.count(Kind.SKIPPED, skipped)
        self._recorder.count(Kind.MISS, len(slots) - len(vectors) - skipped)
        return vectors

    def older_keys(self, slot: Slot) -> list[str | bytes]:
        """Return the keys under which older caches may have the text."""
        commands = (self._command(cache, slot) for cache in self._read_through)
        return [_key_of(command) for command in commands if command]

    def _older(self, slots: Sequence[Slot]) -> BatchSteps:
        """Find what older caches have, and copy it forward."""
        vectors: dict[Slot, list[float]] = {}
        for cache in self._read_through:
            asked = {slot: self._command(cache, slot) for slot in slots if slot not in vectors}
            askable = [(slot, command) for slot, command in asked.items() if command]
            for start in range(0, len(askable), PIPELINE):
                some = askable[start : start + PIPELINE]
                commands = [command for _, command in some]
                replies = yield Ask(commands, [_key_of(command) for command in commands])
                for (slot, _), entry in zip(some, replies, strict=True):
                    if isinstance(entry, NoReply):
                        continue
                    vector = self._shelf.carry_over(cache, slot, entry)
                    if vector is not None:
                        vectors[slot] = vector
        self._recorder.count(Kind.CARRIED_OVER, len(vectors))
        return vectors

    @staticmethod
    def _command(cache: ExistingCache, slot: Slot) -> Command | None:
        if slot.role not in cache.roles:
            return None
        try:
            return cache.command(slot.text)
        except Exception:  # noqa: BLE001 - a key encoder of the user's, and a text it can't take
            return None

    # -- one call in the fleet

    def _join(self, slot: Slot, lease_seconds: float, *, ignore_value: bool) -> Steps:
        """Take the lease, or wait for whoever has it.

        An owner that dies costs the fleet one more call: whoever is first to notice takes the
        lease, and the others wait for that one. Nobody waits for a third: those who ask while calls
        keep failing would wait for ever.
        """
        token = lease.new_token()

        def late(replies: list[Any]) -> None:
            """Give up a lease that was taken for a caller who has left."""
            state = lease.joined(slot.key, token, replies[0])
            if isinstance(state, lease.Lease):
                self._shelf.give_up(slot, state)

        def join(*, charged: bool) -> Ask:
            command = lease.join(slot.key, token, lease_seconds, ignore_value=ignore_value)
            return Ask([command], [slot.key], charged=charged, late=late)

        state = self._joined(slot, token, (yield join(charged=True)))
        if isinstance(state, lease.OtherOwner):
            self._recorder.count(Kind.WAITED)
        for _ in range(OWNERS):
            if not isinstance(state, lease.OtherOwner):
                break
            owner, left = state, lease_seconds + self._longest_block
            while left > 0 and isinstance(state, lease.OtherOwner) and state.token == owner.token:
                blocked = min(left, self._longest_block)
                left -= yield Wait(owner.wait(blocked), slot.key, blocked)
                state = self._joined(slot, token, (yield join(charged=False)))
        return state if isinstance(state, Found) else NOTHING

    def _joined(self, slot: Slot, token: str, replies: Sequence[Any]) -> Found | lease.OtherOwner:
        reply = replies[0]
        if isinstance(reply, (NoReply, Refusal)):
            return NOTHING
        state = lease.joined(slot.key, token, reply)
        if isinstance(state, lease.Lease):
            return Found(None, state)
        if isinstance(state, bytes):
            return Found(self._shelf.judge(slot, state)[0])
        return state or NOTHING


def _key_of(command: Command) -> str | bytes:
    key = command[1]
    return key if isinstance(key, (str, bytes)) else str(key)
