"""A synthetic world with exact ground truth: seeded scenes, films of them, and a judge of what films show."""

from .describe import VOCABULARY, describe, read, understand
from .film import Film, World, film
from .judge import Quality, Reading, Seen, judge, quality
from .measure import judge_errors
from .obey import Drift, Obedience, drift, obeys
from .questions import Question
from .scene import VARIETIES, Scene, Thing, Variety, draw_scene, held_out, next_scene
from .truth import Event, project
from .words import CAMERAS, COLOURS, LIGHTS, MOTIONS, PLACES, SHAPES, SIZES, TEXTURES, WEATHERS

__all__ = [
    "CAMERAS",
    "COLOURS",
    "LIGHTS",
    "MOTIONS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "VARIETIES",
    "VOCABULARY",
    "WEATHERS",
    "Drift",
    "Event",
    "Film",
    "Obedience",
    "Quality",
    "Question",
    "Reading",
    "Scene",
    "Seen",
    "Thing",
    "Variety",
    "World",
    "describe",
    "draw_scene",
    "drift",
    "film",
    "held_out",
    "judge",
    "judge_errors",
    "next_scene",
    "obeys",
    "project",
    "quality",
    "read",
    "understand",
]
