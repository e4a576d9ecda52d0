"""One recipe in full: what it is, how it lays out its memory, its five answers, and what was measured of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from textwrap import indent
from typing import Any

from ..memory import Composition, Fold, Memory, Never, Oldest
from ..memory.layout import VERBS
from ..recipes.registry import INSTEAD, WHAT


def count(number: int, unit: str) -> str:
    """`3 frames`, `1 frame`."""
    return f"{number:,} {unit if number != 1 else unit.removesuffix('s')}"


def regions(memory: Memory) -> list[tuple[str, str]]:
    """Name and size of each region of the layout, in attention order."""
    unit, frame = ("tokens", 1) if memory.frame == 1 else ("frames", memory.frame or 1)
    evict, fold = memory.evict, type(memory.fold)
    slots = memory.fold.slots(frame)
    whole, rest = divmod(slots, frame)
    sink, kept = count(memory.sink, unit) if memory.sink else "0", "0"
    if slots:
        kept = count(slots, "tokens") if rest else count(whole, unit)
    elif fold.store is not Fold.store:
        kept = "off the device"
    elif fold.read is not Fold.read:
        kept = "a state of one size"
    elif fold.leave is not Fold.leave:
        sink += ", which take in what leaves"
    found = [("sink", sink), ("memory", kept)]
    thinned = f", less what {fold.__name__} takes out" if fold.content and not slots else ""
    if memory.window is None:
        everything = memory.on_ring or isinstance(evict, (Never, Oldest))
        held = "everything" if everything else f"what {type(evict).__name__} keeps"
        return [*found, ("held", held + thinned), ("fresh", "")]
    chosen = "" if evict.in_order else f" by {type(evict).__name__}"
    among = memory.recompute or evict.columns(0, 0, 2, 1) == 2  # no slot more for a third token that comes
    size = count(memory.window, unit) + chosen + thinned + ", the fresh ones among them" * among
    return [*found, ("window", size)] + [("fresh", "")] * (not among)


def layout(memory: Memory, width: int | None = None) -> str:
    """The regions as text: `[ sink 3 frames | memory 0 | window 9 frames, the fresh ones among them ]`.

    width: columns there are; where one line would be longer, every region has its own.
    """
    parts = [f"{name} {size}".strip() for name, size in regions(memory)]
    end = " + fresh" if parts[-1] == "fresh" else ""
    parts = parts[:-1] if end else parts
    line = f"[ {' | '.join(parts)} ]{end}"
    return line if width is None or len(line) <= width else "[ " + "\n| ".join(parts) + f" ]{end}"


def answered(made: Composition, verb: str) -> tuple[str, str]:
    """An answer with its parameters, and what it does in a sentence."""
    name, does = made.answered(verb)
    answer = getattr(made, verb, None) if isinstance(made, Memory) else None
    if answer is None:
        return name, does
    fields = [f"{f.name}={_short(getattr(answer, f.name))}" for f in dataclasses.fields(answer)]
    return f"{name}({', '.join(fields)})" if fields else name, does


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def traits(memory: Memory) -> list[str]:
    """What the composition says beside regions and answers, a sentence each."""
    both = "see each other both ways, so no text is read" if memory.inside == "both" else "see those before them"
    said = [f"The fresh tokens of one step {both}."]
    if memory.frame is None:
        said.append("How many tokens a frame has is found in the first step.")
    elif memory.frame > 1:
        said.append(f"A frame has {memory.frame:,} tokens.")
    if memory.chunk > 1:
        said.append(f"A step usually brings {memory.chunk} frames.")
    if memory.rows > 1:
        said.append(f"There are {memory.rows} copies, one for every denoising step.")
    if memory.null == "zero":
        said.append("Every softmax has one more key, which scores 0 and has no value: a query may attend nothing.")
    if memory.null == "learned":
        said.append("Every softmax has one more key without a value, whose score each head of the model brings.")
    if memory.recompute:
        said.append("Nothing is carried over: the model reads the window anew for every token.")
    if memory.retrieves:
        said.append(f"A question also reads what {type(memory.recall).__name__} brings back for it.")
    if memory.inside == "causal" and not memory.cut_free:
        said.append("What leaves is decided once a step, so a text is read one token a step.")
    for verb in VERBS:
        for tag in getattr(memory, verb).needs:
            said.append(f"Every token has to say its {tag} (the tag {tag!r}).")
    return said


def verdicts(names: tuple[str, ...], folder: Path) -> list[tuple[str, str]]:
    """Each claim and what came of it when it was last measured here, then what did not hold, a line each."""
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
        said.append((name, f"{len(promised) - len(broken)} of {len(promised)} promises hold"))
        for row in broken:
            why = f" ({row.note})" if row.note else ""
            said.append(("", f"NOT {row.what}: {row.ours}, where the paper has {row.paper}{why}"))
    return said


def described(memory: Composition, info: Any, about: str, folder: Path, width: int) -> Any:
    """Everything about one recipe, as something that rich prints. about: its docstring. width: of what it is printed on."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    verbs = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("verb", "answer", "what it does"):
        verbs.add_column(column, overflow="fold")
    for verb in VERBS:
        answer, does = answered(memory, verb)
        verbs.add_row(verb, Text(answer), Text(does))
    measured = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for name, verdict in verdicts(info.claims, folder):
        measured.add_row(name, Text(verdict))
    defaults = ", ".join(f"{key}={value!r}" for key, value in info.defaults.items()) or "none"
    drawn = indent(layout(memory, width - 4) if isinstance(memory, Memory) else memory.outline, "    ")
    said = traits(memory) if isinstance(memory, Memory) else [f"This is {WHAT[memory.kind]}: {INSTEAD[memory.kind]}."]
    paragraphs = [" ".join(paragraph.split()) for paragraph in about.split("\n\n")]
    parts: list[Any] = [
        Text(memory.spec, style="bold"), Text(info.paper), "", Text(drawn, style="bold"), "",
        Text(" ".join(said)), "", Text("\n\n".join(paragraphs)), "",
        Text(f"Parameters and defaults: {defaults}"), "", verbs,
    ]  # fmt: skip
    if info.claims:
        parts += ["", Text("Claims, as last measured here:"), measured]
    return Group(*parts)
