"""A server on a real socket, and a client that speaks its protocol, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path

import uvicorn
import websockets

from evenflow.serve import Limits, Room, Store, create_app, listen, unpack_frame
from evenflow.serve.protocol import LIMITS


class Running:
    """A server in a thread of its own."""

    def __init__(self, source, folder: Path, limits: Limits = LIMITS, texts=None) -> None:
        self.room = Room(source, Store(folder, limits.saved), limits) if source is not None else None
        self.bound = listen("127.0.0.1", 0)
        self.port = self.bound.getsockname()[1]
        config = uvicorn.Config(
            create_app(self.room, texts),
            log_level="error",
            ws_max_size=limits.message,
            ws_max_queue=8,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=1,
            lifespan="on",
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.bound]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        until = time.monotonic() + 10
        while not self.server.started:
            assert time.monotonic() < until, "the server did not start within 10 s"
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not end"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, path: str = "/v1/live", **more):
        return Client(f"ws://127.0.0.1:{self.port}{path}", **more)


class Client:
    """Sends events, keeps what comes."""

    def __init__(self, address: str, **more) -> None:
        self.address, self.more = address, more
        self.events: list[dict] = []
        self.frames: list[tuple] = []  # (header, body)

    async def __aenter__(self):
        more = {"compression": None, "open_timeout": 10, "close_timeout": 2, **self.more}
        self.socket = await websockets.connect(self.address, **more)
        return self

    async def __aexit__(self, *_):
        with contextlib.suppress(Exception):
            await self.socket.close()

    async def send(self, kind: str, **values):
        await self.socket.send(json.dumps({"type": kind, **values}))

    async def hear(self):
        """One message, kept and returned: an event, or (header, body)."""
        message = await self.socket.recv()
        if isinstance(message, bytes):
            self.frames.append(unpack_frame(message))
            return self.frames[-1]
        self.events.append(json.loads(message))
        return self.events[-1]

    async def until(self, kind: str, seconds: float = 10.0, **values):
        """The next event of that kind whose values are these; what comes before is kept too."""
        async with asyncio.timeout(seconds):
            while True:
                heard = await self.hear()
                if isinstance(heard, dict) and heard["type"] == kind and values.items() <= heard.items():
                    return heard

    async def picture(self, fits=lambda header, body: True, seconds: float = 10.0):
        """The next frame that fits."""
        async with asyncio.timeout(seconds):
            while True:
                heard = await self.hear()
                if not isinstance(heard, dict) and fits(*heard):
                    return heard

    async def ask(self, kind: str, answer: str, **values):
        """Send an event and wait for its answer, or for the error that it gets."""
        self.count = getattr(self, "count", 0) + 1
        own = f"e{self.count}"
        await self.send(kind, event_id=own, **values)
        async with asyncio.timeout(10):
            while True:
                heard = await self.hear()
                if isinstance(heard, dict) and heard.get("event_id") == own and heard["type"] in (answer, "error"):
                    return heard

    async def begin(self, **values):
        """A session that plays."""
        created = await self.ask("session.create", "session.created", start=True, **values)
        assert created["type"] == "session.created", created
        return created
