"""Steer a live video from a program: python examples/live_client.py [ADDRESS]

ADDRESS is what `evenflow live` printed, such as http://127.0.0.1:8484; without it, a server is started for the purpose.
The video is asked for something else twice and a path is drawn; what is said is what the server measured.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from websockets.sync.client import ClientConnection, connect

from evenflow.serve import started, unpack_frame

SECONDS = 1.5  # of video for each wish
WISHES: list[dict[str, Any]] = [
    {"type": "prompt", "text": "a large red circle rests over the sea by day"},
    {"type": "track", "points": [[0.0, 10.0, 32.0], [2.0, 54.0, 32.0]]},
    {"type": "blend", "weights": {"a red circle at night": 0.5, "a blue circle at night": 0.5}, "over": 1.0},
]


def events(socket: ClientConnection) -> Iterator[dict[str, Any]]:
    """Everything that comes: events as they are, frames as events of the type "frame"."""
    shown = 0
    for message in socket:
        if isinstance(message, str):
            yield json.loads(message)
        else:
            header, picture = unpack_frame(message)  # the picture is WebP or JPEG: open it with any library
            shown += 1
            if shown % 8 == 0:  # tells the server that we keep up; without, it counts on the connection alone
                socket.send(json.dumps({"type": "frame.ack", "frame": header.frame}))
            yield {"type": "frame", "frame": header.frame, "bytes": len(picture)}


def main(address: str) -> None:
    with connect(address.replace("http", "ws", 1) + "/v1/live", max_size=None) as socket:

        def send(kind: str, **values: Any) -> None:
            socket.send(json.dumps({"type": kind, **values}))

        send("session.create", prompt="a large yellow star bounces over a meadow by day", seed=1, start=True)
        stats: dict[str, Any] = {}
        left, until = list(WISHES), SECONDS * 16  # frames of a model of 16 a second
        for event in events(socket):
            match event["type"]:
                case "session.created":
                    print(f"session {event['session']}, memory {event['settings']['memory']}")
                case "input.appended":
                    print(f"after {event['at']} latent frames: {event['item']['type']}")
                case "stats":
                    stats = event
                case "error":
                    sys.exit(f"{event['error']['message']}: {event['error']['what_to_do']}")
                case "frame" if event["frame"] >= until:
                    until = event["frame"] + SECONDS * 16
                    if left:
                        send("input.append", item=left.pop(0))
                    else:
                        send("session.close", forget=True)
                case "session.closed":
                    break
        print(
            f"{stats['fps']:.1f} frames/s, last change seen after {stats['latency']} s, {stats['bytes']:,} bytes held"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with started() as own:
            main(own)
