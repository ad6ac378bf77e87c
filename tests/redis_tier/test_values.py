"""Values: bit for bit, as small as that allows, and checked; keys: no two questions share one."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.embeddings import Embeddings

from prefetch_embeddings import PrefetchingEmbeddings
from prefetch_embeddings._redis import codec
from prefetch_embeddings._redis.codec import CorruptValueError
from prefetch_embeddings.redis_cache import RedisCachedEmbeddings
from tests.redis_tier.server import HANG, RedisServer

KEY = "0" * 32
PLAIN = codec.Codec()
FLOATS = st.floats(width=64) | st.floats(width=32) | st.sampled_from([-0.0, 5e-324, 1e-45])


def bits(vector: list[float]) -> bytes:
    return struct.pack(f"<{len(vector)}d", *vector)


@given(st.lists(FLOATS))
def test_any_list_of_floats_returns_bit_for_bit(vector: list[float]) -> None:
    value = PLAIN.encode(codec.snapshot(vector), KEY)
    assert bits(PLAIN.decode(value, KEY)) == bits(vector)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=4))
def test_every_bit_pattern_returns_nan_payloads_included(patterns: list[int]) -> None:
    doubles: array[float] = array("d")
    doubles.frombytes(struct.pack(f"={len(patterns)}Q", *patterns))
    decoded = PLAIN.decode(PLAIN.encode(doubles, KEY), KEY)
    assert array("d", decoded).tobytes() == array("d", doubles.tolist()).tobytes()


@pytest.mark.parametrize(
    "number", [0.5, -0.0, 2.0**-149, math.inf, math.nan, 3.4028234663852886e38]
)
def test_what_fits_32_bits_takes_32(number: float) -> None:
    assert len(PLAIN.encode(codec.snapshot([number] * 1536), KEY)) == 16 + 4 * 1536


@pytest.mark.parametrize("number", [0.1, 1e300, 5e-324, 1 + 2**-30])
def test_one_float_that_does_not_fit_makes_all_64(number: float) -> None:
    assert len(PLAIN.encode(codec.snapshot([0.5, number]), KEY)) == 16 + 8 * 2


def test_the_format_is_what_the_module_says() -> None:
    value = PLAIN.encode(codec.snapshot([1.0, -2.0]), KEY)
    assert value[:12] == b"PEv\x01f\0\0\0" + struct.pack("<I", 2)
    assert value[16:] == struct.pack("<2f", 1.0, -2.0)


@given(st.lists(FLOATS, min_size=1, max_size=5), st.data())
def test_a_damaged_value_does_not_check(vector: list[float], data: st.DataObject) -> None:
    value = bytearray(PLAIN.encode(codec.snapshot(vector), KEY))
    # The three bytes of padding are part of the checksum, too.
    value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptValueError):
        PLAIN.decode(bytes(value), KEY)


def test_a_truncated_or_longer_value_does_not_check() -> None:
    value = PLAIN.encode(codec.snapshot([0.5, 0.25]), KEY)
    for other in [value[:length] for length in range(len(value))] + [value + b"\0", value * 2]:
        with pytest.raises(CorruptValueError):
            PLAIN.decode(other, KEY)


def test_a_value_of_another_key_does_not_check() -> None:
    value = PLAIN.encode(codec.snapshot([0.5]), KEY)
    with pytest.raises(CorruptValueError):
        PLAIN.decode(value, "1" * 32)


FITTING = [0.0, -0.0, 2.0**-149, -(2.0**-127), 3.4028234663852886e38]
WIDE = [*FITTING, 5e-324, -2.0e-308, 0.1, -1e300, 1 + 2.0**-30]


class Fixed(Embeddings):
    """Answers every query alike, and every document with the same numbers in another order."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers
        self.calls = 0

    def embed_query(self, text: str) -> list[float]:
        self.calls += 1
        return self.numbers

    async def aembed_query(self, text: str) -> list[float]:
        return self.embed_query(text)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.calls += 1
        return [self.numbers[::-1] for _ in texts]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.embed_documents(texts)

    async def ask(self, embeddings: PrefetchingEmbeddings, kind: str) -> None:
        """Ask a wrapper for a query and documents, and compare."""
        if kind == "sync":
            query = embeddings.embed_query("query")
            documents = embeddings.embed_documents(["one", "two", "one"])
        else:
            query = await embeddings.aembed_query("query")
            documents = await embeddings.aembed_documents(["one", "two", "one"])
        assert bits(query) == bits(self.numbers)
        assert [bits(document) for document in documents] == [bits(self.numbers[::-1])] * 3


@pytest.mark.parametrize("reads", ["sync", "async"])
@pytest.mark.parametrize("writes", ["sync", "async"])
@pytest.mark.parametrize(("numbers", "size"), [(FITTING, 4), (WIDE, 8)], ids=["32", "64"])
async def test_every_float_survives_both_tiers(
    cached: Callable[..., RedisCachedEmbeddings],
    server: RedisServer,
    numbers: list[float],
    size: int,
    writes: str,
    reads: str,
) -> None:
    model = Fixed(numbers)
    tiers = [cached(model), cached(model), cached(model)]
    with (
        PrefetchingEmbeddings(tiers[0]) as first,
        PrefetchingEmbeddings(tiers[1]) as second,
        PrefetchingEmbeddings(tiers[2]) as third,
    ):
        await model.ask(first, writes)
        await model.ask(first, reads)  # out of the map, and what is on its way to Redis or there
        assert first.stats().query_ready == 1
        assert tiers[0].flush(HANG)
        assert model.calls == 2
        with server.client() as client:
            lengths = {client.strlen(key) for key in client.scan_iter()}
        assert lengths == {16 + size * len(numbers)}

        await model.ask(second, reads)
        assert (second.stats().query_missed, second.stats().query_ready) == (1, 0)

        await third.aprefetch("query") if reads == "async" else third.prefetch("query")
        assert await third.await_for_prefetch("query", HANG)
        await model.ask(third, reads)
        assert (third.stats().query_missed, third.stats().query_ready) == (0, 1)

        for tier in tiers[1:]:
            assert (tier.stats().misses, tier.stats().corrupt) == (0, 0)
        assert model.calls == 2, "a vector came from the model, and not out of Redis"
    for tier in tiers:
        await tier.aclose()


PARTS = st.tuples(
    st.text(max_size=3),
    st.none() | st.integers(0, 99),
    st.sampled_from(["query", "document"]),
    st.text(st.characters(exclude_categories=[]), max_size=3),  # lone surrogates, too
)


@given(PARTS, PARTS)
def test_digests_are_equal_only_for_equal_parts(
    one: tuple[str, int | None, codec.Role, str], other: tuple[str, int | None, codec.Role, str]
) -> None:
    digests = [PLAIN.digest(codec.space(*parts[:3]), parts[3]) for parts in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


def test_parts_do_not_run_together() -> None:
    def digest(model_id: str, text: str) -> str:
        return PLAIN.digest(codec.space(model_id, None, "query"), text)

    assert digest("a:b", "c") != digest("a", "b:c")
    assert digest("m", "queryx") != digest("mquery", "x")
    assert codec.space("m1", None, "query") != codec.space("m", 1, "query")
    assert codec.space("m", None, "query") != codec.space("m", None, "document")
    assert digest("m", "\ud800") != digest("m", "\udfff")
