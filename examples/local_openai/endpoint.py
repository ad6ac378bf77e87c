"""`LocalOpenAI`: starts the stand-in, in this process or in one of its own, and controls it."""

import asyncio
import concurrent.futures
import dataclasses
import os
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from examples.local_openai import control, tls
from examples.local_openai.delays import Delays
from examples.local_openai.faults import Fault
from examples.local_openai.server import EmbeddingsServer, ServerStats

API_KEY = "stand-in"
_START_TIMEOUT = 30.0


class LocalOpenAI:
    """A local OpenAI-compatible embeddings endpoint: a stand-in, not a model.

    It listens on a free port of 127.0.0.1 from `start` (or ``with``) to `close`. Everything below
    works the same whether the server shares this process or has its own.

    Args:
        delays: How long answers take; none by default.
        process: Serve from a process of its own, so that measuring and serving do not share an
            interpreter lock. It ends when its parent does, however that ends.
        secure: Serve HTTPS, with a certificate that `ca_file` vouches for. Needs ``trustme``.
        idle_close: Seconds without a request after which the server closes a connection; None
            for never.
        handshake_delay: Extra seconds that opening a connection takes, before TLS begins.
    """

    def __init__(
        self,
        *,
        delays: Delays | None = None,
        process: bool = False,
        secure: bool = False,
        idle_close: float | None = None,
        handshake_delay: float = 0.0,
    ) -> None:
        self._delays = delays or Delays()
        self._idle_close = idle_close
        self._handshake_delay = handshake_delay
        self._secure = secure
        self._host: _ThreadHost | _ProcessHost = _ProcessHost() if process else _ThreadHost()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._ports: tuple[int, int] | None = None
        self._last_stats = ServerStats()

    def start(self) -> Self:
        """Start serving; returns once the endpoint can be reached."""
        if self._secure:
            self._folder = tempfile.TemporaryDirectory(prefix="local-openai-")
            tls.make_certificate(Path(self._folder.name))
        self._ports = self._host.start(Path(self._folder.name) if self._folder else None)
        self.set_delays(self._delays)
        self.set_connections(idle_close=self._idle_close, handshake_delay=self._handshake_delay)
        return self

    def close(self) -> None:
        """Stop serving and drop every connection, hung requests at once. May be repeated."""
        if self._ports is None:
            return
        self._last_stats = self.stats()
        self._ports = None
        self._host.stop()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def base_url(self) -> str:
        """What to give to a client as its ``base_url``."""
        scheme = "https" if self._secure else "http"
        return f"{scheme}://127.0.0.1:{self._open_ports()[0]}/v1"

    @property
    def control_url(self) -> str:
        """The control port, for other processes; see `examples.local_openai.control`."""
        return f"http://127.0.0.1:{self._open_ports()[1]}"

    @property
    def ca_file(self) -> Path:
        """The certificate authority that a client must trust when the endpoint is `secure`."""
        if self._folder is None:
            raise RuntimeError("only a started, secure endpoint has a certificate authority")
        return Path(self._folder.name) / tls.CA

    def client_context(self) -> ssl.SSLContext:
        """The client side of TLS, trusting this endpoint only."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def environment(self) -> dict[str, str]:
        """The environment variables that lead an OpenAI client here."""
        variables = {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": API_KEY}
        if self._secure:
            variables["SSL_CERT_FILE"] = str(self.ca_file)
        return variables

    def set_delays(self, delays: Delays) -> None:
        """Answer the requests that arrive from now on with these delays."""
        self._call("delays", dataclasses.asdict(delays))

    def set_connections(
        self, *, idle_close: float | None = None, handshake_delay: float = 0.0
    ) -> None:
        """Treat connections that fall idle, or are opened, from now on so; both in seconds."""
        self._call("connections", {"idle_close": idle_close, "handshake_delay": handshake_delay})

    def fail(
        self,
        fault: Fault,
        *,
        times: int | None = 1,
        matching: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Let requests fail, those that no earlier order takes.

        Args:
            fault: What happens to them.
            times: How many requests; None for all until `heal`.
            matching: Regular expression that one of the request's texts must contain.
            retry_after: Seconds a 429 or 500 asks the client to wait before it retries.
        """
        self._call(
            "fail",
            {"fault": fault, "times": times, "matching": matching, "retry_after": retry_after},
        )

    def release(self) -> None:
        """Let the requests that hang now go on to their answers."""
        self._call("release")

    def heal(self) -> None:
        """Take back every `fail`, and `release`."""
        self._call("heal")

    def reset_counts(self) -> None:
        """Set the counts back to zero; what is open or under way stays counted as such."""
        self._call("reset")

    def stats(self) -> ServerStats:
        """The counts; after `close`, the last ones."""
        if self._ports is None:
            return self._last_stats
        return ServerStats(**self._call("stats"))

    def times_asked(self, text: str) -> int:
        """How often this very text was in a request."""
        return int(self._call("asked", {"text": text})["times"])

    def wait_until(
        self,
        count: str,
        *,
        at_least: int | None = None,
        at_most: int | None = None,
        timeout: float = 30.0,
    ) -> ServerStats:
        """Wait until one of the counts lies within the bounds.

        Args:
            count: Its name in `ServerStats`.
            at_least: Lower bound, or None.
            at_most: Upper bound, or None.
            timeout: Seconds to wait at most.

        Returns:
            The counts at that moment.

        Raises:
            TimeoutError: It did not happen in time.
        """
        arguments = {"count": count, "at_least": at_least, "at_most": at_most, "timeout": timeout}
        return ServerStats(**self._call("wait", arguments, timeout=timeout + _START_TIMEOUT))

    def _call(
        self, name: str, arguments: dict[str, Any] | None = None, timeout: float = _START_TIMEOUT
    ) -> dict[str, Any]:
        return control.call(self._open_ports()[1], name, arguments or {}, timeout=timeout)

    def _open_ports(self) -> tuple[int, int]:
        if self._ports is None:
            raise RuntimeError("the endpoint is not running")
        return self._ports


