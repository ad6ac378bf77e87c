"""The commands by which owners and waiters meet in Redis, word for word, and what replies mean."""

from __future__ import annotations

from typing import Any

import pytest
from redis.crc import key_slot

from prefetch_embeddings._redis import lease
from prefetch_embeddings._redis.lease import Lease, OtherOwner


@pytest.mark.parametrize(("key", "tagged"), [("p:{tag}:k", "p:{tag}:k"), ("p:k", "{p:k}")])
def test_keys_of_a_lease_are_named_after_the_vectors(key: str, tagged: str) -> None:
    assert lease._keys(key, "token") == (f"{tagged}:lease", f"{tagged}:wake:token")


@pytest.mark.parametrize(
    ("prefix", "same"),
    [
        *((prefix, True) for prefix in ("plain", "{tag}", "a{tag}b", "open{", "{open")),
        *((prefix, True) for prefix in ("app:{x}:{y}", "{x}}", "")),
        *((prefix, False) for prefix in ("closed}", "a{}b", "}{", "{}")),
    ],
)
def test_whether_the_keys_of_a_lease_share_a_slot_of_the_cluster(prefix: str, same: bool) -> None:
    assert lease.can_share_a_slot(prefix) is same
    command = Lease(f"{prefix}:query:0123", "token").leave(b"", None)
    assert (len({key_slot(str(name).encode()) for name in command[3:6]}) == 1) is same


def test_joining() -> None:
    lease_key, _ = lease._keys("k", "t")
    assert lease.join("k", "t", 1.5, ignore_value=True) == (
        *("EVAL", lease._JOIN, 2, "k", lease_key, "t", 1500, 1),
    )
    assert lease.join("k", "t", 0.0, ignore_value=False)[-2:] == (1, 0), "a lease without end"


def test_leaving() -> None:
    lease_key, wake_key = lease._keys("k", "t")
    start = ("EVAL", lease._LEAVE, 3, "k", lease_key, wake_key, "t", b"value")
    assert Lease("k", "t").leave(b"value", 5) == (*start, 5, lease._WAKE_MILLISECONDS)
    assert Lease("k", "t").leave(b"value", None) == (*start, 0, lease._WAKE_MILLISECONDS)


def test_waiting_is_for_the_owner_and_never_for_ever() -> None:
    _, wake_key = lease._keys("k", "owner")
    owner = OtherOwner("k", "owner", 1.0)
    assert owner.wait(0.25) == ("BLMOVE", wake_key, wake_key, "LEFT", "RIGHT", "0.250")
    assert owner.wait(0.0)[-1] == "0.001"


@pytest.mark.parametrize(
    ("reply", "meaning"),
    [
        ([b"value", b"bytes"], b"bytes"),
        ([b"owner"], Lease("k", "t")),
        ([b"waiter", b"t", 100], Lease("k", "t")),
        ([b"waiter", b"other", 1500], OtherOwner("k", "other", 1.5)),
        ([b"waiter", b"\xff", 1], OtherOwner("k", "\ufffd", 0.001)),
        ([b"value", None], None),
        ([b"waiter", b"other"], None),
        ([b"owner", b"?"], None),
        (None, None),
        ([], None),
    ],
)
def test_what_replies_mean(reply: Any, meaning: object) -> None:
    assert lease.joined("k", "t", reply) == meaning


def test_tokens_are_random_and_short() -> None:
    tokens = {lease.new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert {len(token) for token in tokens} == {16}
