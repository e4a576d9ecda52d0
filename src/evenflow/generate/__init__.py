"""Endless video: schedules of noise, prompts that change, and streams that can be saved, copied and replayed."""

from .composing import SCHEDULES, compatible, parse_schedule
from .engine import Engine, Given
from .flow import Consistency, Flow, Sampler, noise
from .guidance import Guidance
from .history import replay
from .moving import Batch, Buffer, Rolling
from .opening import memory_for_video
from .pacing import NoiseControl
from .queue import newest
from .saving import resume_stream
from .schedule import Call, Chunks, Knots, Schedule
from .searching import Beam, Search, SearchedStream
from .stream import Chunk, VideoStream

__all__ = [
    "SCHEDULES", "Batch", "Beam", "Buffer", "Call", "Chunk", "Chunks", "Consistency", "Engine", "Flow", "Given", "Guidance", "Knots", "NoiseControl", "Rolling",
    "Sampler", "Schedule", "Search", "SearchedStream", "VideoStream", "compatible", "memory_for_video", "newest", "noise", "parse_schedule", "replay",
    "resume_stream",
]  # fmt: skip