async def serve(
    folder: Path | None, ready: Callable[[int, int], None], stop: asyncio.Event
) -> None:
    """Run an endpoint on the running event loop until `stop` is set.

    Args:
        folder: Holds the certificate; None for plain HTTP.
        ready: Called with the endpoint's port and the control port.
        stop: Ends it.
    """
    server = EmbeddingsServer(tls=tls.server_context(folder) if folder else None)
    await server.serve(control.Control(server).answer, ready, stop)


class _ThreadHost:
    """Serves from an event loop in a daemon thread, which never holds up the interpreter's exit."""

    def __init__(self) -> None:
        self._stop: Callable[[], object] = lambda: None
        self._thread: threading.Thread | None = None

    def start(self, folder: Path | None) -> tuple[int, int]:
        started: concurrent.futures.Future[tuple[int, int]] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(folder, started), name="local-openai", daemon=True
        )
        self._thread.start()
        return started.result(_START_TIMEOUT)

    def _run(
        self, folder: Path | None, started: "concurrent.futures.Future[tuple[int, int]]"
    ) -> None:
        async def main() -> None:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            self._stop = lambda: loop.call_soon_threadsafe(stop.set)
            await serve(folder, lambda *ports: started.set_result(ports), stop)

        try:
            asyncio.run(main())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    def stop(self) -> None:
        self._stop()
        if self._thread is not None:
            self._thread.join(_START_TIMEOUT)


class _ProcessHost:
    """Serves from a child process, which ends when its standard input is closed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def start(self, folder: Path | None) -> tuple[int, int]:
        command = [sys.executable, "-m", "examples.local_openai", "--child"]
        if folder is not None:
            command += ["--certificate", str(folder)]
        root = str(Path(__file__).parents[2])
        paths = [root, os.environ.get("PYTHONPATH", "")]
        self._child = subprocess.Popen(  # noqa: S603  # this package's own command
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        assert self._child.stdout is not None  # noqa: S101
        endpoint, _, control_port = self._child.stdout.readline().partition(" ")
        if not control_port:
            self.stop()
            raise RuntimeError("the endpoint's process ended before it served")
        return int(endpoint), int(control_port)

    def stop(self) -> None:
        if self._child is None:
            return
        with self._child as child:  # closes the pipes, which ends it, and waits
            assert child.stdin is not None  # noqa: S101
            child.stdin.close()
            try:
                child.wait(_START_TIMEOUT)
            except subprocess.TimeoutExpired:
                child.kill()
