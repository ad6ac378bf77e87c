"""Under Gunicorn, with each kind of worker, every request is answered with one call."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.extras import needs
from tests.helpers import PATIENCE
from tests.runtimes.scripts import ROOT, environment

pytestmark = [
    needs("gunicorn", "gevent", "uvicorn", "uvicorn_worker", target="runtimes"),
    pytest.mark.skipif(sys.platform == "win32", reason="Gunicorn forks"),
]

WORKERS = {
    "sync": ("wsgi", "-k", "sync"),
    "gthread": ("wsgi", "-k", "gthread", "--threads", "8"),
    "gevent": ("wsgi", "-k", "gevent"),
    "uvicorn": ("asgi", "-k", "uvicorn_worker.UvicornWorker"),
}


class OverSocketFile(http.client.HTTPConnection):
    """A connection to a server that listens on a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


def ask(path: Path, text: str) -> dict[str, Any]:
    connection = OverSocketFile(path)
    try:
        connection.request("GET", f"/?text={text}", headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer
    finally:
        connection.close()


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    path, log = folder / "socket", folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--bind", f"unix:{path}", "--workers", "2",
             "--graceful-timeout", "5", *options],
            cwd=ROOT, env=environment(), stdout=output, stderr=output,
        )  # fmt: skip
    try:
        give_up_at = time.monotonic() + PATIENCE
        while not _listens(path):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < give_up_at, log.read_text()
        yield server, path
    except AssertionError:
        print(log.read_text())
        raise
    finally:
        server.kill()
        server.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
@pytest.mark.parametrize("worker", WORKERS)
def test_every_request_is_answered(tmp_path: Path, worker: str, preload: bool) -> None:
    application, *options = WORKERS[worker]
    if preload:
        options.append("--preload")
    with (
        serving(tmp_path, *options, f"tests.runtimes.bot:{application}") as (server, path),
        ThreadPoolExecutor(8) as pool,
    ):
        texts = [f"question-{number}" for number in range(24)]
        answers = list(pool.map(lambda text: ask(path, text), texts))
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    assert [answer["vector"] for answer in answers] == [[float(len(text)), 1.0] for text in texts]
    assert {answer["calls"] for answer in answers} == {1}, "one call a question"
    assert server.pid not in {answer["process"] for answer in answers}
