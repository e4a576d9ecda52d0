"""What a reading looks like: while it goes on, at the end as a table, a figure, and in two sentences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from .reading import Odd, Reading, Track


def amount(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def perplexity(nats: float) -> float:
    """e to the nats; infinite where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def number(value: float) -> str:
    """Three significant figures and no exponent; a dash for what is not known."""
    if math.isnan(value):
        return "–"
    if math.isinf(value) or value >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def line_now(track: Track, before: tuple[int, float, int, float]) -> str:
    """One line about one track: what it does now (since `before`) and what it did so far."""
    tokens, nats, counted, seconds = (
        track.tokens - before[0], track.nats - before[1], track.counted - before[2], track.seconds - before[3]
    )  # fmt: skip
    now = nats / counted if counted else math.nan
    rate = tokens / seconds if seconds > 0 else math.nan
    return (
        f"{track.name}: {track.tokens:,} tokens, {rate:,.0f}/s, {amount(track.stream.nbytes)}, "
        f"now {number(now)} nats/token (perplexity {number(perplexity(now))}), "
        f"so far {number(track.nats_per_token)} ({number(perplexity(track.nats_per_token))})"
    )


def live_table(tracks: list[Track], before: list[tuple[int, float, int, float]]) -> Table:
    """The same for a terminal that can be redrawn."""
    table = Table(box=None, pad_edge=False)
    for name in ("memory", "tokens", "tokens/s", "held", "nats/token now", "perplexity now", "so far"):
        table.add_column(name, justify="left" if name == "memory" else "right")
    for track, (tokens, nats, counted, seconds) in zip(tracks, before, strict=True):
        now = (track.nats - nats) / (track.counted - counted) if track.counted > counted else math.nan
        rate = (track.tokens - tokens) / (track.seconds - seconds) if track.seconds > seconds else math.nan
        table.add_row(
            track.name, f"{track.tokens:,}", f"{rate:,.0f}" if track.stopped is None else "stopped",
            amount(track.stream.nbytes), number(now), number(perplexity(now)),
            number(perplexity(track.nats_per_token)),
        )  # fmt: skip
    return table


def final_table(tracks: list[Track]) -> Table:
    """One row a memory: how well it read, what it held, what a token cost at the beginning and at the end."""
    table = Table(title="Reading side by side" if len(tracks) > 1 else "Reading")
    for name in ("memory", "tokens", "perplexity", "last quarter", "held", "ms/token first", "ms/token last", ""):
        table.add_column(name, justify="left" if name in ("memory", "") else "right", overflow="fold")
    for track in tracks:
        row = summary(track)
        table.add_row(
            track.name, f"{track.tokens:,}", number(row["perplexity"]), number(row["perplexity_last_quarter"]),
            amount(row["bytes"]), number(row["ms_per_token_first"]), number(row["ms_per_token_last"]),
            track.stopped or "",
        )  # fmt: skip
    return table


def summary(track: Track) -> dict[str, Any]:
    """The figures of a finished track, for tables and machines."""
    nats, seconds = track.lately()
    first = next(((b.seconds - a.seconds) / (b.position - a.position) for a, b in track.pieces()), math.nan)
    return {
        "memory": track.name,
        "tokens": track.tokens,
        "nats_per_token": track.nats_per_token,
        "perplexity": perplexity(track.nats_per_token),
        "perplexity_last_quarter": perplexity(nats),
        "bytes": track.stream.nbytes,
        "seconds": track.seconds,
        "ms_per_token_first": 1000 * first,
        "ms_per_token_last": 1000 * seconds,
        "stopped": track.stopped,
    }


def seen(tracks: list[Track]) -> list[str]:
    """Two sentences about what the figures say: cost, then quality."""
    rows = [summary(track) for track in tracks]
    sentences = []
    bounded = [r for t, r in zip(tracks, rows, strict=True) if t.stream.memory.capacity is not None]
    growing = [r for t, r in zip(tracks, rows, strict=True) if t.stream.memory.capacity is None]
    cost = [
        f"{row['memory']} held {amount(row['bytes'])} and a token cost {number(row['ms_per_token_last'])} ms at the end, "
        f"{number(row['ms_per_token_last'] / row['ms_per_token_first'])} times what it cost at first"
        for row in [*bounded[-1:], *growing[:1]]
    ]
    sentences.append("; ".join(cost) + ".")
    points = [{point.position: point for point in track.curve if point.counted} for track in tracks]
    shared = max(set.intersection(*map(set, points)), default=0)
    if len(tracks) > 1 and shared:
        at = {
            track.name: perplexity(known[shared].nats / known[shared].counted)
            for track, known in zip(tracks, points, strict=True)
        }
        order = sorted(at, key=lambda name: at[name])
        worst = f"{order[-1]} worst, at {number(at[order[-1]])}"
        sentences.append(
            f"Over the first {shared:,} tokens, which all of them read, {order[0]} predicted best, at perplexity "
            f"{number(at[order[0]])}, and {worst}."
        )
    else:
        last = number(rows[0]["perplexity_last_quarter"])
        sentences.append(
            f"Perplexity was {number(rows[0]['perplexity'])} overall and {last} over the last quarter of the stream."
        )
    return sentences


def odd_lines(odd: list[Odd], name: str) -> Table:
    """The most surprising lines, most surprising first."""
    table = Table(title=f"Most surprising lines, as {name} read them")
    for column in ("nats/token", "line", "byte", "token", "text"):
        table.add_column(column, justify="left" if column == "text" else "right", overflow="fold")
    for line in sorted(odd, reverse=True):
        text = line.text if len(line.text) <= 200 else line.text[:199] + "…"
        table.add_row(number(line.nats), f"{line.number:,}", f"{line.offset:,}", f"{line.position:,}", _plain(text))
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in text))


def figure(reading: Reading, path: Path) -> None:
    """Perplexity, bytes and time per token over stream position, one curve a memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shown, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    # The widest curve first, so that none hides another that lies on it.
    for place, track in enumerate(reading.tracks):
        pieces = [(a, b) for a, b in track.pieces() if b.counted > a.counted]
        if not pieces:
            continue
        label = f"{track.name}, {track.stopped}" if track.stopped else track.name
        style: dict[str, Any] = {"label": label, "linewidth": 3.2 - 0.9 * min(place, 2), "alpha": 0.9}
        at = [b.position for _, b in pieces]
        axes[0].plot(at, [perplexity((b.nats - a.nats) / (b.counted - a.counted)) for a, b in pieces], **style)
        axes[1].plot(at, [b.nbytes / 1e6 for _, b in pieces], **style)
        axes[2].plot(at, [1000 * (b.seconds - a.seconds) / (b.position - a.position) for a, b in pieces], **style)
    for axis, title in zip(axes, ("perplexity", "megabytes held", "milliseconds per token"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("tokens read")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    shown.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", fontsize=8, frameon=False)
    shown.savefig(path, dpi=130)
    pyplot.close(shown)
