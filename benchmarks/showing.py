"""Results as tables for the terminal and as one figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .decode import BYTES, OURS, PRODUCT
from .recipes import FLOOR, PARTS, RING

BOOKKEEPING = 0.15  # at most


def tables(name: str, result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one benchmark."""
    if name == "recipes":
        yield from (recipes_table(f"{result['title']}: {case}", rows) for case, rows in result["cases"].items())
        return
    if name == "video":
        yield from (video_table(result, memory) for memory in result["memories"])
        return
    shown = Table(title=result["title"], title_justify="left")
    if name == "beyond":
        for column in ("", "paper", "ours", "ms"):
            shown.add_column(column, justify="left" if not column else "right")
        for row in result["rows"]:
            times = ", ".join(f"{what} {ms:.3g}" for what, ms in row["milliseconds"].items())
            shown.add_row(row["what"], row["paper"], f"×{row['ratio']:.2f}", times)
        shown.caption = f"{result['device']}, {result['dtype']}"
    elif name == "decode":
        for column in ("", "ms", "ours in units of it", "wanted"):
            shown.add_column(column, justify="left" if not column else "right")
        ratios = result["ours in units of"]
        for what, milliseconds in result["milliseconds"].items():
            wanted = f"≤ {result['wanted'][what]:.3g}" if what in result["wanted"] else ""
            shown.add_row(what, f"{milliseconds:.2f}", f"{ratios[what]:.3g}" if what in ratios else "", wanted)
        sizes = ", ".join(f"{part} {size / 1e6:.0f} MB" for part, size in result["bytes"].items())
        shown.caption = f"{sizes}; {result['gigabytes a second']:.1f} GB/s, {result['gigaflops']:.0f} GFLOP/s"
    elif name == "bookkeeping":
        shown.add_column("")
        shown.add_column("ms", justify="right")
        for what, milliseconds in result["milliseconds"].items():
            shown.add_row(what, f"{milliseconds:.3f}")
        shown.add_row(
            "share of bookkeeping", f"{100 * result['share of bookkeeping']:.1f} % (≤ {100 * BOOKKEEPING:g} %)"
        )
    elif name == "feed":
        shown.add_column("tokens a feed", justify="right")
        shown.add_column("tokens a second", justify="right")
        for size, rate in result["tokens a second by tokens a feed"].items():
            shown.add_row(size, f"{rate:,.0f}")
    elif name == "store":
        for column in ("", "GB/s", "µs a block"):
            shown.add_column(column, justify="left" if not column else "right")
        for what, rate in result["gigabytes a second"].items():
            shown.add_row(what, f"{rate:.2f}", f"{result['microseconds a block'][what]:,.0f}")
    elif name == "growth":
        shown.add_column("position", justify="right")
        for memory in result["bytes"]:
            shown.add_column(f"{memory}, ms", justify="right")
            shown.add_column("kB", justify="right")
        for row, place in enumerate(result["position"]):
            cells = ((result["milliseconds"][m][row], result["bytes"][m][row] / 1e3) for m in result["bytes"])
            shown.add_row(f"{place:,}", *(cell for ms, kb in cells for cell in (f"{ms:.2f}", f"{kb:,.0f}")))
    yield shown


def video_table(result: dict[str, Any], memory: str) -> Table:
    """One memory under a video model: what its parts take, beside their floors."""
    row = result["memories"][memory]
    shown = Table(title=f"{result['title']}: {memory}", title_justify="left", caption_justify="left")
    for column in ("", "ms", "floor", "÷ floor", "frames/s"):
        shown.add_column(column, justify="left" if not column else "right")
    for what, took in row["milliseconds"].items():
        floor, rate = row["floor, milliseconds"][what], row["frames a second"].get(what)
        shown.add_row(what, f"{took:.2f}", f"{floor:.2f}", f"{took / floor:.2f}", "" if rate is None else f"{rate:.1f}")
    shown.caption = (
        f"{result['device']}, {result['dtype']}; {result['parameters'] / 1e6:,.1f} M parameters; a token attends "
        f"{row['keys a token attends']:,.0f}; memory {row['bytes of the memory'] / 1e6:,.0f} MB. Floor: at "
        f"{result['teraflops']:.3g} TFLOP/s and {result['gigabytes a second']:.0f} GB/s, as measured here, "
        f"{row['frames a second at the floor']:.1f} frames/s"
    )
    return shown


