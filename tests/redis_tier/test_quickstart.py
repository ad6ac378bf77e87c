"""The Redis quickstart runs as it stands, and the second time without the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import langchain_chroma  # noqa: F401 - the script needs it

from examples.knowledge_base import PASSAGES
from examples.local_openai import LocalOpenAI
from tests.redis_tier.server import RedisServer

ROOT = Path(__file__).parents[2]


def _run(endpoint: LocalOpenAI, server: RedisServer) -> str:
    return subprocess.run(
        [sys.executable, "-m", "examples.quickstart_redis"],
        cwd=ROOT,
        env={**os.environ, **endpoint.environment(), "REDIS_URL": server.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_the_second_run_needs_no_model(server: RedisServer) -> None:
    with LocalOpenAI(process=True) as endpoint:
        assert "A red light means that there is no signal" in _run(endpoint, server)
        assert endpoint.stats().inputs == len(PASSAGES) + 1
        told = _run(endpoint, server)
        assert endpoint.stats().inputs == len(PASSAGES) + 1, "Redis was there, and not asked"
    texts = len(PASSAGES) + 1
    assert f"out of Redis: {texts} of {texts} texts" in told
