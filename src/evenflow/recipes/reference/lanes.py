"""Two lanes (arXiv 2601.06843, 2603.02872, 2603.11896): what is said of a unit reads what was seen up to that unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...memory import Rope
from .plain import Call, attention, rotated

Place = tuple[int, ...]
Unit = Sequence[Sequence[int] | None]  # coordinates of each token seen; None: a word


def places(
    source: Sequence[Unit], target: Sequence[int], *, scheme: str = "decoupled", gap: int = 10_000, axes: int = 1,
    whole: bool = False,
) -> tuple[list[list[Place]], list[list[Place]]]:  # fmt: skip
    """Position on every axis of each token, unit by unit, of both lanes; target: tokens of each unit.

    scheme: "interleaved", "overlapped" (OSPE), "decoupled" (GDPE) or "gap" (GIPE). whole: pictures that follow one another
    count from one base through all units.
    """
    base: int | None = None

    def watched(unit: Unit, first: int) -> tuple[list[Place], int]:
        """Where the tokens of a unit stand that begins at `first`, and the largest number that is used then."""
        nonlocal base
        top, out = first - 1, []
        base = base if whole else None
        for where in unit:
            if where is None:
                base, top = None, top + 1
                out.append((top,) * axes)
            else:
                base = top + 1 if base is None else base
                out.append(tuple(base + x for x in where))
                top = max(top, *out[-1])
        return out, top

    def spoken(count: int, first: int) -> list[Place]:
        return [(first + n,) * axes for n in range(count)]

    seen, said = [], []
    if scheme == "interleaved":
        end = -1
        for i, unit in enumerate(source):
            out, end = watched(unit, end + 1)
            seen.append(out)
            said.append(spoken(target[i], end + 1))
            end += target[i]
    elif scheme == "overlapped":
        out, end = watched(source[0], 0)
        seen.append(out)
        for i in range(len(source)):
            said.append(spoken(target[i], end + 1))
            text_end = video_end = end + target[i]
            if i + 1 < len(source):
                out, video_end = watched(source[i + 1], end + 1)
                seen.append(out)
            end = max(text_end, video_end)
    else:
        video, text = -1, gap if scheme == "gap" else -1
        for i, unit in enumerate(source):
            out, video = watched(unit, video + 1)
            seen.append(out)
            said.append(spoken(target[i], text + 1))
            text += target[i]
    return seen, said


def reference(
    source: list[list[Call]], target: list[list[Call]], rope: Rope | None, *, scheme: str = "decoupled",
    gap: int = 10_000, coordinates: Sequence[Unit] | None = None, whole: bool = False, held: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """What each layer reads, [H_q, n, D_v] of the source lane and of the target lane; a call a unit in each layer.

    held: so many tokens at the end of each unit that is said see what is seen of the next unit too.
    """
    seen_out, said_out = [], []
    for seen, said in zip(source, target, strict=True):
        units = coordinates or [[None] * unit.q.shape[1] for unit in seen]
        axes = 1 + (0 if rope is None else rope.coordinates)
        counts = [unit.q.shape[1] for unit in said]
        where = places(units, counts, scheme=scheme, gap=gap, axes=axes, whole=whole)
        lanes = []
        for calls, at in zip((seen, said), where, strict=True):
            spots = [place for unit in at for place in unit]
            q, k, v = (torch.cat([getattr(call, name) for call in calls], 1) for name in "qkv")
            lanes.append((rotated(q, spots, rope), rotated(k, spots, rope), v))
        (q, k, v), (asking, own_k, own_v) = lanes
        rows = [attention(q[:, n : n + 1], k[:, : n + 1], v[:, : n + 1]) for n in range(q.shape[1])]
        seen_out.append(torch.cat([q[:, :0], *rows], 1))
        rows, n = [], 0
        for u, count in enumerate(counts):
            for j in range(count):
                sees = u + 1 if j >= count - held and u + 1 < len(seen) else u
                stop = sum(unit.q.shape[1] for unit in seen[: sees + 1])
                keys, values = (torch.cat(pair, 1) for pair in (
                    (k[:, :stop], own_k[:, : n + 1]), (v[:, :stop], own_v[:, : n + 1])))  # fmt: skip
                rows.append(attention(asking[:, n : n + 1], keys, values))
                n += 1
        said_out.append(torch.cat([asking[:, :0], *rows], 1))
    return seen_out, said_out
