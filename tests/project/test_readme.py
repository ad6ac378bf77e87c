"""Every Python block of the README and the manual runs, against the local endpoint."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken

from examples.local_openai import LocalOpenAI

ROOT = Path(__file__).parents[2]


def _blocks() -> Iterator[tuple[str, str]]:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            line = page.read_text()[: match.start()].count("\n") + 2
            yield f"{page.name}:{line}", match[1]


BLOCKS = dict(_blocks())


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The OpenAI client finds the local endpoint, and a tokenizer that needs no download."""
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={},
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: encoding)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with LocalOpenAI() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        yield


def test_there_are_blocks() -> None:
    assert any(name.startswith("README.md") for name in BLOCKS)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # a reader's program just ends
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "readme"})
    gc.collect()  # the connections of this block's clients, here and not in somebody else's test


@pytest.mark.parametrize("name", [name for name, code in BLOCKS.items() if "\ndef test_" in code])
def test_tests_in_blocks_pass(name: str, tmp_path: Path) -> None:
    (tmp_path / "test_block.py").write_text(BLOCKS[name])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
