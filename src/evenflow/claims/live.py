"""What somebody sees who opens the live page: measured through its socket, with pictures as they travel."""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

from .registry import Bench, claim

PACE = 3.0  # of the video's own: faster than it can be made, so that it comes as fast as it is made
PROMPTS = tuple(f"a large {colour} rests over the sea by day" for colour in ("red circle", "blue star", "green square"))


class Viewer:
    """A client that looks at everything at once. frames: when each picture came, in seconds."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.frames: list[float] = []

    def send(self, kind: str, **values: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **values}))

    def until(self, kind: str) -> dict[str, Any]:
        """Take what comes until an event of that kind, or a "frame", has come. Raises RuntimeError at an error."""
        for message in self.socket:
            if isinstance(message, str):
                event: dict[str, Any] = json.loads(message)
                if event["type"] == "error":
                    raise RuntimeError(event["error"]["message"])
                if event["type"] == kind:
                    return event
            else:
                self.frames.append(time.perf_counter())
                if kind == "frame":
                    return {}
        raise RuntimeError("the server has closed the connection")


@claim("live")
def live(bench: Bench) -> None:
    """The page shows its first frame within a second, keeps the video's rate, and a change is seen within two chunks."""
    from websockets.sync.client import connect

    from ..serve import started

    seconds = 60 if bench.full else 15
    with started() as address, connect(address.replace("http", "ws", 1) + "/v1/live", max_size=None) as socket:
        viewer = Viewer(socket)
        start = time.perf_counter()
        viewer.send("session.create", prompt=PROMPTS[0], seed=1, pace=1.0, start=True)
        viewer.until("frame")
        first = viewer.frames[0] - start
        bench.row("seconds from the wish to the first picture, server running", "≤ 1", f"{first:.2f}", first <= 1)
        own = rate(viewer, seconds)
        bench.row("pictures a second at the video's own pace", "16", f"{own:.2f}", own >= 0.98 * 16)
        late = []
        for n in range(1, 7):
            viewer.send("input.append", item={"type": "prompt", "text": PROMPTS[n % 3]})
            viewer.until("input.appended")
            rate(viewer, 2.5)
            late.append(float(viewer.until("stats")["latency"]))
        bench.row(
            "seconds until a change of prompt is seen", "≤ 1.5 (two chunks)", f"{median(late):.2f}", median(late) <= 1.5,
            f"{len(late)} changes; the latest {max(late):.2f}",
        )  # fmt: skip
        viewer.send("session.update", pace=PACE)
        rate(viewer, 2.0)
        most = rate(viewer, seconds)
        bench.row("pictures a second as fast as they are made", "≥ 16", f"{most:.1f}", most >= 16, f"{seconds} seconds")
        viewer.send("session.close", forget=True)


def rate(viewer: Viewer, seconds: float) -> float:
    """Pictures a second over so many seconds."""
    before, start = len(viewer.frames), time.perf_counter()
    while time.perf_counter() - start < seconds:
        viewer.until("frame")
    return (len(viewer.frames) - before) / (time.perf_counter() - start)
