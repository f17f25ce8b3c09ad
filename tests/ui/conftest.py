"""The app in a process of its own, and a real browser in front of it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from bapo.adapters import AdapterStore
from bapo.inference.base import EMBEDDED, load_base
from bapo.settings import REPOSITORY, Settings
from tests.tiny import make_adapter

# The flags keep a sandboxed machine's Chromium from looking for servers it cannot reach.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

# A busy machine may take a minute over anything; only a test that fails waits that long.
expect.set_options(timeout=60_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """A fresh tab; the test fails where the page's own scripts do."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    context.close()
    assert not errors


def serve(**environment: str) -> Iterator[str]:
    """Run app.py on a free port until it answers; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=REPOSITORY, env={**os.environ, "BAPO_PORT": str(port), **environment}
    )
    try:
        for _ in range(240):
            assert process.poll() is None, "the app ended by itself"
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def real_app(tmp_path_factory) -> Iterator[str]:
    """The app as `make demo` starts it on a machine without a GPU."""
    yield from serve(BAPO_BASE=EMBEDDED, BAPO_DATA=str(tmp_path_factory.mktemp("real-data")))


@pytest.fixture(scope="session")
def tiny_app(tiny_folders, tmp_path_factory) -> Iterator[str]:
    """The app over a tiny random base: endless answers, quickly."""
    folder = tmp_path_factory.mktemp("tiny-app")
    settings = Settings(base=str(tiny_folders["llama"]), cache=folder / "cache", adapters=folder / "adapters")
    for seed, (preference, method) in enumerate(
        [("P2A", "dpo"), ("P2A", "bapo"), ("literature", "dpo"), ("literature", "bapo"), ("business", "bapo")]
    ):
        base = load_base(replace(settings))
        make_adapter(base, AdapterStore(settings.adapters, base.name, base.fingerprint), preference, method, seed)
    yield from serve(
        BAPO_BASE=settings.base,
        BAPO_CACHE=str(settings.cache),
        BAPO_ADAPTERS=str(settings.adapters),
        BAPO_DATA=str(folder / "data"),
        BAPO_MAX_NEW_TOKENS="2048",
        OMP_NUM_THREADS="1",
    )
