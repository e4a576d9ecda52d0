"""Forcing-KV (arXiv 2605.09681): static heads keep the last frame, dynamic heads also the segments that changed most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, arange, cat, stack
from torch.nn.functional import cosine_similarity

from ...memory import Rope
from .plain import Call, attention, rotated

Heads = Sequence[Sequence[int]]


def places(call: Call, first: int, frame: int) -> Tensor:
    """(t, row, column) of each token of a call whose first frame is number `first`: [m, axes]."""
    time = (first + arange(call.k.shape[1]) // frame)[:, None]
    return cat([time, call.tags["coordinates"]], 1) if "coordinates" in call.tags else time


def is_static(static: Heads, layer: int, head: int) -> bool:
    """Whether a key head needs nothing but sink and recent frames; the first layer is never split."""
    return layer == 0 or (layer < len(static) and head in static[layer])


def scores(keys: Tensor, frame: int, segments: int) -> list[float]:
    """How like the next frame each segment of all frames but the last is: keys [H, frames · frame, D], rotated.

    The cosine of two tokens is that of their keys in all heads, one behind the other.
    """
    joined = keys.transpose(0, 1).flatten(1).reshape(-1, segments, frame // segments, keys.shape[0] * keys.shape[2])
    found = []
    for now, after in pairwise(joined):
        for p in range(segments):
            found.append(float(cosine_similarity(now[p], after[p], dim=-1).mean()))
    return found


def lowest(found: list[float], count: int) -> list[int]:
    """The segments with the lowest scores, in their order in time."""
    return sorted(sorted(range(len(found)), key=lambda n: found[n])[:count])


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, static: Heads = (), sink: int = 1, recent: int = 1,
    static_recent: int = 1, memory: int = 1, segments: int = 6, start: int = 1,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call: attention over what the head's group holds, and the fresh frames."""
    return run(
        layers, rope, frame=frame, static=static, sink=sink, recent=recent, static_recent=static_recent,
        memory=memory, segments=segments, start=start,
    )[0]  # fmt: skip


def run(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, static: Heads, sink: int, recent: int,
    static_recent: int, memory: int, segments: int, start: int,
) -> tuple[list[list[Tensor]], list[list[list[list[int]]]]]:  # fmt: skip
    """Outputs per layer and call; per committed call, layer and head the stream indices held after its clean pass."""
    outputs: list[list[Tensor]] = [[] for _ in layers]
    count = layers[0][0].k.shape[0]
    stream = [[(first.k[h, :0], first.v[h, :0]) for h in range(count)] for first, *_ in layers]  # rotated keys
    held: list[list[list[int]]] = [[[] for _ in range(count)] for _ in layers]
    history, position = [], 0
    for calls in zip(*layers, strict=True):
        m = calls[0].k.shape[1]
        f, c, end = position // frame, position // m, (position + m) // frame
        for layer, call in enumerate(calls):
            here = places(call, f, frame)
            k, q, groups = rotated(call.k, here, rope), rotated(call.q, here, rope), call.q.shape[0] // count
            out = []
            for h in range(call.q.shape[0]):
                old_k, old_v = (x[held[layer][h // groups]] for x in stream[layer][h // groups])
                seen_k, seen_v = cat([old_k, k[h // groups]]), cat([old_v, call.v[h // groups]])
                out.append(attention(q[h : h + 1], seen_k[None], seen_v[None])[0])
            outputs[layer].append(stack(out))
            if call.commit:
                stream[layer] = [(cat([a, k[h]]), cat([b, call.v[h]])) for h, (a, b) in enumerate(stream[layer])]
        if not calls[0].commit:
            continue
        position += m
        first, chosen = end - m // frame - recent, None  # first frame of the chain
        for layer in range(len(layers)):
            dynamic = [h for h in range(count) if not is_static(static, layer, h)]
            if chosen is None and dynamic and c > start and first >= 0:
                chain = stack([stream[layer][h][0][first * frame : (end - recent + 1) * frame] for h in dynamic])
                chosen = lowest(scores(chain, frame, segments), memory * segments)
            for h in range(count):
                split = c >= start and layer > 0
                last = max(recent, static_recent) if not split else recent if h in dynamic else static_recent
                kept = {*range(min(sink, end) * frame), *range(max(end - last, 0) * frame, position)}
                if chosen is not None and h in dynamic:
                    part = frame // segments
                    kept |= {first * frame + n * part + j for n in chosen for j in range(part)}
                held[layer][h] = sorted(kept)
        history.append([[list(indices) for indices in heads] for heads in held])
    return outputs, history
