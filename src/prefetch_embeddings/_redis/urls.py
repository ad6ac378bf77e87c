"""URLs: which kinds there are, what they may say, and what drives each."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import redis.connection
from redis.sentinel import Sentinel

from prefetch_embeddings._redis.cluster import ClusterDriver, cluster_client
from prefetch_embeddings._redis.connections import (
    READ_SECONDS,
    ServerDriver,
    without_library_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prefetch_embeddings._redis.connections import Driver

KINDS: Final = (
    "redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://, redis+cluster:// and "
    "rediss+cluster://"
)
SENTINEL_SECONDS: Final = 1.0
"""How long one Sentinel may take to answer before the next is asked."""

_OF_POOLS: Final = {"max_connections"}
_OF_SENTINEL: Final = {"sentinel_username", "sentinel_password"}
_parse_url: Any = redis.connection.parse_url  # untyped, as is the next
_Sentinel: Any = Sentinel

_PORTS: Final = {"cluster": 6379, "sentinel": 26379}


class _Many(NamedTuple):
    """What a URL with several hosts says."""

    nodes: list[tuple[str, int]]
    path: list[str]
    options: dict[str, Any]


def driver_for(url: str) -> Driver:
    """Return what drives the server, Sentinel or cluster of a URL. Connects to nothing.

    Raises:
        TypeError: It is no `str`.
        ValueError: It is no such URL, or has an option that nobody knows. Never quotes it: there
            may be a password in it.
    """
    if not isinstance(url, str):
        raise TypeError(f"url: expected a str, not {type(url).__name__}")
    scheme = url.partition("://")[0]
    if scheme in {"redis", "rediss", "unix"}:
        return ServerDriver(_options(url))
    plain, _, kind = scheme.partition("+")
    if plain in {"redis", "rediss"} and kind in _PORTS:
        many = _parse_many(url, plain, kind)
        return _sentinel(many) if kind == "sentinel" else _cluster(many)
    raise ValueError(f"url: expected one that starts with {KINDS}")


def _options(url: str, extra: Iterable[str] = ()) -> dict[str, Any]:
    """Return what redis-py makes of a URL with one host."""
    try:
        options = dict(_parse_url(url))
        queried = [name for name, _ in parse_qsl(urlsplit(url).query)]
    except ValueError as error:
        message = str(error)
        raise ValueError(
            f"url: {message}" if message.startswith("Invalid value for") else "url: not a valid URL"
        ) from None
    known = _parameters(options.get("connection_class", redis.Connection)) | _OF_POOLS | set(extra)
    for name in queried:
        if name not in known:
            raise ValueError(f"url: unknown option {name!r}")
    return options


def _parameters(connection_class: type) -> set[str]:
    return {
        name
        for each in connection_class.__mro__
        if "__init__" in vars(each)
        for name in inspect.signature(vars(each)["__init__"]).parameters
    }


def _parse_many(url: str, plain: str, kind: str) -> _Many:
    rest = url.partition("://")[2]
    location, mark, query = rest.partition("?")
    authority, _, path = location.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    segments = [segment for segment in path.split("/") if segment]
    nodes = []
    for host in hosts.split(","):
        try:
            parsed = urlsplit(f"//{host}")
            name, port = parsed.hostname, parsed.port or _PORTS[kind]
        except ValueError:
            name = None
        if not name:
            raise ValueError(f"url: expected redis+{kind}://host:port,host:port")
        nodes.append((name, port))
    database = segments[1] if kind == "sentinel" and len(segments) > 1 else "0"
    options = _options(
        f"{plain}://{credentials}{at}localhost/{database}{mark}{query}",
        _OF_SENTINEL if kind == "sentinel" else (),
    )
    del options["host"]
    return _Many(nodes, segments, options)


def _sentinel(many: _Many) -> Driver:
    if not 1 <= len(many.path) <= 2 or (len(many.path) == 2 and not many.path[1].isdecimal()):
        raise ValueError("url: expected redis+sentinel://host:port,host:port/service/database")
    options = many.options
    own = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in _OF_SENTINEL
        if name in options
    }
    if options.get("connection_class") is redis.SSLConnection:
        own |= {name: value for name, value in options.items() if name.startswith("ssl_")}
        own["ssl"] = True
    own |= {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
    sentinel = _Sentinel(many.nodes, sentinel_kwargs=own)
    service = many.path[0]

    def locate() -> tuple[str, int]:
        host, port = sentinel.discover_master(service)
        return str(host), int(port)

    return ServerDriver(options, locate)


def _cluster(many: _Many) -> Driver:
    if many.path not in ([], ["0"]):
        raise ValueError("url: a cluster has only the database 0")
    options: dict[str, Any] = {
        "socket_timeout": READ_SECONDS,
        "socket_connect_timeout": SENTINEL_SECONDS * 2,
        **without_library_name(),
        **many.options,
    }
    options.pop("db", None)
    if options.pop("connection_class", None) is redis.SSLConnection:
        options["ssl"] = True
    return ClusterDriver(lambda: _make(many.nodes, options), options=options)


def _make(nodes: list[tuple[str, int]], options: Mapping[str, Any]) -> Any:
    return cluster_client(nodes, options)
