"""Listening: an address, a server, and a clean end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from .limits import Limits
from .protocol import LIMITS


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises ValueError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen at {host}, port {port}: {said}; choose another --port") from None
    bound.listen(128)
    return bound


def address_of(bound: socket.socket) -> str:
    """What to open in a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, bound: socket.socket, limits: Limits = LIMITS, ready: Callable[[], None] | None = None) -> None:
    """Serve until interrupted; sessions are saved before this returns. ready: is called when clients are answered."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if ready is not None and self.started:
                ready()

    config = uvicorn.Config(
        app, log_level="warning", ws_max_size=limits.message, ws_max_queue=8, ws_per_message_deflate=False,
        timeout_graceful_shutdown=3, server_header=False, lifespan="on",
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # raised again once all is saved; ctrl-C is how a server ends
        Server(config).run(sockets=[bound])


@contextlib.contextmanager
def started(*options: str) -> Iterator[str]:
    """`evenflow live` in a process of its own, at a free port, with a folder that goes when it goes; its address.

    options: more of them, as on the command line. Raises RuntimeError when it ends before it answers.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "evenflow", "live", "--port", "0", "--data", folder, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            said = process.stdout.readline().split()
            if not said:
                raise RuntimeError(
                    f"the server ended with status {process.wait(20)} before it answered; see what it wrote"
                )
            yield said[-1]
        finally:
            process.terminate()
            process.wait(20)
