"""Draw which stream positions every recipe holds, step by step: python tools/make_gallery.py [FOLDER] [RECIPE ...]

Writes FOLDER/gallery/NAME.png for every recipe (or the named ones) and FOLDER/gallery.md; FOLDER is docs. Every picture
is a real run over the stream of `evenflow claims compare`, with small frames and the parameters of that comparison.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evenflow.claims import compare
from evenflow.claims.streams import Frames, Step
from evenflow.cli.describing import layout
from evenflow.memory import EMPTY, Memory, MemoryState, UntilMass
from evenflow.memory.chunks import ArenaState
from evenflow.memory.chunkstep import ChunkStep
from evenflow.recipes import recipes

sys.path.insert(0, str(Path(__file__).parent))
import gallery_kinds

STREAM = replace(compare.STREAM, frame=8, watched=(4, 10))
FRAMES = 48
LAYER = 1
REGIONS = ("nothing", "sink", "memory", "window", "fresh", "brought back")
COLOURS = ("#f4f4f2", "#e8871e", "#7a5195", "#6baed6", "#08519c", "#2ca25f")
NOTHING, SINK, MEMORY, WINDOW, FRESH, BROUGHT = range(len(REGIONS))

INTRO = """# Gallery: what every memory holds

One picture a recipe, made by `make docs` from real runs. Across: the stream, frame by frame, 8 tokens each. Down: one row
a step, from the first to the last; where heads hold different things, a step has a row for each. Colours: **orange** sinks,
**purple** older tokens that were kept by choice, **light blue** the recent tokens, **dark blue** what the step brought,
**green** what a step, or a question, brings back. Left of the stream, where there is something: memory slots that hold what was
folded from several tokens. Parameters are those of [the comparison](compare.md): a token attends at most 12 frames.
What is no single list of keys (lanes, linked and mixed memories, features, doors) says beside its picture how to read it.
"""


@dataclass(frozen=True)
class Row:
    """What one head held after one step: a region for each stream index, and one for each folded slot."""

    regions: list[int]
    folded: list[int]


def row(held: list[int], memory: Memory, now: int, m: int, length: int, back: Sequence[int] = ()) -> Row:
    """Regions of what `MemoryState.held` says after `now` tokens, of which the last step brought `m`, and `back` others."""
    sinks = memory.sink * (memory.frame or STREAM.frame)
    regions, folded = [NOTHING] * length, []
    recent, run = set(held[sinks:]), now
    while run - 1 in recent:
        run -= 1
    for order, index in enumerate(held):
        if index < 0:
            folded.append(SINK if order < sinks else MEMORY)
        elif index >= now - m:
            regions[index] = FRESH
        elif order < sinks:
            regions[index] = SINK
        else:
            regions[index] = WINDOW if index >= run else MEMORY
    for index in back:
        regions[index] = BROUGHT
    return Row(regions, folded)


def heads(state: MemoryState, stream: Frames) -> list[list[int]]:
    """What every head holds."""
    return [state.held(LAYER, head=head) for head in range(stream.kv_heads)]


def once(rows: list[Row]) -> list[Row]:
    """One row if all heads have the same."""
    return rows[:1] if all(row == rows[0] for row in rows) else rows


def stepped(state: MemoryState, given: Step, commit: bool = True) -> list[list[int]]:
    """Take a step; which tokens it brings back for every head."""
    with state.step(given.m, tags=given.tags, commit=commit) as opened:
        for layer, tensors in enumerate(given.layers):
            state.attend(layer, *tensors)
    found: list[list[int]] = [[] for _ in range(state.geometry.kv_heads)]
    for tokens in opened.shared.get((UntilMass, LAYER), ()) if isinstance(opened, ChunkStep) else ():
        for head, index in zip(tokens.head.tolist(), tokens.index.tolist(), strict=True):
            found[head] += [at for at in index if at != EMPTY]
    return found


def run(name: str, frames: int = FRAMES) -> list[list[Row]]:
    """The rows of every step, one for each head that differs, and of a question where things are brought back."""
    stream = compare.told(STREAM, name)
    memory = compare.memories([name], stream)[name]
    state, frame, length = compare.built(memory, stream).state, stream.frame, frames * stream.frame
    rows = []
    now = size = 0
    for start, size in compare.steps(name):
        if start + size > frames:
            break
        now = (start + size) * frame
        back = stepped(state, stream.step(start, size))
        each = zip(heads(state, stream), back, strict=True)
        rows.append(once([row(held, memory, now, size * frame, length, brought) for held, brought in each]))
    asked = stream.question(now // frame, size, stream.needle("detail", 12))
    found: list[list[int]] = []
    if isinstance(state, ArenaState) and memory.retrieves:
        question = state.question()
        with question.retrieve(asked.m, asked.tags):
            for layer, tensors in enumerate(asked.layers):
                question.attend(layer, *tensors)
        found = heads(question, stream)
    elif isinstance(memory.recall, UntilMass):
        found = stepped(state, asked, commit=False)
    if found:
        rows.append(once([row([], memory, now, 0, length, back) for back in found]))
    return rows


def draw(rows: list[list[Row]], stream: Frames, path: Path) -> None:
    """One picture: the stream across, steps down, folded slots at the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    most = max(len(one.folded) for step in rows for one in step)
    several = max(len(step) for step in rows)
    lines: list[list[int]] = []
    slots: list[list[int]] = []
    ticks: list[tuple[float, str]] = []
    for number, step in enumerate(rows):
        asked = all(FRESH not in one.regions for one in step)
        ticks.append((len(lines) + several / 2 - 0.5, "asked" if asked else f"{number + 1}"))
        for head in range(several):
            one = step[min(head, len(step) - 1)]
            lines.append(one.regions)
            slots.append(one.folded + [NOTHING] * (most - len(one.folded)))
    shown, axes = pyplot.subplots(
        1, 2 if most else 1, figsize=(8.4, 0.9 + 0.13 * max(len(lines), 14)), layout="constrained", squeeze=False,
        gridspec_kw={"width_ratios": [max(0.06, min(0.25, most / len(lines[0]))), 1]} if most else None,
    )  # fmt: skip
    slots_axis, axis = axes[0, 0], axes[0, -1]
    style = {"cmap": ListedColormap(COLOURS), "vmin": -0.5, "vmax": len(COLOURS) - 0.5, "aspect": "auto"}
    if most:
        slots_axis.imshow(slots, extent=(0, most, len(lines) - 0.5, -0.5), interpolation="nearest", **style)
        slots_axis.set_xlabel("folded", fontsize=8)
        slots_axis.set_xticks([])
        axis.set_yticks([])
    width = len(lines[0]) / stream.frame
    axis.imshow(lines, extent=(0, width, len(lines) - 0.5, -0.5), interpolation="nearest", **style)
    axis.set_xlabel("frame of the stream", fontsize=8)
    axis.set_xticks(range(0, int(width) + 1, 6))
    slots_axis.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    slots_axis.set_ylabel("step" if several == 1 else f"step, {several} heads each", fontsize=8)
    for each in axes.flat:
        for line in range(several, len(lines), several):
            each.axhline(line - 0.5, color="w", linewidth=1.2)
        each.tick_params(length=0, labelsize=7)
        each.spines[:].set_visible(False)
    used = sorted({region for step in rows for one in step for region in (*one.regions, *one.folded)} - {NOTHING})
    legend = [Patch(color=COLOURS[region], label=REGIONS[region]) for region in used]
    axis.legend(handles=legend, fontsize=7, frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 0.99))
    shown.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(shown)


