"""What a comparison looks like: one table for a terminal, the same for a page, and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .compare import BUDGET, ITEMS, OLD, YOUNG
from .kinds import Section
from .result import Result

COLUMNS = ("error", "held, kB", "ms/step", f"step ×{OLD // YOUNG * 2}/×2", "bytes")


def names(result: Result) -> list[str]:
    """The memories that were measured, those that remember most first."""
    every = [key.removesuffix("|recall") for key in result.figures if key.endswith("|recall")]
    return sorted(every, key=lambda name: (-sum(result.figures[f"{name}|recall"]), value(result, name, "error"), name))


def value(result: Result, name: str, key: str) -> float:
    """One figure of one memory."""
    return result.figures[f"{name}|{key}"][0]


def share(x: float) -> str:
    """A recall for people: next to nothing is a dot."""
    return "·" if x < 0.05 else f"{x:.2f}"


def costs(result: Result, name: str) -> tuple[str, ...]:
    """Error, bytes, time and growth of one memory for people, as in `COLUMNS`."""
    return (
        f"{value(result, name, 'error'):.2f}",
        f"{value(result, name, 'nbytes') / 1000:,.0f}",
        f"{value(result, name, 'ms'):.2f}",
        f"{value(result, name, 'slower'):.2f}",
        f"{value(result, name, 'larger'):.2f}",
    )


def cells(result: Result) -> list[tuple[str, ...]]:
    """One row of text a memory."""
    return [
        (name, *(share(x) for x in result.figures[f"{name}|recall"]), *costs(result, name)) for name in names(result)
    ]


HEAD = ("memory", *ITEMS, *COLUMNS)
TOLD = (
    f"Recall of an item by its age in frames (1 is all of it, · less than 0.05): a detail of a picture; the detail of the first "
    f"chunk; one that every frame has looked at since; and a word. Error: of the outputs against full attention, "
    f"relative to its size. Bytes and time on the device, after {OLD} frames; the last two columns over those after "
    f"{YOUNG} frames."
)


def table(result: Result) -> Table:
    """All memories, a row each."""
    shown = Table(
        title=f"All memories on one stream; a token attends at most {BUDGET} frames", title_justify="left",
        caption=f"{TOLD} {result.seconds:.0f} s, {result.machine}.", caption_justify="left", pad_edge=False,
    )  # fmt: skip
    for name in HEAD:
        shown.add_column(name, justify="left" if name == "memory" else "right", no_wrap=name == "memory")
    for row in cells(result):
        shown.add_row(*row)
    return shown


def kind_table(section: Section) -> Table:
    """What is no single list of keys, a row each."""
    shown = Table(
        title=section.title, title_justify="left", caption=section.told, caption_justify="left", pad_edge=False
    )
    for n, name in enumerate(section.head):
        shown.add_column(name, justify="right" if n else "left", no_wrap=not n)
    for row in section.rows:
        shown.add_row(*row)
    return shown


def kind_page(section: Section) -> list[str]:
    """The same for a page."""
    lines = [f"## {section.title}", "", section.told, "", "| " + " | ".join(section.head) + " |"]
    lines += ["|---|" + "---:|" * (len(section.head) - 1)]
    lines += ["| `" + "` | ".join((row[0], " | ".join(row[1:]))) + " |" for row in section.rows]
    return [*lines, ""]


def page(result: Result, figure: Path, command: str, sections: Sequence[Section] = ()) -> str:
    """A page with the table and the figure, then those of other kinds. command: what measured it."""
    lines = [
        "# All memories on one stream", "",
        f"Made by `{command}`: {result.seconds:.0f} s on {result.machine}.", "",
        f"![Recall by age, error, bytes, time and growth of every memory]({figure.name})", "", TOLD, "",
        "| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1),
    ]  # fmt: skip
    lines += ["| `" + "` | ".join((row[0], " | ".join(row[1:]))) + " |" for row in cells(result)]
    lines += ["", "Given to each, and whether bytes are the same and a step at most 1.1 times as long:", ""]
    lines += ["| memory | measured | flat? | |", "|---|---|---|---|"]
    word = {True: "yes", False: "NO", None: "not promised"}
    lines += [f"| `{row.what}` | {row.ours} | {word[row.holds]} | {row.note} |" for row in result.rows]
    return "\n".join([*lines, "", *(line for section in sections for line in kind_page(section))])


def publish(result: Result, folder: Path, command: str, sections: Sequence[Section] = ()) -> Path:
    """Write the page and its figure, compare.md and compare.png, into `folder`; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(result, folder / "compare.png")
    written = folder / "compare.md"
    written.write_text(page(result, folder / "compare.png", command, sections), encoding="utf-8")
    return written


def draw(result: Result, path: Path) -> None:
    """The same as a picture: recall as a map, and bars for error, bytes and time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    every = names(result)
    recalls = [result.figures[f"{name}|recall"] for name in every]
    shown, axes = pyplot.subplots(
        1, 5, figsize=(14, 1.3 + 0.32 * len(every)), layout="constrained", sharey=True,
        gridspec_kw={"width_ratios": [5, 1.6, 1.6, 1.6, 1.6]},
    )  # fmt: skip
    axes[0].imshow(recalls, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes[0].set_xticks(range(len(ITEMS)), [item.replace(", ", "\n") for item in ITEMS])
    axes[0].set_yticks(range(len(every)), every)
    axes[0].set_title("recall of an item, by its age in frames")
    for y, row in enumerate(recalls):
        for x, recall in enumerate(row):
            axes[0].text(x, y, share(recall), ha="center", va="center", fontsize=8, color="w" if recall > 0.55 else "k")
    axes[0].tick_params(length=0)
    axes[0].set_xticks([x - 0.5 for x in range(1, len(ITEMS))], minor=True)
    axes[0].set_yticks([y - 0.5 for y in range(1, len(every))], minor=True)
    axes[0].grid(which="minor", color="w", linewidth=1.5)
    axes[0].tick_params(which="minor", length=0)
    axes[0].spines[:].set_visible(False)
    bars: list[tuple[Any, str, list[float], str, bool]] = [
        (axes[1], "error against\nfull attention", [value(result, name, "error") for name in every], "{:.2f}", False),
        (axes[2], "kB held", [value(result, name, "nbytes") / 1000 for name in every], "{:,.0f}", True),
        (axes[3], "ms a step", [value(result, name, "ms") for name in every], "{:.1f}", True),
        (axes[4], f"time of a step,\n{OLD} over {YOUNG} frames", [value(result, name, "slower") for name in every], "×{:.2f}", False),
    ]  # fmt: skip
    for axis, title, values, text, logarithmic in bars:
        axis.barh(range(len(every)), values, color="#4c78a8", height=0.62)
        axis.set_title(title, fontsize=10)
        if logarithmic:
            axis.set_xscale("log")
            axis.set_xlim(min(values) / 2, max(values) * 6)
        else:
            axis.set_xlim(0, max(values) * 1.35)
        for y, length in enumerate(values):
            axis.text(length, y, " " + text.format(length), va="center", fontsize=8)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="both", which="both", length=0, labelbottom=False)
    shown.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(shown)