def recipes_table(title: str, rows: dict[str, Any]) -> Table:
    """Every recipe in one case, a row each."""
    shown = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE, padding=0, pad_edge=False)
    for column in ("", "tokens", "ms", "÷ ring", "÷ att.", "MB"):
        shown.add_column(f" {column}".rstrip(), justify="left" if not column else "right", no_wrap=True)
    shown.add_column("  most of the time", no_wrap=True)
    for name, row in rows.items():
        times = (f" {row['times'][what]:.3g}" for what in (RING, FLOOR))
        most = sorted(row["parts"], key=lambda part: -row["parts"][part])[:2]
        shown.add_row(
            name, f" {row['attended']}", f" {row['milliseconds']['recipe']:.3g}", *times,
            f" {row['allocated'] / 1e6:.1f}", "  " + ", ".join(f"{part} {100 * row['parts'][part]:.0f}%" for part in most),
        )  # fmt: skip
    alone = max(row["allocated by attention"] for row in rows.values()) / 1e6
    shown.caption = (
        f"÷: in units of the {RING} and of {FLOOR}, over as many tokens. MB: what a step asks of the allocator; {FLOOR} "
        f"asks for {alone:.1f}. Time goes into {', '.join(PARTS)}."
    )
    return shown


def figure(results: dict[str, Any], path: Path) -> None:
    """One panel for each benchmark that was run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = ("decode", "bookkeeping", "feed", "growth", "store", "recipes", "video", "beyond")
    names = [name for name in known if name in results]
    height = 5.6 if "recipes" in results else 3.8
    shown, axes = pyplot.subplots(
        1, len(names), figsize=(5.2 * len(names), height), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        result = results[name]
        axis.set_title(result["title"], fontsize=10)
        if name in ("decode", "bookkeeping"):
            bars = {k: v for k, v in result["milliseconds"].items() if k not in (BYTES, PRODUCT)}
            ordered = sorted(bars, key=lambda k: -bars[k])
            colours = ["tab:blue" if k == OURS else "lightgrey" for k in ordered]
            drawn = axis.barh(ordered, [bars[k] for k in ordered], color=colours)
            axis.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
            axis.set_xlabel("milliseconds a token")
            if max(bars.values()) > 20 * min(bars.values()):
                axis.set_xscale("log")
        elif name == "feed":
            rates = result["tokens a second by tokens a feed"]
            axis.plot([int(size) for size in rates], list(rates.values()), marker="o")
            axis.set(xscale="log", yscale="log", xlabel="tokens a feed", ylabel="tokens a second")
        elif name == "recipes":
            case, rows = max(result["cases"].items(), key=lambda case: len(case[1]))
            axis.set_title(f"{result['title']}\n{case}", fontsize=10)
            ordered = sorted(rows, key=lambda one: -rows[one]["times"][FLOOR])
            left = [0.0] * len(ordered)
            for part in PARTS:
                widths = [rows[one]["times"][FLOOR] * rows[one]["parts"][part] for one in ordered]
                axis.barh(ordered, widths, left=left, label=part, color="lightgrey" if part == "attention" else None)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axis.axvline(1, color="k", linewidth=0.8)
            axis.set_xlabel(f"times {FLOOR}")
            axis.legend(fontsize=8, frameon=False)
        elif name == "video":
            axis.set_title(f"{result['title']}\n{result['device']}", fontsize=8)
            for memory, row in result["memories"].items():
                times = {what: took / row["floor, milliseconds"][what] for what, took in row["milliseconds"].items()}
                axis.plot(list(times.values()), list(times), marker="o", label=memory)
            axis.axvline(1, color="k", linewidth=0.8)
            axis.set_xlabel("times the floor")
            axis.legend(fontsize=8, frameon=False)
        elif name == "beyond":
            axis.set_title(f"{result['title']}\n{result['device']}", fontsize=8)
            rows = result["rows"][::-1]
            drawn = axis.barh([row["what"].replace(", ", ",\n", 1) for row in rows], [row["ratio"] for row in rows])
            axis.bar_label(drawn, fmt="×%.3g", fontsize=8, padding=2)
            axis.axvline(1, color="k", linewidth=0.8)
        elif name == "store":
            rates = result["gigabytes a second"]
            colours = ["lightgrey" if "floor" in what else "tab:blue" for what in rates]
            drawn = axis.barh(list(rates)[::-1], list(rates.values())[::-1], color=colours[::-1])
            axis.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
            axis.set(xscale="log", xlabel="gigabytes a second")
        else:
            for memory, values in result["milliseconds"].items():
                axis.plot(result["position"], values, marker="o", label=memory)
            axis.set(xscale="log", yscale="log", xlabel="stream position", ylabel="milliseconds a token")
            axis.legend(fontsize=8, frameon=False)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    shown.savefig(path, dpi=130)
    pyplot.close(shown)
