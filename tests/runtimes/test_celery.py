"""Under Celery, with each kind of pool, every task gets its vector with one call."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.extras import needs
from tests.helpers import PATIENCE
from tests.runtimes.scripts import ROOT, environment

pytestmark = [
    needs("celery", "gevent", target="runtimes"),
    pytest.mark.skipif(sys.platform == "win32", reason="Celery does not support it"),
    pytest.mark.timeout(240),
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The tasks, with a queue of their own in the file system."""
    for name in ("queue", "control", "results"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CELERY_FOLDER", str(tmp_path))
    yield importlib.import_module("tests.runtimes.tasks")
    del sys.modules["tests.runtimes.tasks"]


@contextmanager
def worker(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "--app", "tests.runtimes.tasks", "worker",
             "--without-gossip", "--without-mingle", "--without-heartbeat", *options],
            cwd=ROOT, stdout=output, stderr=output,
            env={**environment(), "CELERY_FOLDER": str(folder), "C_FORCE_ROOT": "1"},
        )  # fmt: skip
    try:
        yield process
    except BaseException:
        print(log.read_text())
        raise
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("pool", ["prefork", "gevent", "threads"])
def test_every_task_is_answered(tasks: Any, tmp_path: Path, pool: str) -> None:
    with worker(tmp_path, "--pool", pool, "--concurrency", "4") as process:
        texts = [f"question {number}" for number in range(16)]
        results = [tasks.ask.delay(text) for text in texts]
        answers = [result.get(timeout=3 * PATIENCE) for result in results]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert [answer["vector"] for answer in answers] == [[float(len(text)), 1.0] for text in texts]
    assert {answer["calls"] for answer in answers} == {1}, "one call a question"


def test_a_soft_time_limit_is_its_own_tasks_alone(tasks: Any, tmp_path: Path) -> None:
    with worker(tmp_path, "--pool", "prefork", "--concurrency", "1"):
        assert tasks.ask_in_vain.delay("question").get(timeout=3 * PATIENCE) == "interrupted"
        answer = tasks.answer.delay("question").get(timeout=3 * PATIENCE)
    assert answer["vector"] == [8.0, 1.0]
    assert answer["calls"] == 1, "the call that the interrupted task waited for went on"
