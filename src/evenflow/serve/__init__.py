"""Live sessions for people and programs: a room of videos that share a model, a page to steer them, and a protocol."""

from .app import Texts, create_app
from .limits import Limits
from .protocol import FrameHeader, Refused, pack_frame, unpack_frame
from .room import Room
from .run import address_of, listen, run, started
from .source import Choice, Source, Video
from .store import Store, default_folder
from .videos import Videos

__all__ = [
    "Choice",
    "FrameHeader",
    "Limits",
    "Refused",
    "Room",
    "Source",
    "Store",
    "Texts",
    "Video",
    "Videos",
    "address_of",
    "create_app",
    "default_folder",
    "listen",
    "pack_frame",
    "run",
    "started",
    "unpack_frame",
]
