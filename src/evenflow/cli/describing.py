"""One recipe in full: what it is, how it lays out its memory, its five answers, and what was measured of it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from ..memory import Dropped, Memory, Never


def count(number: int, unit: str) -> str:
    """`3 frames`, `1 frame`."""
    return f"{number:,} {unit if number != 1 else unit.removesuffix('s')}"


def regions(memory: Memory) -> list[tuple[str, str]]:
    """Name and size of each region of the layout, in attention order."""
    unit, frame = ("tokens", 1) if memory.frame == 1 else ("frames", memory.frame or 1)
    slots = memory.fold.slots(frame)
    whole, rest = divmod(slots, frame)
    found = [("sink", count(memory.sink, unit) if memory.sink else "0")]
    if slots:
        found.append(("memory", count(slots, "tokens") if rest else count(whole, unit)))
    else:
        found.append(("memory", "0" if type(memory.fold) is Dropped else f"of {type(memory.fold).__name__}"))
    if memory.window is not None:
        with_fresh = getattr(memory.evict, "with_fresh", False)
        found.append(("window", count(memory.window, unit) + (", the fresh ones among them" if with_fresh else "")))
        return found if with_fresh else [*found, ("fresh", "")]
    kept = (
        "everything" if type(memory.evict) is Never or memory.on_ring else f"what {type(memory.evict).__name__} keeps"
    )
    return [*found, ("held", kept), ("fresh", "")]


def layout(memory: Memory) -> str:
    """The regions as one line of text: `[ sink 3 frames | memory 0 | window 9 frames, the fresh ones among them ]`."""
    parts = [f"{name} {size}".strip() for name, size in regions(memory)]
    last = parts.pop() if parts[-1] == "fresh" else None
    return f"[ {' | '.join(parts)} ]" + (" + fresh" if last else "")


def answered(answer: Any) -> tuple[str, str]:
    """An answer with its parameters, and what it does in a sentence."""
    fields = [f"{f.name}={_short(getattr(answer, f.name))}" for f in dataclasses.fields(answer)]
    does = " ".join((inspect.getdoc(answer) or "").partition("\n\n")[0].split())
    return f"{type(answer).__name__}({', '.join(fields)})" if fields else type(answer).__name__, does


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def traits(memory: Memory) -> list[str]:
    """What the composition says beside regions and answers, a sentence each."""
    both = "see each other both ways" if memory.inside == "both" else "see those before them"
    said = [f"The fresh tokens of one step {both}."]
    if memory.frame is None:
        said.append("How many tokens a frame has is found in the first step.")
    elif memory.frame > 1:
        said.append(f"A frame has {memory.frame:,} tokens.")
    if memory.rows > 1:
        said.append(f"There are {memory.rows} copies, one for every denoising step.")
    if memory.null:
        said.append(f"Every softmax has a {memory.null} null key, which may be attended instead of anything.")
    if memory.recompute:
        said.append("Nothing is carried over: the model reads the window anew for every token.")
    return said


def verdicts(names: tuple[str, ...], folder: Path) -> list[tuple[str, str]]:
    """Each claim, and what came of it when it was last measured here."""
    from ..claims.result import Result

    said = []
    for name in names:
        path = folder / f"{name}.json"
        if not path.is_file():
            said.append((name, f"not measured here yet: evenflow claims run {name}"))
            continue
        rows = Result.load(path).rows
        promised = [row for row in rows if row.holds is not None]
        broken = [row for row in promised if not row.holds]
        kept = f"{len(promised) - len(broken)} of {len(promised)} promises hold"
        said.append((name, "; NOT: ".join([kept, *(f"{row.what} ({row.ours})" for row in broken)])))
    return said


def described(memory: Memory, info: Any, about: str, folder: Path) -> Any:
    """Everything about one recipe, as something that rich prints. about: its docstring."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    verbs = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("verb", "answer", "what it does"):
        verbs.add_column(column, overflow="fold")
    for verb in ("admit", "evict", "fold", "recall", "place"):
        answer, does = answered(getattr(memory, verb))
        verbs.add_row(verb, Text(answer), Text(does))
    measured = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for name, verdict in verdicts(info.claims, folder):
        measured.add_row(name, Text(verdict))
    defaults = ", ".join(f"{key}={value!r}" for key, value in info.defaults.items()) or "none"
    paragraphs = [" ".join(paragraph.split()) for paragraph in about.split("\n\n")]
    parts: list[Any] = [
        Text(memory.spec, style="bold"), Text(info.paper), "", Text(f"    {layout(memory)}", style="bold"), "",
        Text(" ".join(traits(memory))), "", Text("\n\n".join(paragraphs)), "",
        Text(f"Parameters and defaults: {defaults}"), "", verbs,
    ]  # fmt: skip
    if info.claims:
        parts += ["", Text("Claims, as last measured here:"), measured]
    return Group(*parts)
