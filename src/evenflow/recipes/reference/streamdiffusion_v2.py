"""StreamDiffusionV2 (arXiv 2511.07399): sink slots and a ring of slots, one cache a denoising step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, cat, tensor

from ...memory import Rope
from .plain import Call, attention, rotated
from .self_forcing import Frame, frames_of


@dataclass
class Cache:
    """slots: (number of the latent, what it brought); pointer: the ring slot that is due; count: latents so far."""

    slots: list[tuple[int, Frame]] = field(default_factory=list)
    pointer: int = 0
    count: int = 0


def position(number: int, t_reset: int, cache: int) -> int:
    """Of a latent: its number, which at t_reset goes back to cache − 1 and counts up again."""
    return number if number < t_reset else (number - t_reset) % (t_reset - cache + 1) + cache - 1


def turned(x: Tensor, at: int, frame: Frame, rope: Rope | None) -> Tensor:
    """x [H, frame, D] of a frame that stands at time `at`."""
    return rotated(x, cat([tensor(at).expand(len(frame.where), 1), frame.where], 1), rope)


def likeness(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """α: mean cosine of keys (rotated) and values, [H, frame, D], each averaged over tokens, heads side by side."""
    means = [[x.mean(1).flatten() for x in pair] for pair in (a, b)]
    return sum(float(x @ y / (x.norm() * y.norm())) for x, y in zip(*means, strict=True)) / 2


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, num_kv_cache: int = 6, sink: int = 3,
    threshold: float = 0.2, t_reset: int | None = 50,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call; calls of one `row` share a cache. t_reset None: positions are places in the order of time, and likeness is of un-rotated keys."""
    outputs = []
    for calls in layers:
        caches: dict[int | None, Cache] = {}
        decided: dict[int | None, list[int]] = {}  # slots of a chunk, from its first pass on
        out = []
        for call in calls:
            old = caches.get(call.row, Cache())
            new = Cache(list(old.slots), old.pointer or sink, old.count)
            fresh = frames_of(call, frame)
            into: list[int] = []
            for latent in fresh:

                def seen(number: int, f: Frame) -> tuple[Tensor, Tensor]:
                    if t_reset is None:
                        return f.k, f.v
                    return turned(f.k, position(number, t_reset, num_kv_cache), f, rope), f.v

                slot = len(new.slots)
                if slot == num_kv_cache:
                    slot = new.pointer
                    alike = [likeness(seen(n, f), seen(new.count, latent)) for n, f in new.slots[:sink]]
                    if call.row in decided:
                        slot = decided[call.row][len(into)]
                    elif threshold > -1 and len(fresh) == 1 and min(alike) < threshold:
                        slot = alike.index(min(alike))
                    if slot >= sink:
                        new.pointer = slot + 1 if slot + 1 < num_kv_cache else sink
                    new.slots[slot] = (new.count, latent)
                else:
                    new.slots.append((new.count, latent))
                into.append(slot)
                new.count += 1
            decided[call.row] = into
            by_age = sorted(n for n, _ in new.slots)
            places = {n: by_age.index(n) if t_reset is None else position(n, t_reset, num_kv_cache) for n in by_age}
            k = cat([turned(f.k, places[n], f, rope) for n, f in new.slots], 1)
            queries = call.q.split(frame, 1)
            q = cat([turned(x, places[old.count + i], fresh[i], rope) for i, x in enumerate(queries)], 1)
            out.append(attention(q, k, cat([f.v for _, f in new.slots], 1)))
            if call.commit:
                caches[call.row] = new
                del decided[call.row]
        outputs.append(out)
    return outputs
