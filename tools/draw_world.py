"""Draw what the synthetic world shows, and what is known of it: python tools/draw_world.py [FOLDER]

Writes FOLDER/figures/world.png; FOLDER is docs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evenflow.world import COLOURS, Film, Scene, Thing, film, judge

STREET = (
    "a large red circle and a medium striped blue square collide and a small yellow star bounces over a meadow by day, "
    "the camera pans left",
    "a large red circle and a medium striped blue square collide and a small pink star bounces over a city at dusk, "
    "the camera pans left",
)
CHANGE = 24
PLACES = (
    Scene((Thing("heart", "pink", "large"), Thing("circle", "yellow", "small")), "meadow", "day"),
    Scene((Thing("diamond", "red", "large", "striped"),), "sea", "dusk"),
    Scene((Thing("star", "blue", "large"), Thing("ring", "green", "medium")), "desert", "day", "fog"),
    Scene((Thing("square", "orange", "large", "checked"), Thing("cross", "cyan", "small")), "city", "night"),
    Scene(
        (Thing("triangle", "purple", "large"), Thing("circle", "red", "medium", "dotted")), "mountains", "day", "snow"
    ),
    Scene((Thing("ring", "yellow", "large"), Thing("heart", "cyan", "medium")), "forest", "dusk", "rain"),
)


def picture(axes: Axes, pixels: np.ndarray, title: str = "") -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, fontsize=8, pad=3)
    axes.axis("off")


def tracks(axes: Axes, clip: Film, at: int) -> None:
    picture(axes, clip.pixels[at], "tracks, gaze (white)")
    for n, thing in enumerate(clip.things):
        colour = np.array(COLOURS[thing.colour]) / 255
        axes.plot(clip.tracks[:, n, 0] - 0.5, clip.tracks[:, n, 1] - 0.5, color=colour * 0.7, lw=1)
    axes.plot(clip.gaze[:, 0] - 0.5, clip.gaze[:, 1] - 0.5, color="white", lw=0.6)


def masks(axes: Axes, clip: Film, at: int) -> None:
    shown = np.full((clip.height, clip.width, 3), 235, np.uint8)
    for n, thing in enumerate(clip.things):
        shown[clip.masks[at, n]] = COLOURS[thing.colour]
    picture(axes, shown, "masks")
    for n in range(len(clip.things)):
        axes.contour(clip.amodal[at, n], [0.5], colors="black", linewidths=0.7)


def heard(axes: Axes, clip: Film) -> None:
    seconds = np.arange(len(clip.sound)) / 16_000
    axes.plot(seconds, clip.sound, lw=0.3, color="#4a6a8a")
    for event in clip.events:
        if event.what in ("bounce", "collide", "prompt changed"):
            axes.axvline(
                event.time, color={"bounce": "#c44", "collide": "#e80"}.get(event.what, "#292"), lw=0.8, alpha=0.8
            )
    axes.set_xlim(0, seconds[-1])
    axes.set_title("sound, bounces (red), collisions (orange), the prompt changes (green)", fontsize=8, pad=3)
    axes.set_xlabel("seconds", fontsize=7)
    axes.tick_params(labelsize=6)


def seen(axes: Axes, clip: Film, at: int) -> None:
    first = max(at - 10, 0)
    reading = judge(clip.pixels[first : at + 1])
    picture(axes, clip.pixels[at], "what the judge reads")
    for thing in reading.things:
        x, y = thing.x[-1], thing.y[-1]
        if not np.isnan(x):
            words = f"{thing.size}\n{thing.colour}\n{thing.shape}"
            axes.text(x, y, words, color="white", fontsize=5, ha="center", va="center", fontweight="bold")
    axes.text(1, 62, f"{reading.place}, {reading.light}, {reading.camera}", color="black", fontsize=6)


def figure() -> Figure:
    clip = film(14, 64, STREET, [CHANGE])
    drawn = Figure(figsize=(9, 6.4), dpi=130, layout="constrained")
    grid = drawn.add_gridspec(4, 12)
    for k, scene in enumerate(PLACES):
        axes = drawn.add_subplot(grid[0, 2 * k : 2 * k + 2])
        picture(axes, film(30 + k, 10, scene, truth=False).pixels[6], f"{scene.place}, {scene.light}, {scene.weather}")
    for k, at in enumerate((0, 12, 24, 28, 32, 44)):
        picture(drawn.add_subplot(grid[1, 2 * k : 2 * k + 2]), clip.pixels[at], f"frame {at}")
    at = 44
    tracks(drawn.add_subplot(grid[2, 0:3]), clip, at)
    masks(drawn.add_subplot(grid[2, 3:6]), clip, at)
    depth = drawn.add_subplot(grid[2, 6:9])
    depth.imshow(1 / clip.depth[at], cmap="magma", interpolation="nearest")
    depth.set_title("depth (near is bright)", fontsize=8, pad=3)
    depth.axis("off")
    seen(drawn.add_subplot(grid[2, 9:12]), clip, at)
    heard(drawn.add_subplot(grid[3, :]), clip)
    return drawn


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0] if arguments else "docs") / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure().savefig(folder / "world.png", metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1:])
