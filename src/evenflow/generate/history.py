"""What was asked of a stream and when, as JSON: with the same seed it gives the same video."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .stream import Chunk, VideoStream


def packed(image: np.ndarray) -> dict[str, Any]:
    """A picture, uint8 [H, W, 3], in JSON."""
    return {"shape": list(image.shape), "zlib": base64.b64encode(zlib.compress(image.tobytes())).decode()}


def unpacked(entry: Mapping[str, Any]) -> np.ndarray:
    """The picture that `packed` was given."""
    data = zlib.decompress(base64.b64decode(entry["zlib"]))
    return np.frombuffer(bytearray(data), np.uint8).reshape(entry["shape"])


def seal(frames: np.ndarray) -> dict[str, Any]:
    """What tells a video from others: videos are too long to be kept in a history."""
    return {"shape": list(frames.shape), "sha256": hashlib.sha256(frames.tobytes()).hexdigest()}


def replay(
    stream: VideoStream, history: Sequence[Mapping[str, Any]],
    videos: Callable[[Mapping[str, Any]], np.ndarray] | None = None,
) -> Iterator[Chunk]:  # fmt: skip
    """Do what a history says, on a fresh stream of the same model, memory, schedule and seed: chunk for chunk the same.

    The stream must begin with the history's first prompt. videos: gives the frames of a `watch` entry back, by its
    shape and SHA-256. Yields the chunks up to the last entry; go on with `stream` itself. Raises ValueError where the
    stream is not fresh, or a video is missing or another one.
    """
    if stream.position or len(stream.history) > 1:
        raise ValueError("a replay begins with a fresh stream: reset() it, or open another")
    if not history or stream.history[0]["prompt"] != history[0].get("prompt"):
        raise ValueError(f"this stream begins with {stream.history[0]['prompt']}, the history does not")
    for entry in history[1:]:
        while stream.position < entry["frame"]:
            yield stream.step()
        if entry["do"] == "step":
            yield stream.step(seed=entry["seed"], follow=entry["follow"], route=entry["route"])
            continue
        _do(stream, entry, videos)


def _do(
    stream: VideoStream, entry: Mapping[str, Any], videos: Callable[[Mapping[str, Any]], np.ndarray] | None
) -> None:
    match entry["do"]:
        case "ask":
            stream.ask(entry["prompt"], entry["how"], entry["over"], entry["way"], entry.get("at"))
        case "draw":
            stream.draw(entry["points"], entry["id"])
        case "erase":
            stream.erase(entry["id"])
        case "show":
            stream.show(unpacked(entry["image"]))
        case "watch":
            if videos is None:
                raise ValueError("the history watched a video: give `videos`, which finds it by its SHA-256")
            frames = videos(entry)
            if seal(frames) != {"shape": entry["shape"], "sha256": entry["sha256"]}:
                raise ValueError("what `videos` gave is not the video that was watched")
            stream.watch(frames)
        case other:
            raise ValueError(f"the history holds {other!r}, which is nothing that a stream does")
