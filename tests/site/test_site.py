"""The site: built strictly, with every public name, and looked at in a real browser."""

from __future__ import annotations

import functools
import http.server
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
PAGES = ("", "retrieval/", "voice-bots/", "chat-backends/", "redis/", "reference/prefetching/")
MODULES = (
    "prefetch_embeddings",
    "prefetch_embeddings.existing",
    "prefetch_embeddings.openai",
    "prefetch_embeddings.replay",
    "prefetch_embeddings.testing",
)


def _needs(name: str) -> Any:
    if os.environ.get("EXTRAS_REQUIRED"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} not installed: make docs")


def test_every_public_name_is_in_the_reference_once() -> None:
    shown = re.findall(
        r"^::: (\S+)$", "\n".join(p.read_text("utf-8") for p in REFERENCE.glob("*.md")), re.M
    )
    assert len(shown) == len(set(shown))
    things = []
    for name in shown:
        module, _, attribute = name.rpartition(".")
        things.append(getattr(importlib.import_module(module), attribute))
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            assert any(thing is each for each in things), f"{module_name}.{name} is in no page"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the site, strictly, and serve it."""
    _needs("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the machine's own Chromium."""
    api = _needs("playwright.sync_api")
    named = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next((path for path in named if path), None)
    if program is None and not os.environ.get("EXTRAS_REQUIRED"):
        pytest.skip("no chromium here: apt-get install chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Open a tab that asks nobody but the site, and whose console must stay silent."""
    opened = browser.new_page()
    wrong: list[str] = []

    def check(request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            wrong.append(f"asks for {request.url}")

    opened.on("request", check)

    def hear(said: Any) -> None:
        if said.type == "error":
            wrong.append(said.text)

    opened.on("console", hear)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    yield opened
    opened.close()
    assert not wrong


@pytest.mark.parametrize("path", PAGES)
def test_pages_load(site: str, page: Any, path: str) -> None:
    assert page.goto(f"{site}/{path}").ok
    assert page.locator("h1").first.inner_text()
    for picture in page.locator("article img").all():
        assert picture.evaluate("image => image.naturalWidth") > 0


def test_the_reference_has_what_a_class_inherits_of_ours(site: str, page: Any) -> None:
    page.goto(f"{site}/reference/prefetching/")
    for method in ("is_ready", "wait_for_prefetch", "stats", "close", "invoke"):
        assert page.locator(f'[id="prefetch_embeddings.PrefetchingRetriever.{method}"]').count()


def test_the_search_finds_aprefetch(site: str, page: Any) -> None:
    page.goto(site)
    page.keyboard.press("/")
    page.keyboard.type("aprefetch")
    found = page.locator(".md-search-result__item a").first
    found.wait_for(timeout=30_000)
    links = page.locator(".md-search-result__item a").all()
    assert any("reference/prefetching" in (link.get_attribute("href") or "") for link in links)
