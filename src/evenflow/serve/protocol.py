"""What travels between a client and the server: JSON events both ways, and frames as binary messages.

Events follow the convention of realtime APIs: `{"type": "noun.verb", ...}`, the client's in the imperative
(`session.create`), the server's in the past (`session.created`). docs/live.md lists them all.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from .limits import Limits

LIMITS = Limits()  # what the shapes below are bounded by, on every server

How = Literal["keep", "clear", "recache", "anchored"]
Way = Literal["linear", "slerp"]
Prompt = Annotated[str, Field(min_length=1, max_length=LIMITS.prompt)]
Spec = Annotated[str, Field(min_length=1, max_length=200)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]  # as many as a browser's numbers tell apart
Pace = Annotated[float, Field(gt=0.05, le=8)]
Seconds = Annotated[float, Field(ge=0, le=60)]
Identity = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{22}$")]
Coordinate = Annotated[float, Field(ge=-10_000, le=10_000)]
TrackId = Annotated[int, Field(ge=0, lt=2**31)]
Point = tuple[Annotated[float, Field(ge=0, le=600)], Coordinate, Coordinate]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Settings(_Shape):
    """What a session runs with; None leaves it to the server."""

    memory: Spec | None = None
    schedule: Spec | None = None
    seed: Seed | None = None
    pace: Pace | None = None


# -- what can be put into a stream -------------------------------------------------------------------------------------


class PromptItem(_Shape):
    """From the next chunk on, this is what is shown."""

    type: Literal["prompt"]
    text: Prompt
    how: How | None = None  # None: the best that the memory can do
    over: Seconds = 0.0
    way: Way = "linear"


class BlendItem(_Shape):
    """Several prompts at once, weighted."""

    type: Literal["blend"]
    weights: Annotated[dict[Prompt, Annotated[float, Field(ge=0, le=1000)]], Field(min_length=1, max_length=8)]
    how: How | None = None  # None: the best that the memory can do
    over: Seconds = 0.0
    way: Way = "linear"

    @field_validator("weights")
    @classmethod
    def _some(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError("all weights are 0; at least one must be above")
        return weights


class TrackItem(_Shape):
    """A path that something is to follow: seconds from now, x and y in pixels of the video."""

    type: Literal["track"]
    points: Annotated[list[Point], Field(min_length=1, max_length=LIMITS.points)]
    id: TrackId | None = None

    @field_validator("points")
    @classmethod
    def _onwards(cls, points: list[Point]) -> list[Point]:
        if any(later[0] < earlier[0] for earlier, later in pairwise(points)):
            raise ValueError("the seconds of a path must not go back")
        return points


class EraseItem(_Shape):
    """The path of that id is followed no longer."""

    type: Literal["erase"]
    id: TrackId


class ImageItem(_Shape):
    """A picture to begin from: PNG, JPEG or WebP, in base64."""

    type: Literal["image"]
    data: Annotated[str, Field(min_length=16, max_length=LIMITS.message)]


class SettingsItem(_Shape):
    """The video begins anew, from what is asked for now, with these."""

    type: Literal["settings"]
    memory: Spec
    schedule: Spec
    seed: Seed


ClientItem = PromptItem | BlendItem | TrackItem | EraseItem | ImageItem


# -- events from a client ----------------------------------------------------------------------------------------------


class _Event(_Shape):
    event_id: Annotated[str, Field(max_length=64)] | None = None  # comes back with the answer


class SessionCreate(_Event, Settings):
    type: Literal["session.create"]
    prompt: Prompt | None = None
    start: bool = False


class SessionUpdate(_Event, Settings):
    type: Literal["session.update"]


class SessionResume(_Event):
    type: Literal["session.resume"]
    session: Identity


class SessionRestart(_Event):
    type: Literal["session.restart"]


class SessionSave(_Event):
    type: Literal["session.save"]


class SessionClose(_Event):
    type: Literal["session.close"]
    forget: bool = False


class InputAppend(_Event):
    type: Literal["input.append"]
    item: Annotated[ClientItem, Field(discriminator="type")]


class ResponseCreate(_Event):
    type: Literal["response.create"]


class ResponseCancel(_Event):
    type: Literal["response.cancel"]


class RecordStart(_Event):
    type: Literal["record.start"]


class RecordStop(_Event):
    type: Literal["record.stop"]


class FrameAck(_Event):
    type: Literal["frame.ack"]
    frame: Annotated[int, Field(ge=0, lt=2**64)]


class Entry(_Shape):
    """One thing of a timeline: what was put in, and after how many latent frames."""

    at: Annotated[int, Field(ge=0, lt=2**53)]
    item: Annotated[ClientItem | SettingsItem, Field(discriminator="type")]


class Timeline(_Shape):
    """All that makes a video: played again, it gives the same frames."""

    prompt: Prompt
    seed: Seed
    memory: Spec
    schedule: Spec
    entries: Annotated[list[Entry], Field(max_length=LIMITS.history)] = []

    @model_validator(mode="after")
    def _onwards(self) -> Timeline:
        if any(later.at < earlier.at for earlier, later in pairwise(self.entries)):
            raise ValueError("the entries of a timeline must be in order")
        return self


class HistoryReplay(_Event):
    type: Literal["history.replay"]
    history: Timeline


ClientEvent = Annotated[
    SessionCreate | SessionUpdate | SessionResume | SessionRestart | SessionSave | SessionClose | InputAppend
    | ResponseCreate | ResponseCancel | RecordStart | RecordStop | FrameAck | HistoryReplay,
    Field(discriminator="type"),
]  # fmt: skip
_live: TypeAdapter[Any] = TypeAdapter(ClientEvent)


# -- events of a client that has a text read ---------------------------------------------------------------------------


class ReadCreate(_Event):
    type: Literal["read.create"]
    memory: Spec | None = None


class ReadAppend(_Event):
    type: Literal["read.append"]
    text: Annotated[str, Field(min_length=1, max_length=64 * 1024)]


class ReadFinish(_Event):
    type: Literal["read.finish"]


_reading: TypeAdapter[Any] = TypeAdapter(Annotated[ReadCreate | ReadAppend | ReadFinish, Field(discriminator="type")])


class Refused(ValueError):
    """What a client asked for cannot be done: a short code, what was wrong, and what to do."""

    def __init__(self, code: str, message: str, what_to_do: str) -> None:
        super().__init__(message)
        self.code, self.message, self.what_to_do = code, message, what_to_do

    def event(self, event_id: str | None = None) -> dict[str, Any]:
        """The `error` event of it."""
        error = {"code": self.code, "message": self.message, "what_to_do": self.what_to_do}
        return {"type": "error", "error": error, **({} if event_id is None else {"event_id": event_id})}


def read_event(message: str, *, reading: bool = False, limit: int = LIMITS.message) -> Any:
    """The event that a client's message is (for `reading`, one of `read.*`). Raises Refused with the reason."""
    if len(message) > limit or len(message.encode("utf-8", "surrogatepass")) > limit:
        raise Refused("too_large", f"a message is longer than {limit:,} bytes", "send less at a time")
    try:
        values = json.loads(message)
    except (ValueError, RecursionError):
        raise Refused("bad_message", "a message is not JSON", 'send {"type": "...", ...}') from None
    if not isinstance(values, dict):
        raise Refused("bad_message", "a message is not a JSON object", 'send {"type": "...", ...}')
    try:
        return (_reading if reading else _live).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refused("bad_event", f"{where}: {first['msg']}" if where else first["msg"], "see docs/live.md") from None


