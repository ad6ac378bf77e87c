"""Single flight over Redis: who owns the upstream call for a key, and who waits for it.

The owner holds a lease, set if absent and with an expiry, under a token of its own. When it is done
it stores the vector and drops the lease in one script, and only if the lease is still its own. Then
it pushes onto a list named after the token. Waiters block on moving that list's only element onto
the list itself: one push wakes them all, one after the other, and a late one finds it still there.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prefetch_embeddings._redis.jobs import Command

SLICE: Final = 0.25
"""Seconds that a waiter blocks before it looks whether the owner still holds the lease."""

_HASH_TAG: Final = re.compile(r"[^{]*\{[^}]+\}")

_WAKE_MILLISECONDS: Final = 2_000  # who comes later finds the lease gone

_JOIN: Final = """
if ARGV[3] == '0' then
  local value = redis.call('GET', KEYS[1])
  if value then return {'value', value} end
end
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return {'owner'} end
return {'waiter', redis.call('GET', KEYS[2]), redis.call('PTTL', KEYS[2])}
"""

# The lease goes first: where memory is full nothing more can be written, but that still can.
_LEAVE: Final = """
local own = redis.call('GET', KEYS[2]) == ARGV[1]
if own then redis.call('DEL', KEYS[2]) end
local stored = redis.status_reply('OK')
if ARGV[2] ~= '' and (own or redis.call('EXISTS', KEYS[1]) == 0) then
  if ARGV[3] == '0' then
    stored = redis.pcall('SET', KEYS[1], ARGV[2])
  else
    stored = redis.pcall('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  end
end
redis.pcall('RPUSH', KEYS[3], '1')
redis.pcall('PEXPIRE', KEYS[3], ARGV[4])
return stored
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """The right to make the upstream call for `key`, as long as the lease lives."""

    key: str
    token: str

    def leave(self, value: bytes, ttl_milliseconds: int | None) -> Command:
        """Return the command that stores `value` (none if empty) and wakes the waiters."""
        lease_key, wake_key = _keys(self.key, self.token)
        keys = (self.key, lease_key, wake_key)
        ttl = ttl_milliseconds or 0
        return ("EVAL", _LEAVE, 3, *keys, self.token, value, ttl, _WAKE_MILLISECONDS)


@dataclasses.dataclass(frozen=True, slots=True)
class OtherOwner:
    """Somebody else is making the call.

    Attributes:
        key: What it is being made for.
        token: Whose lease it is.
        seconds: How long that lease lives if its owner does not leave earlier.
    """

    key: str
    token: str
    seconds: float

    def wait(self, seconds: float) -> Command:
        """Return the command that blocks for up to `seconds` until the owner leaves."""
        _, wake_key = _keys(self.key, self.token)
        # Redis takes 0 for ever.
        return ("BLMOVE", wake_key, wake_key, "LEFT", "RIGHT", f"{max(seconds, 0.001):.3f}")


def can_share_a_slot(prefix: str) -> bool:
    """Return whether in a cluster all keys of one script can share a slot under `prefix`."""
    return "}" not in prefix or _HASH_TAG.match(prefix) is not None


def new_token() -> str:
    """Return a token that no other owner has."""
    return secrets.token_hex(8)


def join(key: str, token: str, lease_seconds: float, *, ignore_value: bool) -> Command:
    """Return the command that fetches the value, or else takes the lease, or else tells its owner.

    Args:
        key: Where the value belongs.
        token: Under which to take the lease.
        lease_seconds: How long the lease lives.
        ignore_value: Whether what stands there is known to be of no use.
    """
    lease_key, _ = _keys(key, token)
    milliseconds = max(1, round(lease_seconds * 1000))
    return ("EVAL", _JOIN, 2, key, lease_key, token, milliseconds, int(ignore_value))


def joined(key: str, token: str, reply: Any) -> bytes | Lease | OtherOwner | None:
    """Return what `join` came to: the value, the lease, or who has it. None: it makes no sense."""
    match reply:
        case [b"value", bytes(value)]:
            return value
        case [b"owner"]:
            return Lease(key, token)
        case [b"waiter", bytes(owner), int(milliseconds)]:
            if owner == token.encode():  # sent twice, since the first reply was lost
                return Lease(key, token)
            return OtherOwner(key, owner.decode("ascii", "replace"), milliseconds / 1000)
    return None


def _keys(key: str, token: str) -> tuple[str, str]:
    # In a cluster all keys of one script must share a slot. Where the prefix has a hash tag that is
    # so; otherwise the whole key becomes the tag.
    tagged = key if _HASH_TAG.match(key) else f"{{{key}}}"
    return f"{tagged}:lease", f"{tagged}:wake:{token}"
