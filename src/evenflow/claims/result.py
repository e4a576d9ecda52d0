"""What measuring a claim gives, as values, as JSON, as a table."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One checkable statement. paper: what the paper printed, or what it says must hold. ours: what was measured here.

    holds: None for a figure that is reported without a promise. note: conditions, or why it does not hold.
    """

    what: str
    paper: str
    ours: str
    holds: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """A claim as it was measured: `figures` are the raw numbers, for drawing."""

    name: str
    title: str
    rows: tuple[Row, ...]
    seconds: float
    machine: str
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every row that promises something holds."""
        return all(row.holds is not False for row in self.rows)

    def save(self, folder: Path) -> Path:
        """Write it as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "rows": tuple(Row(**row) for row in values["rows"])})


def machine() -> str:
    """What measured it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__.partition('+')[0]}"


def verdict(holds: bool | None) -> str:
    """The word for a row's `holds`."""
    return {True: "yes", False: "NO", None: ""}[holds]


def table(result: Result) -> Table:
    """Paper | ours | holds?"""
    shown = Table(
        title=f"{result.name}: {result.title}",
        caption=f"{result.seconds:.0f} s, {result.machine}",
        title_justify="left",
    )
    for column in ("what", "paper", "ours", "holds?", "note"):
        shown.add_column(column, overflow="fold")
    for row in result.rows:
        shown.add_row(row.what, row.paper, row.ours, verdict(row.holds), row.note)
    return shown


def markdown(result: Result) -> str:
    """The same table for a page."""
    lines = [
        f"## {result.name}: {result.title}",
        "",
        "| what | paper | ours | holds? | note |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r.what} | {r.paper} | {r.ours} | {verdict(r.holds)} | {r.note} |" for r in result.rows]
    return "\n".join([*lines, "", f"Measured in {result.seconds:.0f} s on {result.machine}.", ""])