def told(name: str, kind: str) -> str:
    """How to read the picture of what is no single list of keys, and what it was made with."""
    return f"{gallery_kinds.LOOK[kind]} With `{gallery_kinds.shown_as(name).spec}`."


def section(name: str) -> str:
    """What the page says of one recipe."""
    (info,) = (info for info in recipes() if info.name == name)
    own = info.kind == "memory"
    kept = layout(compare.memories([name], STREAM)[name]) if own else gallery_kinds.shown_as(name).outline
    return "\n".join(
        [
            f"## {name}", "", info.summary, "", "```", kept, "```", "", *([] if own else [told(name, info.kind), ""]),
            f"![Stream positions held by {name}, step by step](gallery/{name}.png)", "", f"{info.paper}.", "",
        ]
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    root = Path(__file__).resolve().parent.parent
    folder = Path(arguments[0]) if arguments else root / "docs"
    names = arguments[1:] or [info.name for info in recipes()]
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    page = [INTRO]
    kinds = {info.name: info.kind for info in recipes()}
    for name in names:
        path = folder / "gallery" / f"{name}.png"
        if kinds[name] == "memory":
            draw(run(name), STREAM, path)
        else:
            gallery_kinds.DRAW[kinds[name]](name, path)
        page.append(section(name))
    (folder / "gallery.md").write_text("\n".join(page), encoding="utf-8")
    print(f"wrote {folder / 'gallery.md'} and {len(names)} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
