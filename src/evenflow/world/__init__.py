"""A synthetic world with exact ground truth: seeded scenes, films of them, and a judge of what films show."""

from .describe import VOCABULARY, describe, read, understand
from .film import Film, World, film
from .scene import VARIETIES, Scene, Thing, Variety, draw_scene, held_out, next_scene
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
    "Film",
    "Scene",
    "Thing",
    "Variety",
    "World",
    "describe",
    "draw_scene",
    "film",
    "held_out",
    "next_scene",
    "read",
    "understand",
]