# -- frames ------------------------------------------------------------------------------------------------------------

MAGIC, VERSION = b"EVNF", 1
FORMATS = ("webp", "jpeg")
_HEADER = struct.Struct("<4sBBHHHIQd")  # magic, version, format, width, height, nothing, chunk, frame, captured


@dataclass(frozen=True)
class FrameHeader:
    """What stands before the picture: 32 bytes, little-endian.

    frame: index in the session, from 0 on. captured: seconds since 1970 when it was made. chunk: index of the chunk it
    came in. width, height: pixels. format: of the body, "webp" or "jpeg".
    """

    frame: int
    captured: float
    chunk: int
    width: int
    height: int
    format: str


def pack_frame(header: FrameHeader, body: bytes) -> bytes:
    """One binary message: header and picture."""
    return (
        _HEADER.pack(
            MAGIC, VERSION, FORMATS.index(header.format), header.width, header.height, 0, header.chunk & 0xFFFFFFFF,
            header.frame, header.captured,
        )
        + body
    )  # fmt: skip


def unpack_frame(message: bytes) -> tuple[FrameHeader, bytes]:
    """Header and picture of a binary message. Raises ValueError for what is no frame of this version."""
    if len(message) < _HEADER.size or message[:4] != MAGIC:
        raise ValueError(f"no frame: a message of {len(message)} bytes that does not begin with {MAGIC!r}")
    _, version, form, width, height, _, chunk, frame, captured = _HEADER.unpack_from(message)
    if version != VERSION or form >= len(FORMATS):
        raise ValueError(f"a frame of version {version}, format {form}; this reads version {VERSION}")
    return FrameHeader(frame, captured, chunk, width, height, FORMATS[form]), message[_HEADER.size :]
