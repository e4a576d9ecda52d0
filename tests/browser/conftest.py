"""A real browser, headless; and a server as a process of its own, which can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ROOT = Path(__file__).parents[2]


def found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def chromium() -> str:
    """The path of a Chromium; where there is none and packages may be installed, they are, once."""
    if not found() and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (
            ["update", "-qq"],
            ["install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"],
        ):
            subprocess.run(["apt-get", *command], check=False, capture_output=True, timeout=400)
    path = found()
    if path is None:
        pytest.fail(f"these tests need a browser: install the package chromium (looked for {', '.join(NAMES)} in PATH)")
    return path


@pytest.fixture(scope="module")
def browser():
    """For one module only: while it is open, its event loop is that of the thread, and asyncio can have no other."""
    options = ["--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb"]
    with sync_playwright() as player:
        launched = player.chromium.launch(
            executable_path=chromium(), args=options, chromium_sandbox=hasattr(os, "geteuid") and os.geteuid() != 0
        )
        yield launched
        launched.close()


class Process:
    """A server with the double, in a process of its own, at a port that stays the same when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as some:
            some.bind(("127.0.0.1", 0))
            self.port = some.getsockname()[1]
        self.process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Come up; fails when it takes longer than half a minute."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-m", "tests.browser.serving", str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == self.address

    def kill(self) -> None:
        """End without a chance to save anything."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> None:
        """End as ctrl-C does."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process = Process(tmp_path_factory.mktemp("live"))
    process.start()
    yield process
    process.stop()


@pytest.fixture
def page(browser, server):
    """A page in a window of its own, without memory of earlier ones; it must not raise anything."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda said: page.problems.append(said.text) if "Content Security Policy" in said.text else None)
    yield page
    context.close()
    assert not page.problems, page.problems


def settle(check, seconds: float = 10.0, every: float = 0.05):
    """Wait until `check()` is true; its value."""
    until = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(every)
    return value
