"""Scripts that are run as users run them: in a process of their own, with public names only."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

from tests.helpers import PATIENCE

ROOT = Path(__file__).parents[2]

PREAMBLE = '''
import asyncio, gc, os, signal, sys, threading, time
from langchain_core.embeddings import Embeddings
from prefetch_embeddings import PrefetchingEmbeddings, PrefetchOutcome

class Model(Embeddings):
    calls = 0
    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]
    def embed_query(self, text):
        self.calls += 1
        return [float(len(text)), 1.0]

class Held(Model):
    """Holds calls for what begins with "held" until it is told to let them go."""
    def __init__(self):
        self.entered, self.go = threading.Event(), threading.Event()
    def embed_query(self, text):
        vector = super().embed_query(text)
        if text.startswith("held"):
            self.entered.set()
            self.go.wait()
        return vector

class HeldOnLoops(Held):
    async def aembed_query(self, text):
        self.calls += 1
        self.entered.set()
        while not self.go.is_set():
            await asyncio.sleep(0.001)
        return [float(len(text)), 1.0]

def say(*what):
    print(*what, flush=True)

def say_when_main_is_in(*functions):
    """Say "waits" once the main thread is inside one of the functions."""
    main = threading.main_thread().ident
    def watch():
        while True:
            frame = sys._current_frames()[main]
            while frame is not None and frame.f_code.co_name not in functions:
                frame = frame.f_back
            if frame is not None:
                return say("waits")
            time.sleep(0.001)
    threading.Thread(target=watch, daemon=True).start()
'''


def environment() -> dict[str, str]:
    """Return the environment of a script: this source tree, and no proxy in between."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}


class Script:
    """A script that runs; what it says is read line by line."""

    def __init__(self, script: str, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *options, "-c", PREAMBLE + textwrap.dedent(script)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._complaints: list[str] = []
        self._reading = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_complaints, daemon=True),
        ]
        for thread in self._reading:
            thread.start()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self._lines.put(text.strip())

    def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        self._complaints.append(self._process.stderr.read())

    def line(self, patience: float = PATIENCE) -> str:
        """Return the next line that the script says."""
        try:
            return self._lines.get(timeout=patience)
        except queue.Empty:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"it says nothing more: {self._complaints}") from None

    def send(self, number: signal.Signals) -> None:
        """Send the script a signal."""
        self._process.send_signal(number)

    def end(self) -> tuple[int, list[str], str]:
        """Wait for the end; return the exit status, the lines not read yet, and complaints."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError("the script hangs") from None
        finally:
            for thread in self._reading:
                thread.join(PATIENCE)
            for pipe in (self._process.stdout, self._process.stderr):
                assert pipe is not None
                pipe.close()
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return self._process.returncode, lines, "".join(self._complaints)


def run(script: str, *options: str) -> list[str]:
    """Run a script to its end, which must be a quiet one; return the lines that it says."""
    status, lines, complaints = Script(script, *options).end()
    assert (status, complaints) == (0, ""), "\n".join([*lines, complaints])
    return lines
