"""What memories of frames promise over a plain window of the same size: InfiniteVGGT, DVGT-2, StreamingVLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory import Absolute, Memory, MemoryState, Oldest, Rope, Timeless
from ..models import open_stream
from ..recipes import recipe
from ..recipes.reference import Call, dvgt2
from .quality import ratio_of
from .registry import Bench, claim
from .texts import book_text, perplexity, recomputed_nats, tokens_of

HEADS, DIM = 2, 16
Tokens = tuple[Tensor, Tensor, Tensor]


def fed(
    state: MemoryState, layers: Sequence[Tokens], tags: dict[str, Tensor] | None = None, commit: bool = True
) -> list[Tensor]:
    """One step: q, k, v [H, m, D] of each layer; what attention gives, [H, m, D] each."""
    with state.step(layers[0][0].shape[1], tags=tags, commit=commit):
        return [
            state.attend(n, *(x[None].to(state.geometry.dtype) for x in layer))[0] for n, layer in enumerate(layers)
        ]


def drawn(made: torch.Generator, *size: int) -> Tensor:
    """Random numbers, float64."""
    return torch.randn(*size, generator=made, dtype=torch.float64)


def triple(made: torch.Generator, m: int) -> Tokens:
    """Random q, k, v of m tokens."""
    return drawn(made, HEADS, m, DIM), drawn(made, HEADS, m, DIM), drawn(made, HEADS, m, DIM)


# -- InfiniteVGGT --------------------------------------------------------------------------------------------------


@claim("infinite-vggt")
def infinite_vggt(bench: Bench) -> None:
    """Key diversity keeps every unusual token of a long stream, and gives layers that see nothing new less room."""
    frames, frame = (2000, 20) if bench.full else (400, 20)
    for room in (1, 2):
        unusual(bench, frames, frame, room)
    budgets(bench, frames // 4, frame)


def unusual(bench: Bench, frames: int, frame: int, room: int) -> None:
    """A stream of near-equal keys with an unusual one a frame: who still has it, and can it be read?

    Both memories hold the first frame and, of all later tokens, `room` a frame that was read.
    """
    made = torch.Generator().manual_seed(0)
    common = drawn(made, HEADS, 1, DIM)
    directions = torch.nn.functional.normalize(drawn(made, HEADS, frames, DIM), dim=-1)
    values, places = drawn(made, HEADS, frames, DIM), torch.randint(frame, (frames,), generator=made)
    ours = recipe("infinite-vggt", total_budget=frame + room * frames, frame=frame)
    plain = Memory(sink=1, window=room * frames // frame, frame=frame, inside="both", evict=Oldest(), place=Timeless())
    states = {
        name: memory.build(layers=1, heads=HEADS, head_dim=DIM, rope=None, dtype=torch.float64)
        for name, memory in {"infinite-vggt": ours, "first and last frames": plain}.items()
    }
    for t in range(frames):
        k = common + 0.1 * drawn(made, HEADS, frame, DIM)
        v = torch.zeros_like(k)
        if t:
            k[:, places[t]] = 4 * directions[:, t]
            v[:, places[t]] = values[:, t]
        for state in states.values():
            fed(state, [(k, k, v)])
    planted = {t * frame + int(places[t]) for t in range(1, frames)}
    asked = range(1, frames, max(1, frames // 50))
    where = "room for all unusual tokens" if room == 1 else f"{room} times that room"
    for name, state in states.items():
        bench.say(f"asking {name}, {where}")
        held = [len(planted & set(state.held(0, head=head))) for head in range(HEADS)]
        right = 0
        for t in asked:  # sharply for one of them, whatever its age, while a usual frame is being read
            q = 60 * directions[:, t : t + 1].expand(-1, frame, -1)
            k = common + 0.1 * drawn(made, HEADS, frame, DIM)
            out = fed(state, [(q, k, torch.zeros_like(k))], commit=False)[0][:, 0]
            right += bool((torch.nn.functional.cosine_similarity(out, values[:, t], dim=-1) > 0.9).all())
        share, ours_ = sum(held) / (HEADS * len(planted)), name == "infinite-vggt"
        bench.row(
            f"unusual tokens held in {where}, {name}", "all" if ours_ else f"about {5 * room} %", f"{share:.1%}",
            share == 1 if ours_ and room > 1 else None,
            f"{len(planted):,} of {frames * frame:,} tokens; it holds {len(state.held(0)):,}",
        )  # fmt: skip
        bench.row(
            f"questions about one of them answered in {where}, {name}", "–", f"{right} of {len(asked)}",
            right >= 0.95 * len(asked) if ours_ and room > 1 else None,
        )  # fmt: skip


def budgets(bench: Bench, frames: int, frame: int) -> None:
    """Two layers share a budget: one sees the same again and again, the other something new each time."""
    made = torch.Generator().manual_seed(1)
    total, same = 16 * frame, triple(made, frame)
    base = triple(made, 1)
    curves: dict[str, list[float]] = {"same frame": [], "near-equal keys": []}
    for name, shares in curves.items():
        state = recipe("infinite-vggt", total_budget=total, frame=frame).build(
            layers=2, heads=HEADS, head_dim=DIM, rope=None, dtype=torch.float64
        )
        most = 0
        for _ in range(frames):
            noise = triple(made, frame)
            alike = (base[0] + 0.2 * noise[0], base[1] + 0.2 * noise[1], noise[2])
            fed(state, [same if name == "same frame" else alike, triple(made, frame)])
            sizes = [len(state.held(layer)) for layer in range(2)]
            most = max(most, sum(sizes))
            shares.append(sizes[0] / sum(sizes))
        bench.row(
            f"share of a layer that sees {'the same frame' if name == 'same frame' else name} again and again",
            "less than the other's", f"{shares[-1]:.1%}", shares[-1] < 0.5,
            f"{shares[0]:.0%} after the first frame; both together hold {most} of {total} at most",
        )  # fmt: skip
        bench.figures[f"share of a layer that sees nothing new over frames|x|{name}"] = [
            float(n) for n in range(frames)
        ]
        bench.figures[f"share of a layer that sees nothing new over frames|y|{name}"] = shares


# -- DVGT-2 --------------------------------------------------------------------------------------------------------

PAIRS = DIM // 2
TIME_ROWS_COLUMNS = Rope(inv_freq=tuple(1000 ** (-j / PAIRS) for j in range(PAIRS)), axes=(0, 1, 2, 0, 1, 2, 0, 0))


@claim("dvgt2")
def dvgt2_(bench: Bench) -> None:
    """A window of frames is one forward under a banded mask, at any age of the stream, and remembers more than its length."""
    banded(bench, *((400, 16) if bench.full else (60, 8)))


def banded(bench: Bench, frames: int, frame: int) -> None:
    """Streams of `frames` random frames of `frame` tokens, window 4."""
    made = torch.Generator().manual_seed(0)
    tags = {"coordinates": torch.stack([torch.arange(frame) // 4, torch.arange(frame) % 4], 1)}
    calls = [Call(*triple(made, frame), tags=tags) for _ in range(frames)]

    def built(window: int, dtype: torch.dtype = torch.float64) -> MemoryState:
        memory = recipe("dvgt2", window=window, frame=frame)
        return memory.build(layers=1, heads=HEADS, head_dim=DIM, rope=TIME_ROWS_COLUMNS, dtype=dtype)

    def read(state: MemoryState, some: list[Call]) -> Tensor:
        return torch.stack([fed(state, [(c.q, c.k, c.v)], c.tags)[0].double() for c in some])

    for window in (1, 2, 4):
        state = built(window)
        mask = torch.stack(dvgt2.banded([calls], TIME_ROWS_COLUMNS, frame=frame, window=window)[0])
        error = float((read(state, calls) - mask).abs().max())
        bench.row(
            f"window {window}: streamed = banded mask", "≤ 2e-6", f"{error:.0e}", error <= 1e-10, f"{frames} frames"
        )
        held = len(state.held(0)) // frame
        bench.row(f"window {window}: frames held", str(window), str(held), held == window,
                  "the official code keeps all" if window == 1 else "")  # fmt: skip

    first, rest = calls[:6], calls[6:16]
    for age in (10**3, 10**5, 10**7):
        young = built(4, torch.float32)
        read(young, first)
        old = young.fork()
        old.seek((age + len(first)) * frame)
        error = float((read(old, rest) - read(young, rest)).abs().max())
        naive = _in_float32(calls[:16], age) - _in_float32(calls[:16], 0)
        printed = {10**3: "3e-6", 10**5: "3e-4", 10**7: "2e-2"}[age]
        bench.row(
            f"{age:,} frames old, against a young stream", "≤ 1e-5", f"{error:.0e}", error <= 1e-5,
            f"with fp32 angles {float(naive.abs().max()):.0e} (paper's code: {printed})",
        )  # fmt: skip
    _indirect(bench, frame)


def _in_float32(calls: list[Call], start: int, window: int = 4) -> Tensor:
    """The same attention with angles multiplied in float32, as the official code does, from frame `start` on."""
    frequencies = torch.tensor(TIME_ROWS_COLUMNS.inv_freq, dtype=torch.float32)
    axes = torch.tensor(TIME_ROWS_COLUMNS.axes)

    def turned(x: Tensor, t: int, places: Tensor) -> Tensor:
        positions = torch.nn.functional.pad(places, (1, 0), value=start + t).float()
        angle = positions[:, axes] * frequencies
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    out = []
    for t, call in enumerate(calls):
        seen = range(max(t + 1 - window, 0), t + 1)
        k = torch.cat([turned(calls[s].k, s, calls[s].tags["coordinates"]) for s in seen], 1)
        v = torch.cat([calls[s].v.float() for s in seen], 1)
        scores = turned(call.q, t, call.tags["coordinates"]) @ k.transpose(-1, -2) * DIM**-0.5
        out.append(torch.softmax(scores, -1) @ v)
    return torch.stack(out).double()


def _indirect(bench: Bench, frame: int, window: int = 4, depth: int = 4) -> None:
    """How far a change of one frame reaches through layers that read what the layer before made of theirs."""
    made = torch.Generator().manual_seed(2)
    width = HEADS * DIM
    weights = [[drawn(made, width, width) / width**0.5 for _ in "qkv"] for _ in range(depth)]
    items = drawn(made, window * depth, frame, width)
    changed = items.clone()
    changed[0] += 1.0

    def run(frames: Tensor) -> Tensor:
        state = recipe("dvgt2", window=window, frame=frame).build(
            layers=depth, heads=HEADS, head_dim=DIM, rope=Rope(), dtype=torch.float64
        )
        out = []
        for x in frames:
            with state.step(frame):
                for layer, projections in enumerate(weights):
                    q, k, v = ((x @ p).unflatten(-1, (HEADS, DIM)).transpose(0, 1)[None] for p in projections)
                    x = x + state.attend(layer, q, k, v)[0].transpose(0, 1).flatten(1)
            out.append(x)
        return torch.stack(out)

    reach = (run(items) - run(changed)).abs().amax((1, 2))
    last = depth * (window - 1)
    bench.row(
        f"frame {last} feels frame 0, window {window}, {depth} layers", "survives indirectly", f"{float(reach[last]):.0e}",
        bool(reach[last] > 1e-9) and bool((reach[last + 1 :] < 1e-12).all()),
        "re-reading the last 4 frames feels nothing beyond frame 3; beyond this frame nothing is felt here either",
    )  # fmt: skip
    bench.figures |= {
        "what a change of frame 0 moves over frames|x": [float(n) for n in range(last + 1)],
        "what a change of frame 0 moves over frames|y": reach[: last + 1].tolist(),
    }


# -- StreamingVLM --------------------------------------------------------------------------------------------------


@claim("streaming-vlm")
def streaming_vlm(bench: Bench) -> None:
    """Words outlive pictures in the same room, and positions without gaps keep a model where it was trained."""
    conversation(bench, *((2000, 64) if bench.full else (300, 64)))
    far(bench, *((40, 256, 1000) if bench.full else (20, 256, 300)))


def conversation(bench: Bench, rounds: int, picture: int) -> None:
    """Rounds of a picture and an answer of 8 words: whose words are still held, and can they be read?"""
    made, words = torch.Generator().manual_seed(0), 8
    side = int(picture**0.5)
    grid = torch.stack([torch.arange(picture) // side, torch.arange(picture) % side], 1)
    ours = recipe("streaming-vlm", window=4, text_round=4, text_sink=64, text_window=512)
    room = 64 + 512 + 4 * (picture + words)
    rope = Rope(inv_freq=tuple(1e-4 for _ in range(PAIRS)), axes=(0, 0, 0, 1, 1, 1, 2, 2))
    states = {
        name: memory.build(layers=1, heads=HEADS, head_dim=DIM, rope=rope, dtype=torch.float64)
        for name, memory in {"streaming-vlm": ours, "window": recipe("window", window=room)}.items()
    }
    said = torch.nn.functional.normalize(drawn(made, rounds * words, HEADS, DIM), dim=-1).movedim(0, 1)
    values = drawn(made, HEADS, rounds * words, DIM)
    index: list[int] = []

    def seen(modality: int, number: int, places: Tensor) -> dict[str, Tensor]:
        every = torch.ones(len(places), dtype=torch.int64)
        return {"modality": modality * every, "segment": (number + 1) * every, "coordinates": places}

    for r in range(rounds):
        look = 0.3 * drawn(made, HEADS, picture, DIM)
        part = slice(r * words, (r + 1) * words)
        speak = (said[:, part], 4 * said[:, part], values[:, part])
        index += range(r * (picture + words) + picture, (r + 1) * (picture + words))
        for state in states.values():
            fed(state, [(look, look, look)], seen(1, r, grid))
            fed(state, [speak], seen(0, r, grid[:1].expand(words, -1)))
    kept: dict[str, int] = {}
    for name, state in states.items():
        held = set(state.held(0))
        kept[name] = sum(i in held for i in index)
        bench.row(
            f"words still held, {name}", "512 + 512 and 16 rounds", f"{kept[name]:,} of {len(index):,}",
            kept[name] == 64 + 512 + 4 * words if name == "streaming-vlm" else None,
            f"it holds {len(held):,} tokens, {room:,} at most",
        )  # fmt: skip
    answered: dict[str, int] = {}
    ages = [rounds * words - 1 - n for n in range(0, 500, 20)]
    for name, state in states.items():
        answered[name] = 0
        for n in ages:
            q = 60 * said[:, n : n + 1]
            out = fed(state, [(q, 0 * q, 0 * q)], seen(0, rounds - 1, grid[:1]), commit=False)[0]
            answered[name] += bool(
                (torch.nn.functional.cosine_similarity(out, values[:, n : n + 1], dim=-1) > 0.9).all()
            )
        bench.row(
            f"questions about one of the last 500 words answered, {name}", "–", f"{answered[name]} of {len(ages)}",
            answered[name] == len(ages) if name == "streaming-vlm" else None,
        )  # fmt: skip


def far(bench: Bench, times: int, room: int, count: int, piece: int = 16) -> None:
    """The shipped model reads `times` its training length over `room` tokens, at two kinds of positions."""
    tiny = open_stream("tiny", recipe("full"))
    trained = int(tiny.model.config.max_position_embeddings)
    text, kind = book_text()
    ids = torch.tensor(tokens_of(tiny, text, times * trained))
    ours = recipe("streaming-vlm", text_sink=room // 2, text_window=room // 2)
    nats = {}
    for name, memory in {"contiguous": ours, "native": Memory(evict=ours.evict, place=Absolute())}.items():
        bench.say(f"reading {len(ids):,} tokens at {name} positions")
        stream = open_stream(tiny.model, memory, tokenizer=tiny.tokenizer)
        nats[name] = torch.cat([stream.surprisal(part)[0] for part in ids.split(piece)])
    places = torch.linspace(len(ids) // 2, len(ids) - 1, count).long().unique()
    again = recomputed_nats(tiny, ids.tolist(), places.tolist(), room // 2, room // 2)
    ratio, error = ratio_of(nats["contiguous"][places], again)
    bench.row(
        f"contiguous positions over the same words read afresh, {times // 2} to {times} times the training length",
        "about 1", f"×{ratio:.3f} ± {error:.3f}", ratio <= 1.05, f"first and last {room // 2} tokens of {kind}",
    )  # fmt: skip
    inside = slice(room + piece, trained)  # evicting already, at positions that the model knows both ways
    end = slice(len(ids) // 2, None)
    base, late = ({name: perplexity(n[part]) for name, n in nats.items()} for part in (inside, end))
    ratio = late["native"] / late["contiguous"]
    bench.row(
        "native over contiguous positions there", "25.09 → 66.18 % wins", f"×{ratio:.3f}", ratio > 1.05,
        f"inside the training length ×{base['native'] / base['contiguous']:.3f}",
    )  # fmt: skip
    width = max(trained, len(ids) // 40)
    at = list(range(room + piece, len(ids) - width + 1, width))
    for name, values in nats.items():
        bench.figures[f"perplexity at positions of a kind over tokens read|x|{name}"] = [float(n) for n in at]
        bench.figures[f"perplexity at positions of a kind over tokens read|y|{name}"] = [
            perplexity(values[n : n + width]) for n in at
        ]
