"""The server: one page, one socket for videos, one for reading."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

from .limits import Bucket, Limits
from .live import Live
from .protocol import LIMITS, FrameAck, Refused, read_event
from .reading import Reader, TextStream
from .room import Room
from .security import Guard
from .source import Choice
from .viewer import Outbox, TooSlow, Viewer
from .worker import Worker

STATIC = Path(__file__).parent / "static"
SWEEP = 5.0  # seconds between two looks for sessions that nobody has come back to
log = logging.getLogger("evenflow.serve")


@dataclasses.dataclass(frozen=True)
class Texts:
    """What reads texts. open: a fresh stream for the spec of a memory. memories: which there are. memory: the default."""

    open: Callable[[str], TextStream]
    memories: Callable[[], list[Choice]]
    memory: str


class Pulse:
    """Holds one client to its rate; too much in a row that is refused ends the connection."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.events = Bucket(limits.event_rate, limits.event_burst)
        self.bytes = Bucket(limits.byte_rate, limits.byte_burst)
        self.acks = Bucket(100.0, 200.0)  # they cost nothing, and are not what steering waits for
        self.complaints = Bucket(2.0, 10.0)
        self.strikes = 0

    def admit(self, event: Any, size: int) -> None:
        """Raises Refused when an event of `size` bytes is too much now."""
        passed = self.acks.take() if isinstance(event, FrameAck) else self.events.take()
        if not (passed and self.bytes.take(size)):
            raise Refused("rate_limited", "too many messages", f"send at most {self.limits.event_rate:.0f} a second")
        self.strikes = 0


def create_app(
    room: Room | None, texts: Texts | None = None, *, names: frozenset[str] = frozenset(), local: bool = True
) -> FastAPI:
    """The application over a room of videos and a reader of texts.

    names: what the server is called beside its addresses. local: it listens on this machine alone.
    """
    limits = room.limits if room is not None else LIMITS
    readers = Worker("texts") if texts is not None else None
    open_sockets: set[WebSocket] = set()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(SWEEP)
                if room is not None:
                    room.sweep()

        sweeping = asyncio.create_task(sweep())
        yield
        sweeping.cancel()
        if readers is not None:
            await asyncio.to_thread(readers.stop)
        if room is not None:
            await asyncio.to_thread(room.close)

    app = FastAPI(title="Evenflow live", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, names=names, local=local)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "sockets": len(open_sockets), **({} if room is None else room.described())}

    @app.get("/v1/options")
    async def options() -> JSONResponse:
        answer: dict[str, Any] = {"limits": dataclasses.asdict(limits), "video": None, "text": None}
        if room is not None:
            source, choices = room.source, await asyncio.to_thread(room.choices)
            answer["video"] = {
                "model": source.name, "fps": source.fps, "size": source.size, "stride": source.stride,
                "prompt": source.prompt, "memory": source.memory, "schedule": source.schedule,
                "suggestions": source.suggestions,
                **{kind: [dataclasses.asdict(choice) for choice in some] for kind, some in choices.items()},
            }  # fmt: skip
        if texts is not None:
            memories = await asyncio.to_thread(texts.memories)
            answer["text"] = {"memory": texts.memory, "memories": [dataclasses.asdict(m) for m in memories]}
        return JSONResponse(answer)

    @app.get("/v1/sessions/{identity}/recording.mp4")
    async def recording(identity: str) -> Response:
        try:
            if room is None:
                raise Refused("not_found", "this server shows no videos", "start it with a video model")
            path = room.store.recording(identity)
            if not path.is_file():
                raise Refused("not_found", "there is no recording of that session", "record one first")
        except Refused as refused:
            return JSONResponse(refused.event(), status_code=404)
        return FileResponse(path, media_type="video/mp4", filename="evenflow.mp4")

    async def converse(socket: WebSocket, outbox: Outbox, handle: Callable[[Any], None], reading: bool) -> None:
        """Read events until the client goes; what is wrong with one is told, and the next is read."""
        pulse = Pulse(limits)
        while not outbox.over:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            event_id = None
            try:
                if text is None:
                    raise Refused("bad_message", "a message is binary", 'send {"type": "...", ...} as text')
                event = read_event(text, reading=reading, limit=limits.message)
                event_id = event.event_id
                pulse.admit(event, len(text))
                handle(event)
            except Refused as refused:
                pulse.strikes += 1
                if pulse.strikes > limits.strikes:
                    outbox.close()
                elif pulse.complaints.take():
                    outbox.offer(refused.event(event_id))

    async def serve(socket: WebSocket, outbox: Outbox, handle: Callable[[Any], None], reading: bool = False) -> None:
        """Speak with one client until it goes, or is too slow or too loud."""
        sending = asyncio.create_task(outbox.run())
        hearing = asyncio.create_task(converse(socket, outbox, handle, reading))
        both = (sending, hearing)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done() and outbox.over:
            await asyncio.wait((sending,), timeout=limits.stalled)
        for task in both:
            task.cancel()
        for ended in await asyncio.gather(*both, return_exceptions=True):
            if isinstance(ended, Exception) and not isinstance(ended, (TooSlow, WebSocketDisconnect, RuntimeError)):
                log.error("a connection ended with %r", ended, exc_info=ended)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(1.0):
                await socket.close(1008 if outbox.over else 1000)

    async def admitted(socket: WebSocket, what: object) -> bool:
        """Whether there is room for one more client, who is told if not."""
        await socket.accept()
        trouble = None
        if what is None:
            trouble = Refused("not_found", "this server does not do that", "start it with a model for it")
        elif len(open_sockets) >= limits.sockets:
            trouble = Refused("full", f"{limits.sockets} connections are open", "try again in a while")
        if trouble is None:
            open_sockets.add(socket)
            return True
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.send_json(trouble.event())
            await socket.close(1013)
        return False

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        if not await admitted(socket, room):
            return
        assert room is not None
        viewer = Viewer(socket, limits)
        client = Live(room, viewer)
        try:
            await serve(socket, viewer, client.handle)
        finally:
            client.gone()
            open_sockets.discard(socket)

    @app.websocket("/v1/read")
    async def read(socket: WebSocket) -> None:
        if not await admitted(socket, texts):
            return
        assert texts is not None and readers is not None
        outbox, reader = Outbox(socket, limits), None

        def handle(event: Any) -> None:
            nonlocal reader
            if event.type == "read.create":
                if reader is not None:
                    readers.remove(reader)
                memory = event.memory or texts.memory
                reader = Reader(lambda: texts.open(memory), outbox.offer, limits, readers.wake)
                readers.add(reader)
            elif reader is None:
                raise Refused("refused", "nothing is being read", "send read.create first")
            elif event.type == "read.append":
                reader.append(event.text)
            else:
                reader.finish()

        try:
            await serve(socket, outbox, handle, reading=True)
        finally:
            if reader is not None:
                readers.remove(reader)
            open_sockets.discard(socket)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app
