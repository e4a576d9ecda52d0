"""Pictures of what is no single list of keys, for the gallery: a real run for each kind of recipe, and how to look at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenflow.memory import Memory
from evenflow.memory.admission import LOW, Curvature, SimilarFrames
from evenflow.recipes import recipe

SINK, MEMORY, WINDOW, FRESH, BROUGHT, NOTHING = "#e8871e", "#7a5195", "#6baed6", "#08519c", "#2ca25f", "#f4f4f2"
FRAMES, TOKENS, DIM = 48, 8, 32


def picture(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, without frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, axes = pyplot.subplots(1, panels, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.tick_params(length=0, labelsize=7)
        axis.spines[:].set_visible(False)
    return shown, axes[0]


def cells(axis: Any, colours: list[list[str]]) -> None:
    """A table of coloured cells with white lines between them, the first row on top."""
    from matplotlib.colors import to_rgb

    axis.imshow([[to_rgb(one) for one in row] for row in colours], aspect="auto", interpolation="nearest")
    axis.set_xticks([x - 0.5 for x in range(1, len(colours[0]))], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, len(colours))], minor=True)
    axis.grid(which="minor", color="w", linewidth=0.8)
    axis.tick_params(which="minor", length=0)


def legend(axis: Any, names: dict[str, str]) -> None:
    """What the colours mean, above the picture."""
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in names.items()]
    axis.legend(handles=patches, fontsize=7, frameon=False, ncols=6, loc="lower right", bbox_to_anchor=(1, 1.0))


# -- doors -----------------------------------------------------------------------------------------------------------

PARTS = {"at rest": 12, "slow drift": 12, "another scene,\na few tokens move": 12, "the same scene,\nsensor noise": 12}


def scenes() -> Tensor:
    """Frames [FRAMES, TOKENS, DIM], as `PARTS` says."""
    made = torch.Generator().manual_seed(0)
    first, goal, other = torch.randn(3, TOKENS, DIM, generator=made)
    frames = [first] * 12
    frames += [torch.lerp(first, goal, (n + 1) / 12) for n in range(12)]
    moving = other.repeat(12, 1, 1)
    moving[:, 2:4] = torch.randn(12, 2, DIM, generator=made)
    noisy = other + 0.1 * torch.randn(12, TOKENS, DIM, generator=made)
    return torch.stack([*frames, *moving, *noisy])


# Guarded against what is known of the published rules: what drifts is let in again, noise is no turn.
GIVEN: dict[str, dict[str, Any]] = {
    "timechat-online": {"threshold": 0.9, "reference": "last_kept"}, "curve-stream": {"eps_noise": 0.1},
    "infinite-vl": {"window": 17, "kernel": 1}, "spatial-ttt": {"window": 17, "chunk": 16},
    "flash-vstream": {"version": 1, "means": 6, "details": 3, "bank": 240}, "omniforcing": {"grid": (1, 2)},
}  # fmt: skip


def shown_as(name: str) -> Any:
    """A recipe with the parameters of its picture."""
    return recipe(name, **GIVEN.get(name, {}))


def admitted(name: str) -> tuple[list[list[str]], list[int]]:
    """Colours of the tokens of every frame, and after which frames the gate speaks."""
    door = shown_as(name)
    frames, way = scenes(), door.build()
    items = frames.mean(1) if isinstance(door.lets, Curvature) else frames
    items = items.flatten(1) if isinstance(door.lets, SimilarFrames) else items
    verdict = way.enter(items)
    keep = verdict.keep.view(len(frames), -1).expand(-1, TOKENS)
    colours = [
        [(MEMORY if int(verdict.resolution[n]) == LOW else WINDOW) if keep[n, t] else NOTHING for n in range(FRAMES)]
        for t in range(TOKENS)
    ]
    if door.speaks is None or door.speaks.asks in ("logits", "tokens"):
        return colours, []
    return colours, way.emit().nonzero()[:, 0].tolist()


def draw_door(name: str, path: Path) -> None:
    shown, (axis,) = picture(8.4, 2.0)
    colours, spoken = admitted(name)
    cells(axis, colours)
    axis.set(xlabel="frame of the stream", ylabel="token", yticks=[], xticks=range(0, FRAMES, 6))
    axis.xaxis.label.set_size(8)
    axis.yaxis.label.set_size(8)
    at = 0
    for part, count in PARTS.items():
        axis.axvline(at - 0.5, color="k", linewidth=0.8)
        axis.text(at, -0.75, part, fontsize=7, va="bottom")
        at += count
    axis.scatter(spoken, [TOKENS - 0.2] * len(spoken), marker="^", color=BROUGHT, s=28, clip_on=False, zorder=3)
    shown.savefig(path, dpi=120, metadata={"Software": None})


# -- lanes -----------------------------------------------------------------------------------------------------------

UNITS, SEEN, SAID = 4, 4, 3


def looks(lanes: Any) -> tuple[list[list[str]], list[int], list[int]]:
    """What every word sees of both lanes, found by values that name their token; and where tokens stand in each lane."""
    width = UNITS * (SEEN + SAID)
    state = lanes.build(layers=1, heads=1, head_dim=width, rope=None)
    rows = []

    def named(first: int, m: int) -> list[Tensor]:
        value = torch.nn.functional.one_hot(torch.arange(first, first + m), width).float()[None, None]
        return [torch.zeros_like(value), torch.zeros_like(value), value]

    for unit in range(UNITS):
        with state.read(SEEN, unit) as step:
            step.attend(0, *named(SEEN * unit, SEEN))
        state.close("source", unit)
        for word in range(SAID):
            number = UNITS * SEEN + SAID * unit + word
            with state.write(1, unit) as step:
                seen = step.attend(0, *named(number, 1))[0, 0, 0] > 0
            rows.append([(WINDOW if n < UNITS * SEEN else MEMORY) if seen[n] else NOTHING for n in range(width)])
            rows[-1][number] = FRESH
        state.close("target", unit)
    places = (state.positions(lane)[:, 0].tolist() for lane in ("source", "target"))
    return rows, *places


def draw_lanes(name: str, path: Path) -> None:
    schemes = ("interleaved", "overlapped", "decoupled", "gap") if name == "speak-while-watching" else (None,)
    shown, axes = picture(3.5 * len(schemes) if len(schemes) > 1 else 5.0, 3.2, len(schemes))
    for axis, scheme in zip(axes, schemes, strict=True):
        rows, seen, said = looks(recipe(name, scheme=scheme) if scheme else recipe(name))
        cells(axis, rows)
        axis.set_xticks(range(len(seen) + len(said)), [str(at) for at in (*seen, *said)], rotation=90, fontsize=6)
        axis.set_yticks(range(len(said)), [str(at) for at in said], fontsize=6)
        for unit in range(1, UNITS):
            axis.axhline(SAID * unit - 0.5, color="k", linewidth=0.6)
            axis.axvline(SEEN * unit - 0.5, color="k", linewidth=0.6)
            axis.axvline(UNITS * SEEN + SAID * unit - 0.5, color="k", linewidth=0.6)
        axis.axvline(UNITS * SEEN - 0.5, color="k", linewidth=1.6)
        axis.set_xlabel("positions of what was seen | of what was said", fontsize=7)
        axis.set_ylabel("positions of words", fontsize=7)
        if scheme:
            axis.set_title(scheme, fontsize=9, loc="left")
    legend(axes[-1], {"seen": WINDOW, "said": MEMORY, "the word": FRESH})
    shown.savefig(path, dpi=120, metadata={"Software": None})


# -- linked, mixed ---------------------------------------------------------------------------------------------------


def blocks(name: str, seconds: int = 16) -> list[list[str]]:
    """Which blocks a linked memory holds after each, in all four memories."""
    state = shown_as(name).build(layers=1, heads=1, head_dim=8, rope=None)
    rows = []
    for now in range(seconds):
        with state.step() as step:
            for read, (asks, gives) in {"video": (0, 0), "audio": (1, 1), "a2v": (0, 1), "v2a": (1, 0)}.items():
                q, k = (torch.zeros(1, 1, step.tokens[side], 8) for side in (asks, gives))
                step.attend(0, read, q, k, k)
        held = state.held(0)
        rows.append(
            [NOTHING if n not in held else SINK if n == 0 else FRESH if n == now else WINDOW for n in range(seconds)]
        )
    return rows


def draw_linked(name: str, path: Path) -> None:
    shown, (axis,) = picture(5.4, 2.8)
    cells(axis, blocks(name))
    axis.set_xlabel("block: video and audio of the same second", fontsize=8)
    axis.set_ylabel("second", fontsize=8)
    legend(axis, {"block 0, and sinks": SINK, "window": WINDOW, "fresh": FRESH})
    shown.savefig(path, dpi=120, metadata={"Software": None})


def layers(name: str, steps: int = 12, step: int = 4) -> tuple[list[list[str]], list[str]]:
    """What layers of each kind hold after every step of so many tokens; the first column is the state. Then their names."""
    mixed = shown_as(name)
    count, heads, dim = len(mixed.pattern), 2, 8
    first = {n: tuple(torch.eye(dim).expand(heads, -1, -1) for _ in range(3)) for n in range(count)}
    state = mixed.build(layers=count, heads=heads, head_dim=dim, first=first)
    different = [n for n, parts in enumerate(mixed.pattern) if parts not in mixed.pattern[:n]]
    rows, made = [], torch.Generator().manual_seed(0)
    for number in range(steps):
        with state.step(step) as taken:
            for layer in range(count):
                q, k, v = torch.randn(3, 1, heads, step, dim, generator=made)
                if layer in state.places:
                    taken.attend(layer, q, k, v)
                if layer in state.rules:
                    share = torch.full((1, heads, step), 0.1)
                    delta = name == "infinite-vl"
                    how = (
                        {"beta": share, "g": -share}
                        if delta
                        else {"rates": share[..., None].expand(-1, -1, -1, 3), "momenta": share}
                    )
                    taken.fold(layer, q, k, v, **how)
        now = (number + 1) * step
        for layer in different:
            held = set(state.held(layer))
            recent = [FRESH if n >= now - step else WINDOW if n in held else NOTHING for n in range(now)]
            rows.append([MEMORY if layer in state.rules else NOTHING, *recent, *[NOTHING] * (steps * step - now)])
    return rows, [" + ".join(map(called, mixed.pattern[n])) for n in different]


def called(part: Any) -> str:
    """What a layer keeps, in a word."""
    if not isinstance(part, Memory):
        return type(part).__name__
    return "everything" if part.window is None else "window"


def draw_mixed(name: str, path: Path) -> None:
    shown, (axis,) = picture(8.4, 3.6)
    rows, names = layers(name)
    cells(axis, rows)
    several = len(names)
    axis.set_yticks(range(len(rows)), [names[n % several] for n in range(len(rows))], fontsize=6)
    axis.set_xticks([0, *range(9, len(rows[0]), 8)], ["state", *(str(n) for n in range(8, len(rows[0]) - 1, 8))])
    for line in range(several, len(rows), several):
        axis.axhline(line - 0.5, color="k", linewidth=0.6)
    axis.set_xlabel("token of the stream; a step brings four", fontsize=8)
    legend(axis, {"state of all so far": MEMORY, "window, or everything": WINDOW, "fresh": FRESH})
    shown.savefig(path, dpi=120, metadata={"Software": None})


# -- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summed:
    """A memory of features after so many frames: times and weights of its means, and frames whose details it reads."""

    now: int
    times: list[float]
    weights: list[float]
    details: list[int]


def summed(name: str, frames: int = 240, lasting: int = 20) -> list[Summed]:
    """A stream of four scenes that come back, looked at six times."""
    made = torch.Generator().manual_seed(0)
    places = torch.randn(4, 4, 4, 16, generator=made)
    state = shown_as(name).build(16)
    found = []
    for n in range(frames):
        scene = places[n // lasting % 4] + 0.1 * torch.randn(4, 4, 16, generator=made)
        state.feed(torch.nn.functional.interpolate(scene.movedim(-1, 0)[None], size=(8, 8)).movedim(1, -1))
        if (n + 1) % (frames // 6) == 0:
            read, summary = state.read(), state.summary
            found.append(Summed(n + 1, summary.time.tolist(), summary.weight.tolist(), read.frames.tolist()))
    return found


def draw_features(name: str, path: Path) -> None:
    shown, (axis,) = picture(8.4, 2.6)
    found, shades = summed(name), ("#dbe9f6", "#e8f2dc", "#fbe6d4", "#eadff0")
    for n in range(12):
        axis.axvspan(20 * n, 20 * (n + 1), color=shades[n % 4], linewidth=0)
    for row, one in enumerate(found):
        axis.scatter(
            one.times, [row] * len(one.times), s=[5 * w for w in one.weights], color=MEMORY, alpha=0.75, linewidth=0
        )
        axis.scatter(one.details, [row] * len(one.details), marker="|", color=FRESH, s=90)
        axis.plot([one.now, one.now], [row - 0.4, row + 0.4], color="k", linewidth=1)
    axis.set_yticks(range(len(found)), [f"after {one.now}" for one in found])
    axis.set(xlim=(0, 242), ylim=(len(found) - 0.3, -0.7))
    axis.set_xlabel("frame of the stream; the background tells which of four scenes is shown", fontsize=8)
    legend(axis, {"a mean, at its time, as large as its weight": MEMORY, "a frame whose details are read": FRESH})
    shown.savefig(path, dpi=120, metadata={"Software": None})


DRAW: dict[str, Callable[[str, Path], None]] = {
    "door": draw_door, "lanes": draw_lanes, "linked": draw_linked, "mixed": draw_mixed, "features": draw_features,
}  # fmt: skip
LOOK = {
    "door": "Across: frames; down: the tokens of each. Blue tokens get in, purple ones in low resolution, grey ones do not; a "
    "green mark stands under frames after which the gate speaks (one that asks the model is not shown).",
    "lanes": "A row a word: what it sees of what was seen (left of the thick line) and of what was said. Numbers are positions.",
    "linked": "A row a second: the blocks that all four memories hold.",
    "mixed": "A row a kind of layer, step by step: the tokens that it holds, and in the first column the state, if it has one.",
    "features": "A row a moment. Scenes come back: their means move and grow, and stay as many.",
}  # fmt: skip
