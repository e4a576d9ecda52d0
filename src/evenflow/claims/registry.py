"""The table of claims: found by name, measured, kept, reported."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import cycle
from pathlib import Path

from .result import Result, Row, machine, markdown

FOLDER = Path("runs/claims")


class Bench:
    """What a claim measures with: `full` asks for full length; `say` tells what is going on."""

    def __init__(self, full: bool, say: Callable[[str], None]) -> None:
        self.full, self.say = full, say
        self.rows: list[Row] = []
        self.figures: dict[str, list[float]] = {}

    def row(self, what: str, paper: str, ours: str, holds: bool | None = None, note: str = "") -> None:
        """Put down one measured statement."""
        self.rows.append(Row(what, paper, ours, None if holds is None else bool(holds), note))
        self.say(f"{what}: {ours}")

    def trained(self, step: int, steps: int, loss: float) -> None:
        """Tell how far a training is, five times."""
        if step % max(1, steps // 5) == 0:
            self.say(f"training: step {step:,} of {steps:,}, loss {loss:.3f}")


Claim = Callable[[Bench], None]
_claims: dict[str, Claim] = {}


def claim(name: str) -> Callable[[Claim], Claim]:
    """Enter a function that measures under `name`; the first line of its docstring says what is claimed."""

    def enter(measure: Claim) -> Claim:
        _claims[name] = measure
        return measure

    return enter


def names() -> list[str]:
    """Every claim."""
    return sorted(_claims)


def describe(name: str) -> str:
    """What is claimed, in one line."""
    return (inspect.getdoc(_claims[name]) or "").partition("\n")[0]


def run(
    name: str, *, full: bool = False, progress: Callable[[str], None] | None = None, folder: Path = FOLDER
) -> Result:
    """Measure one claim here and now, and keep the result in `folder`. Raises ValueError for an unknown name."""
    if name not in _claims:
        near = get_close_matches(name, names(), 1, 0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no claim {name!r}{hint}; there are {', '.join(names())}")
    bench = Bench(full, progress or (lambda text: None))
    start = time.perf_counter()
    _claims[name](bench)
    seconds = time.perf_counter() - start
    result = Result(name, describe(name), tuple(bench.rows), seconds, machine(), bench.figures)
    result.save(folder)
    return result


def report(folder: Path = FOLDER) -> Path:
    """One page of all results in `folder`, with a figure; its path. Raises ValueError when nothing was measured yet."""
    results = [Result.load(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    if not results:
        raise ValueError(f"nothing was measured yet: there are no results in {folder}; see `evenflow claims run`")
    page = folder / "report.md"
    text = ["# What was claimed, and what was measured here", ""]
    if figure := _figure(results, folder / "report.png"):
        text += [f"![curves of the measurements]({figure.name})", ""]
    page.write_text("\n".join(text + [markdown(result) for result in results]), encoding="utf-8")
    return page


def _figure(results: Iterable[Result], path: Path) -> Path | None:
    """One panel for each pair of figures `NAME.x`, `NAME.y` (or several `NAME.y.CURVE`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for result in results:
        for key, values in result.figures.items():
            panel, axis, curve = [*key.split("|"), ""][:3]
            if axis == "y":
                panels.setdefault(panel, {})[curve] = (
                    result.figures[f"{panel}|x|{curve}" if curve else f"{panel}|x"],
                    values,
                )
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    shown, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for style, (curve, (x, y)) in zip(cycle(("-", "--", ":")), curves.items(), strict=False):
            axis.plot(x, y, style, marker="o" if len(x) < 20 else None, label=curve or None)
        name, _, below = title.partition(" over ")
        axis.set_title(name)
        axis.set_xlabel(below)
        values = [value for _, y in curves.values() for value in y]
        if max(values) > 3 * min(values) > 0:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.15 * max(values))  # so that flat looks flat
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if any(curves):
            axis.legend(fontsize=8)
    shown.savefig(path, dpi=130)
    pyplot.close(shown)
    return path
