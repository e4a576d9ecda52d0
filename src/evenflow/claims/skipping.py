"""What memories promise that attend a part of what they hold, or hold many tokens as one: Hybrid Forcing and TempCache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, scaled_dot_product_attention

from ..memory import Absolute, Memory, MemoryState, Never
from ..memory.buckets import bucket_attention, shared_products
from ..memory.hashing import bucket_codes, hyperplanes, share_bucket
from ..memory.sparse import block_attention, sparse_attention, top_blocks
from ..recipes import recipe
from ..recipes.temp_cache import prompt_tokens
from .choosing import CHUNK, in_turns, off, random, ratio, read
from .compare import Reading
from .registry import Bench, claim
from .streams import Frames, Step

# -- Hybrid Forcing ------------------------------------------------------------------------------------------------

RATIO, BLOCK = 0.2, 64  # of the paper
DIM = 64


@claim("hybrid-forcing")
def hybrid_forcing(bench: Bench) -> None:
    """A fifth of the window's blocks is nearly all of its attention, and a state of constant size knows what has left."""
    blocks(bench)
    cheaper(bench, (64, 128, 256, 512, 1560) if bench.full else (64, 128, 256, 512))
    trace(bench, 40 if bench.full else 20)
    left(bench, 8 if bench.full else 4)
    constant(bench, 60 if bench.full else 20)


def pictures(alike: float, frame: int, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """q of the last three of nine frames, k and v of all: [1, heads, tokens, DIM].

    A frame is a row of patches of 40 to 100 tokens, each of which shows one of sixteen things: `alike` is the share of
    a token's content that it has in common with its patch. Queries look for their like.
    """
    made = random(0, "pictures")
    things = torch.randn(2, heads, 16, DIM, generator=made)
    sizes = torch.randint(40, 101, (9 * frame // 40,), generator=made)
    which = torch.randint(16, (len(sizes),), generator=made).repeat_interleave(sizes)[: 9 * frame]
    own = torch.randn(2, heads, 9 * frame, DIM, generator=made)
    k, v = (math.sqrt(alike) * things[:, :, which] + math.sqrt(1 - alike) * own)[:, None]
    return k[:, :, -3 * frame :], k, v


def blocks(bench: Bench, frame: int = 512) -> None:
    """What the best fifth of blocks has of the attention, beside as many at random and the best there are."""
    made = random(0, "blocks")
    q, k = (torch.randn(1, 1, n, 8, generator=made) for n in (4680, 14_040))
    chosen = top_blocks(q, k, RATIO, BLOCK)
    bench.row(
        "query blocks, and key blocks that each attends, of 4,680 queries and 14,040 keys", "74 and 44 of 220",
        f"{chosen.shape[2]} and {chosen.shape[3]} of {-(-14_040 // BLOCK)}", tuple(chosen.shape[2:]) == (74, 44),
    )  # fmt: skip
    curves: dict[str, list[float]] = {"best by mean keys": [], "at random": [], "best by attention": []}
    shares, masses = (0.0, 0.25, 0.5, 0.75, 0.9), {}
    for alike in shares:
        q, k, v = pictures(alike, frame)
        full = scaled_dot_product_attention(q, k, v)
        weights = (q @ k.mT * DIM**-0.5).softmax(-1).unflatten(2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).sum((3, 5))
        kept = top_blocks(q, k, RATIO, BLOCK)
        drawn = torch.rand(weights.shape, generator=made).argsort(-1)[..., : kept.shape[3]]
        best = weights.argsort(dim=-1, descending=True)[..., : kept.shape[3]]
        for (name, curve), choice in zip(curves.items(), (kept, drawn, best), strict=True):
            curve.append(off(block_attention(q, k, v, choice, BLOCK, DIM**-0.5), full))
            masses[name, alike] = float(weights.gather(-1, choice).sum() / weights.sum())
    at = shares.index(0.75)
    ours, drawn_, best_ = (curve[at] for curve in curves.values())
    bench.row(
        "error of a fifth of the blocks against all, where neighbours are three quarters alike: best by mean keys", "about the least",
        f"{ours:.3f}", ours < 1.2 * best_ and ours < drawn_ / 2,
        f"{drawn_:.3f} at random, {best_:.3f} with the best there are; patches and blocks do not begin together",
    )  # fmt: skip
    bench.row(
        "attention mass in them", "–", f"{masses['best by mean keys', 0.75]:.3f}", None,
        f"{masses['at random', 0.75]:.3f} at random, {masses['best by attention', 0.75]:.3f} at best",
    )  # fmt: skip
    bench.row(
        "the same where neighbours have nothing in common", "–", f"error {curves['best by mean keys'][0]:.3f}", None,
        f"mass {masses['best by mean keys', 0.0]:.3f}: a block's mean is nobody's, and attention is not in blocks",
    )  # fmt: skip
    for name, curve in curves.items():
        bench.figures[f"error of a fifth of the blocks over share that neighbours have in common|x|{name}"] = list(
            shares
        )
        bench.figures[f"error of a fifth of the blocks over share that neighbours have in common|y|{name}"] = curve


def cheaper(bench: Bench, frames: Sequence[int], heads: int = 2, dim: int = 128) -> None:
    """A chunk of three frames over nine, in blocks and dense, as frames grow; then the whole memory, both ways."""
    made, faster = random(0, "cheaper"), {}
    for frame in frames:
        q, k, v = (torch.randn(1, heads, n * frame, dim, generator=made) for n in (3, 9, 9))
        kept, scale = top_blocks(q, k, RATIO, BLOCK), dim**-0.5
        calls = {
            "dense": partial(scaled_dot_product_attention, q, k, v),
            "sparse": partial(sparse_attention, q, k, v, ratio=RATIO, block=BLOCK, scale=scale),
            "choosing": partial(top_blocks, q, k, RATIO, BLOCK),
            "attending": partial(block_attention, q, k, v, kept, BLOCK, scale),
        }
        seconds = in_turns(calls, 7 if frame < 512 else 3)
        faster[9 * frame] = ratio(seconds, "dense", "sparse")
        shares = [ratio(seconds, part, "sparse") for part in ("choosing", "attending")]
    keys = [float(n) for n in faster]
    bench.row(
        "block-sparse attention is cheaper than dense attention from", "its size, 14,040 keys", f"{min((n for n, f in faster.items() if f > 1), default=0):,} keys",
        all(f > 1 for n, f in faster.items() if n >= 2304), "; ".join(f"{n:,} keys ×{f:.2f}" for n, f in faster.items()),
    )  # fmt: skip
    most = list(faster)[-1]
    bench.row(
        f"dense attention over a fifth of the blocks, {most:,} keys", "up to 5 for a fifth", f"×{faster[most]:.2f}",
        faster[most] > 2, f"attending takes {shares[1]:.0%} of it, choosing {shares[0]:.0%}: products of 64 queries with "
        "blocks that are copied together run less well than one large product",
    )  # fmt: skip
    bench.figures |= {
        "speed of block-sparse attention, dense 1, over keys|x": keys,
        "speed of block-sparse attention, dense 1, over keys|y": list(faster.values()),
    }  # fmt: skip
    frame = 256
    memories = {
        "sparse": recipe("hybrid-forcing", projection=1.0, frame=frame),
        "dense": recipe("hybrid-forcing", projection=1.0, ratio=1.0, frame=frame),
        "21 frames": recipe("self-forcing", frame=frame),
    }
    q, k, v = (torch.randn(1, heads, CHUNK * frame, dim, generator=made) for _ in "qkv")
    states = {name: memory.build(layers=1, heads=heads, head_dim=dim) for name, memory in memories.items()}
    for state in states.values():
        for _ in range(8):
            read(state, Step(((q, k, v),), {}))
    chunk = Step(((q, k, v),), {})
    seconds = in_turns({name: partial(read, state, chunk, commit=False) for name, state in states.items()}, 7)
    bench.row(
        f"a pass of the whole memory, all blocks over a fifth of them, frames of {frame}", "> 1",
        f"×{ratio(seconds, 'dense', 'sparse'):.2f}", ratio(seconds, "dense", "sparse") > 1,
        "placing keys and keeping the state take as long either way",
    )  # fmt: skip
    bench.row(
        "a pass over 21 frames of Self-Forcing over it", "29.5 / 17.0 = 1.7 frames a second",
        f"×{ratio(seconds, '21 frames', 'sparse'):.2f}", ratio(seconds, "21 frames", "sparse") > 1.7,
        "the paper's is of the whole network; here attention alone",
    )  # fmt: skip


def hybrid(projection: Tensor | float | None, frame: int) -> Memory:
    """Window and state with every block attended: what is measured is the state."""
    return recipe("hybrid-forcing", ratio=1.0, projection=projection, frame=frame)


EVERYTHING = Memory(evict=Never(), place=Absolute(), inside="both", frame=1, name="full attention")


def trace(bench: Bench, chunks: int, frame: int = 2) -> None:
    """A chunk of ones, then zeros: what queries that look at everything alike get of it, chunk by chunk."""
    memories = {
        "full attention": replace(EVERYTHING, frame=frame),
        "hybrid-forcing": hybrid(1.0, frame),
        "window": hybrid(None, frame),
    }
    one = torch.ones(1, 2, CHUNK * frame, 16, dtype=torch.float64)
    curves = {}
    for name, memory in memories.items():
        state = memory.build(layers=1, heads=2, head_dim=16, rope=None, dtype=torch.float64)
        shares = []
        for number in range(chunks):
            out = read(state, Step(((one, one, one * (number == 3)),), {}))[0]
            shares += [float(out.mean())] if number >= 3 else []
        curves[name] = shares
        bench.figures[f"share of one chunk in an even look over chunks since|x|{name}"] = [
            float(n) for n in range(len(shares))
        ]
        bench.figures[f"share of one chunk in an even look over chunks since|y|{name}"] = shares
    taken = chunks - 2  # chunks that the state has taken in
    bench.row(
        f"share of one chunk in an even look, {chunks - 4} chunks later: full attention, hybrid-forcing, window",
        "1 / chunks, 1 / chunks in the state, 0",
        ", ".join(f"{curves[name][-1]:.4f}" for name in curves),
        abs(curves["hybrid-forcing"][-1] - 1 / taken) < 1e-6 and curves["window"][-1] == 0,
        f"1 / {chunks} and 1 / {taken}; projection 1",
    )  # fmt: skip


ASKED = (3, 5, 7, 9, 11)  # chunks ago; from 2 on they have left the window
SMALL = Frames(frame=8, layers=1, heads=2, kv_heads=1)
TOGETHER, READ = 48, 13  # streams at once, chunks of each


def together(steps: Sequence[Step]) -> Step:
    """The same step of several streams as rows of a batch."""
    q, k, v = (torch.cat([step.layers[0][at] for step in steps]) for at in range(3))
    return Step(((q, k, v),), steps[0].tags)


def many(memory: Memory) -> Reading:
    """An empty memory for that many streams."""
    geometry: dict[str, Any] = {**SMALL.geometry(), "batch": TOGETHER}
    return Reading(memory.build(**geometry))


def asked(first: int, given: Sequence[Memory]) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
    """What memories read in the last four chunks of many streams, and get for questions about chunks that have left;
    by chunk or question, then by memory. And the values asked for, [B, quiet] a question."""
    streams = [replace(SMALL, seed=first + n) for n in range(TOGETHER)]
    readings, outputs, answers, values = [many(memory) for memory in given], [], [], []
    for number in range(READ):
        step = together([stream.step(number * CHUNK, CHUNK) for stream in streams])
        got = [reading.step(step)[0] for reading in readings]
        outputs += [got] if number >= READ - 4 else []
    for age in ASKED:
        needles = [stream.needle("detail", (READ - age) * CHUNK) for stream in streams]
        pairs = zip(streams, needles, strict=True)
        question = together([stream.question(READ * CHUNK, CHUNK, needle) for stream, needle in pairs])
        answers.append([reading.ask(question)[0] for reading in readings])
        values.append(torch.stack([needle.value[0] for needle in needles]))
    return outputs, answers, values


def fitted(got: Sequence[Sequence[Tensor]]) -> Tensor:
    """The projection [1, D_v, D_v + 1] with which window and state come nearest to full attention, by least squares.

    got: outputs of window, window and state with projection 1, and full attention.
    """
    had = torch.cat([(state - window).flatten(0, -2) for window, state, _ in got]).double()
    wanted = torch.cat([(full - window).flatten(0, -2) for window, _, full in got]).double()
    had = torch.cat([had, torch.ones(len(had), 1, dtype=torch.float64)], 1)
    square = had.T @ had
    square = square + 1e-6 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    return torch.linalg.solve(square, had.T @ wanted).T[None].float()


def left(bench: Bench, lessons: int) -> None:
    """Details that have left the window, asked for: the window alone, with the state as it is, and with a projection
    that was fitted on other streams, as training would."""
    full = replace(EVERYTHING, frame=SMALL.frame)
    learned: list[tuple[list[list[Tensor]], list[list[Tensor]]]] = []
    for lesson in range(1, lessons + 1):
        outputs, answers, _ = asked(1000 * lesson, (hybrid(None, SMALL.frame), hybrid(1.0, SMALL.frame), full))
        learned.append((outputs, answers))
        bench.say(f"read {lesson * TOGETHER} streams of {lessons * TOGETHER}")
    by_answers = fitted([pair for _, answers in learned for pair in answers])
    by_outputs = fitted([pair for outputs, _ in learned for pair in outputs])
    given = {
        "window alone": hybrid(None, SMALL.frame), "projection 1": hybrid(1.0, SMALL.frame),
        "projection fitted to such questions": hybrid(by_answers, SMALL.frame),
        "projection fitted to the stream": hybrid(by_outputs, SMALL.frame),
    }  # fmt: skip
    outputs, answers, values = asked(0, [*given.values(), full])
    errors, recalls = {}, {}
    for at, name in enumerate(given):
        errors[name] = off(torch.cat([got[at] for got in answers]), torch.cat([got[-1] for got in answers]))
        recalls[name] = [
            float((got[at][..., SMALL.loud :] * value[:, None, None]).sum(-1).mean()) / math.sqrt(SMALL.loud)
            for got, value in zip(answers, values, strict=True)
        ]
    ages = ", ".join(str(CHUNK * age) for age in ASKED)
    for name in list(given)[:3]:
        ours = name != "window alone"
        bench.row(
            f"recall of details {ages} frames old, out of the window for long: {name}", "something" if ours else "0",
            f"{mean(recalls[name]):.3f}", mean(recalls[name]) > 0.05 if ours else None,
            ", ".join(f"{share:.2f}" for share in recalls[name]),
        )  # fmt: skip
        bench.figures[f"recall of what left the window over frames since|x|{name}"] = [
            float(CHUNK * age) for age in ASKED
        ]
        bench.figures[f"recall of what left the window over frames since|y|{name}"] = recalls[name]
    share = errors["projection fitted to such questions"] / errors["window alone"]
    bench.row(
        "error of the answers against full attention, fitted projection over window alone", "< 1", f"×{share:.2f}", share < 1,
        f"projection 1: ×{errors['projection 1'] / errors['window alone']:.2f}; one matrix for {2 * READ} details and all "
        f"pictures; fitted on {lessons * TOGETHER} other streams",
    )  # fmt: skip
    late = [off(torch.cat([got[at] for got in outputs]), torch.cat([got[-1] for got in outputs])) for at in range(4)]
    bench.row(
        "error of the stream's own outputs, fitted projection over window alone", "< 0.95", f"×{late[3] / late[0]:.3f}",
        late[3] < 0.95 * late[0],
        f"projection 1: ×{late[1] / late[0]:.2f}. What a picture looks for is in the window or nowhere in particular, and keys "
        "without a mean leave no mean of values in a sum of k ⊗ v",
    )  # fmt: skip


def constant(bench: Bench, chunks: int) -> None:
    """Bytes of the state, and of everything, early and late."""
    stream = Frames(frame=16)
    geometry: dict[str, Any] = stream.geometry()
    reading, sizes = Reading(hybrid(1.0, stream.frame).build(**geometry)), []
    for number in range(chunks):
        reading.step(stream.step(number * CHUNK, CHUNK))
        sizes.append(reading.state.nbytes)
    state = reading.state.state_dict()
    held = sum(state[f"layers.0.fold.{name}"].numel() for name in ("kv", "kmean"))
    heads, dim = stream.kv_heads, stream.head_dim
    bench.row(
        "numbers in a layer's state", "H · (d² + d)", f"{held:,}", held == heads * (dim**2 + dim),
        f"as much as {held / (2 * heads * dim):.1f} tokens: {heads} heads, d = {dim}",
    )  # fmt: skip
    bench.row(
        f"bytes after {chunks} chunks over those after 4", "1", f"×{sizes[-1] / sizes[3]:.2f}", sizes[-1] == sizes[3]
    )


# -- TempCache -----------------------------------------------------------------------------------------------------

THINGS = 200  # tokens a frame, each of which shows a thing
SHARP = 8.0  # factor on queries


@claim("temp-cache")
def temp_cache(bench: Bench) -> None:
    """The cache grows with what is new, and reads as the whole one does; hashing finds most of the attention for less."""
    merged(bench, 20)
    beside_window(bench, 20)
    exact(bench, 20)
    representatives(bench)
    flat(bench, 900 if bench.full else 300)
    buckets(bench, 1560)
    prompts(bench)


def things(
    frames: int, *, new: float = 0.1, noise: float = 0.1, drift: float = 0.0, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Frame by frame: keys float64 [THINGS, DIM], what each shows, as a number, and the undisturbed directions of it.

    From frame to frame a share `new` of the things is replaced, and all of them turn by `drift`; a key has noise of that
    length, where it has length 1 itself.
    """
    made = random(seed, "things")

    def units(count: int) -> Tensor:
        return normalize(torch.randn(count, DIM, generator=made, dtype=torch.float64), dim=-1)

    shown, names = units(THINGS), torch.arange(THINGS)
    for t in range(frames):
        if t:
            gone = torch.randperm(THINGS, generator=made)[: int(new * THINGS)]
            shown[gone], names[gone] = units(len(gone)), int(names.max()) + 1 + torch.arange(len(gone))
            shown = normalize(shown + drift * units(THINGS), dim=-1) if drift else shown
        yield shown + noise * units(THINGS), names.clone(), shown.clone()


def fed(memories: dict[str, Memory], frames: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, MemoryState]:
    """The memories after these frames, with values that say which thing a token shows."""
    count = int(frames[-1][1].max()) + 1
    states = {
        name: memory.build(
            layers=1, heads=1, head_dim=DIM, value_dim=count, rope=None, scale=1.0, dtype=torch.float64
        ) for name, memory in memories.items()
    }  # fmt: skip
    for keys, names, _ in frames:
        values = one_hot(names, count).double()[None, None]
        for state in states.values():
            read(state, Step(((SHARP * keys[None, None], keys[None, None], values),), {}))
    return states


def shares(state: MemoryState, query: Tensor) -> Tensor:
    """Attention that queries [m, DIM] pay to each thing, [m, things]; they bring nothing themselves."""
    asked = torch.zeros(THINGS, DIM, dtype=torch.float64)
    asked[: len(query)] = SHARP * query
    nothing = torch.zeros(1, 1, THINGS, state.geometry.value_dim, dtype=torch.float64)
    out = read(state, Step(((asked[None, None], -asked[None, None], nothing),), {}), commit=False)[0][0, : len(query)]
    return out / out.sum(-1, keepdim=True)


def dense(frame: int = THINGS) -> Memory:
    """Every frame, and none of them merged."""
    return replace(EVERYTHING, frame=frame)


def temp(tau: float = 0.9, **params: object) -> Memory:
    """TempCache, a frame at a time."""
    return recipe("temp-cache", **{"tau": tau, "frame": THINGS, "chunk": 1, **params})


def beside(state: MemoryState, full: MemoryState, query: Tensor) -> tuple[float, float]:
    """Overlap of attention over things with that of `full`, and the relative error of an output made from it."""
    ours, theirs = shares(state, query), shares(full, query)
    values = torch.randn(ours.shape[1], DIM, generator=random(0, "values"), dtype=torch.float64)
    return float(torch.minimum(ours, theirs).sum(-1).mean()), off(ours @ values, theirs @ values)


def merged(
    bench: Bench, frames: int, news: Sequence[float] = (0.0, 0.05, 0.1, 0.3),
    noises: Sequence[float] = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5),
) -> None:  # fmt: skip
    """Tokens kept as more is new, or less alike, and how near attention stays to that of the whole cache."""
    for new in news:
        stream = list(things(frames, new=new))
        states = fed({"ours": temp(), "full": dense()}, stream)
        kept, expected = len(states["ours"].held(0)) / (frames * THINGS), (1 + (frames - 1) * new) / frames
        overlap, error = beside(states["ours"], states["full"], stream[-1][0])
        bench.row(
            f"tokens kept of {frames} frames, {new:.0%} of a frame new", f"only what is new: {expected:.1%}", f"{kept:.1%}",
            abs(kept - expected) < 0.01,
            "16.8 % and a recall of 90.2 % on Rolling Forcing" if new == 0.1 else "",
        )  # fmt: skip
        bench.row(
            f"overlap of attention with the whole cache, error of the output, {new:.0%} new", "≥ 0.95, ≤ 0.06",
            f"{overlap:.3f}, {error:.3f}", overlap >= 0.95 and error <= 0.06,
        )  # fmt: skip
    curves: dict[float, list[float]] = {0.9: [], 0.8: [], 0.6: []}
    for noise in noises:
        states = fed({str(tau): temp(tau) for tau in curves}, list(things(frames, noise=noise)))
        for tau, curve in curves.items():
            curve.append(len(states[str(tau)].held(0)) / (frames * THINGS))
    for tau, curve in curves.items():
        bench.figures[f"share of tokens kept over noise of keys|x|tau {tau}"] = list(noises)
        bench.figures[f"share of tokens kept over noise of keys|y|tau {tau}"] = curve
    bench.row(
        "tokens kept where noise is half as large as the key, tau 0.9", "all: nothing is alike", f"{curves[0.9][-1]:.1%}",
        curves[0.9][-1] > 0.995, f"tau 0.8 {curves[0.8][-1]:.0%}, tau 0.6 {curves[0.6][-1]:.0%}",
    )  # fmt: skip


def beside_window(bench: Bench, frames: int) -> None:
    """A window that may hold more tokens than TempCache does: what it reads, and what of it is known that is gone."""
    stream = list(things(frames))
    count = len(fed({"ours": temp()}, stream)["ours"].held(0))
    window = -(-count // THINGS) + 1  # one of them is that of the question
    states = fed(
        {"temp-cache": temp(), "full": dense(), "window": recipe("self-forcing", window=window, chunk=1, frame=THINGS)}, stream
    )  # fmt: skip
    names = [names for _, names, _ in stream]
    gone = [(t, n) for t in range(frames - 1) for n in range(THINGS) if int(names[t][n]) not in names[t + 1]]
    chosen = gone[:: max(1, len(gone) // 100)]
    query = torch.stack([stream[t][2][n] for t, n in chosen])
    index = torch.tensor([int(names[t][n]) for t, n in chosen])
    whole = shares(states["full"], query).gather(1, index[:, None])[:, 0]
    got = {name: shares(states[name], query).gather(1, index[:, None])[:, 0] for name in ("temp-cache", "window")}
    for name, state in states.items():
        if name == "full":
            continue
        overlap, error = beside(state, states["full"], stream[-1][0])
        ours = name == "temp-cache"
        bench.row(
            f"error of what the last frame reads, against the whole cache: {name}", "less than a window's" if ours else "–",
            f"{error:.3f}", None,
            f"overlap {overlap:.2f}; {len(state.held(0)):,} of {frames * THINGS:,} tokens held",
        )  # fmt: skip
        bench.row(
            f"attention on a thing that is gone, asked for, over that of the whole cache: {name}",
            "1" if ours else "0 but for the last frames", f"{float((got[name] / whole).mean()):.2f}",
            float((got[name] / whole).mean()) > 0.9 if ours else None, f"{len(chosen)} things, gone for 1 to {frames - 1} frames",
        )  # fmt: skip
    errors = [beside(states[name], states["full"], stream[-1][0])[1] for name in ("temp-cache", "window")]
    bench.row(
        "that error over the window's", "< 1", f"×{errors[0] / errors[1]:.3f}", errors[0] < errors[1],
        "the window holds as many tokens or more",
    )  # fmt: skip
    for name in ("temp-cache", "window"):
        by_age: dict[int, list[float]] = {}
        for (t, _), share in zip(chosen, (got[name] / whole).tolist(), strict=True):
            by_age.setdefault(frames - 1 - t, []).append(share)
        ages = sorted(by_age)
        bench.figures[f"attention on a thing that is gone over frames since|x|{name}"] = [float(age) for age in ages]
        bench.figures[f"attention on a thing that is gone over frames since|y|{name}"] = [
            mean(by_age[age]) for age in ages
        ]


def exact(bench: Bench, frames: int) -> None:
    """Equal keys: merged or not is the same, thanks to log m."""
    made = random(0, "exact")
    ours, full = (memory.build(layers=1, heads=1, head_dim=DIM, rope=None, scale=1.0) for memory in (temp(), dense()))
    for keys, _, _ in things(frames, new=0.2, noise=0.0):
        last = keys.float()[None, None]
        step = Step(((SHARP * last, last, torch.randn(last.shape, generator=made)),), {})
        for state in (ours, full):
            read(state, step)
    asking = Step(((SHARP * last, -last, torch.zeros_like(last)),), {})
    whole, merged_ = (read(state, asking, commit=False)[0] for state in (full, ours))
    held = ours.state_dict()
    ours.load_state_dict({name: x * 0 if name.endswith(".weight") else x for name, x in held.items()})
    error, without = off(merged_, whole), off(read(ours, asking, commit=False)[0], whole)
    bench.row(
        "error against the whole cache for equal keys, float32", "≤ 1e-6", f"{error:.0e}", error <= 1e-6,
        f"{len(ours.held(0)):,} of {frames * THINGS:,} tokens held; without log m {without:.2f}",
    )  # fmt: skip


def representatives(bench: Bench) -> None:
    """Keys that turn slowly: who goes on finding its likes?"""
    stream = list(things(20, new=0.0, drift=0.3, noise=0.05))
    kinds = {"last": 0.05, "mean": 0.10, "first": 0.19}
    states = fed({name: temp(0.8, representative=name) for name in kinds} | {"full": dense()}, stream)
    kept = {name: len(states[name].held(0)) / (20 * THINGS) for name in kinds}
    near = {name: beside(states[name], states["full"], stream[-1][0])[0] for name in kinds}
    bench.row(
        "tokens kept where keys turn slowly: last, mean, first key stands for all", "0.05 < 0.10 < 0.19",
        " < ".join(f"{share:.2f}" for share in kept.values()), kept["last"] < kept["mean"] < kept["first"],
        "overlap with the whole cache " + ", ".join(f"{name} {share:.2f}" for name, share in near.items())
        + "; the paper's recall on video keys is 90 % (last) and 75 % (mean)",
    )  # fmt: skip


def flat(bench: Bench, frames: int) -> None:
    """A long stream of the same things: tokens, bytes and time, beside the whole cache."""
    made, size, heads = random(0, "flat"), 64, 4
    shown = normalize(torch.randn(1, heads, size, DIM, generator=made), dim=-1)
    geometry: dict[str, Any] = {"layers": 1, "heads": heads, "head_dim": DIM, "rope": None}
    states = {"temp-cache": temp(frame=size).build(**geometry), "whole cache": dense(size).build(**geometry)}

    def frame() -> Step:
        keys = shown + 0.1 * normalize(torch.randn(shown.shape, generator=made), dim=-1)
        return Step(((SHARP * keys, keys, keys),), {})

    young, curves = {}, {name: list[float]() for name in states}
    for t in range(frames):
        step = frame()
        for name, state in states.items():
            read(state, step)
            curves[name].append(state.nbytes / 1e6)
            if t == 19:
                young[name] = state.fork()
    held = {name: len(state.held(0)) for name, state in states.items()}
    step = frame()
    passes = {
        f"{name}, {age}": partial(read, state, step, commit=False)
        for age, some in (("young", young), ("old", states)) for name, state in some.items()
    }  # fmt: skip
    seconds = in_turns(passes, 20)
    commits = {"young": lambda: read(young["temp-cache"], frame()), "old": lambda: read(states["temp-cache"], frame())}
    clean = in_turns(commits, 20)
    for name in states:
        ours = name == "temp-cache"
        grown = ratio(seconds, f"{name}, old", f"{name}, young")
        bench.row(
            f"tokens and time of a pass after {frames} frames over those after 20: {name}", "×1 and < 1.3" if ours else "grow",
            f"×{held[name] / len(young[name].held(0)):.2f} and ×{grown:.2f}",
            held[name] == size and grown < 1.3 if ours else None, f"{held[name]:,} tokens, {curves[name][-1]:.1f} MB",
        )  # fmt: skip
        bench.figures[f"MB held over frames of the same things|x|{name}"] = [float(t + 1) for t in range(frames)]
        bench.figures[f"MB held over frames of the same things|y|{name}"] = curves[name]
    bench.row(
        "time of a clean pass, which merges, there", "flat", f"×{ratio(clean, 'old', 'young'):.2f}",
        ratio(clean, "old", "young") < 1.3,
    )  # fmt: skip
    faster = ratio(seconds, "whole cache, old", "temp-cache, old")
    bench.row(
        f"a pass over the whole cache over one of ours after {frames} frames", "×6.8 at 16.8 % kept", f"×{faster:.1f}",
        faster > 1, f"{held['temp-cache'] / held['whole cache']:.1%} kept",
    )  # fmt: skip


def clusters(m: int, n: int, *, kinds: int, shown: int, noise: float, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, heads, m, DIM], k and v [1, heads, n, DIM] around the same `kinds` directions, queries around `shown` of them."""
    made = random(0, "clusters")
    about = torch.randn(heads, kinds, DIM, generator=made)
    which = torch.randint(shown, (m,), generator=made), torch.randint(kinds, (n,), generator=made)
    q, k = (
        (about[:, w] + noise * torch.randn(heads, len(w), DIM, generator=made))[None] for w in which
    )  # fmt: skip
    return q, k, torch.randn(1, heads, n, DIM, generator=made)


def hashed(q: Tensor, k: Tensor, v: Tensor, bits: int, tables: int) -> Tensor:
    """Attention within buckets, with all that it takes."""
    codes = (bucket_codes(x, hyperplanes(DIM, bits, tables=tables, like=q)) for x in (q, k))
    return bucket_attention(q, k, v, *codes, scale=DIM**-0.5)


def buckets(bench: Bench, most: int, frames: int = 21, noise: float = 0.25) -> None:
    """AnnSA: what hashed attention finds of the mass, what it leaves out, and from which size it costs less than all."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    figures: dict[tuple[int, int], list[float]] = {(4, 1): [], (3, 2): [], (6, 4): []}
    q, k, _ = clusters(256, frames * 128, kinds=32, shown=32, noise=noise, heads=2)
    weights = (q @ k.mT * DIM**-0.5).softmax(-1)
    for bits, tables in ((2, 1), (4, 1), (3, 2), (4, 4), (6, 4)):
        planes = hyperplanes(DIM, bits, tables=tables, like=q)
        met = share_bucket(bucket_codes(q, planes), bucket_codes(k, planes))
        found[bits, tables] = float((weights * met).sum(-1).mean()), float(met.float().mean())
    bench.row(
        "attention mass that shares a bucket, and share of pairs that do", "92.4 % at 27.6 %",
        f"{found[3, 2][0]:.1%} at {found[3, 2][1]:.1%}", found[3, 2][0] > 0.9 and found[3, 2][1] < 0.3,
        "; ".join(f"{b} bits × {t}: {mass:.0%} at {share:.0%}" for (b, t), (mass, share) in found.items()),
    )  # fmt: skip
    sizes = [size for size in (64, 256, 512, 1560) if size <= most]
    for size in sizes:
        q, k, v = clusters(3 * size, frames * size, kinds=32, shown=32, noise=noise, heads=1)
        calls = {str(name): partial(hashed, q, k, v, *name) for name in figures}
        seconds = in_turns({"dense": partial(scaled_dot_product_attention, q, k, v), **calls}, 3)
        for name, curve in figures.items():
            curve.append(ratio(seconds, "dense", str(name)))
    lengths = [float(frames * size) for size in sizes]
    for name, curve in figures.items():
        bits, tables = name
        mass, share = found[name]
        cost = shared_products(*(bucket_codes(x, hyperplanes(DIM, bits, tables=tables, like=x)).mT for x in (q, k)))
        bench.row(
            f"dense over hashed attention time, {3 * sizes[-1]:,} queries and {lengths[-1]:,.0f} keys: {bits} bits, {tables} tables",
            "×5.1 at 27.6 % and 92.4 %", f"×{curve[-1]:.2f} at {share:.1%} and {mass:.1%}", curve[-1] > 1,
            "cheaper from " + next((f"{n:,.0f} keys" for n, f in zip(lengths, curve, strict=True) if f > 1), "no size here")
            + f"; {int(cost) / (q.shape[2] * k.shape[2]):.0%} of the products; hashing, sorting and gathering are the rest",
        )  # fmt: skip
        bench.figures[f"speed of hashed attention, dense 1, over keys|x|{bits} bits, {tables} tables"] = lengths
        bench.figures[f"speed of hashed attention, dense 1, over keys|y|{bits} bits, {tables} tables"] = curve


def prompts(bench: Bench) -> None:
    """AnnCA: the tokens of a long prompt that a frame needs, as the frame shows more of what the prompt is about."""
    about, curve, masses = (2, 4, 8, 16, 32), [], []
    for shown in about:
        q, k, v = clusters(1560, 512, kinds=32, shown=shown, noise=0.25, heads=4)
        kept = prompt_tokens(q, k, bits=12, tables=4)
        weights = (q @ k.mT * DIM**-0.5).softmax(-1)
        curve.append(float(kept.float().mean()))
        masses.append(float((weights * kept[:, :, None]).sum(-1).mean()))
    at = about.index(8)
    bench.row(
        "prompt tokens kept, and attention mass on them, where a frame shows 8 of its 32 topics", "33.1 % and 94.2 %",
        f"{curve[at]:.1%} and {masses[at]:.1%}", curve[at] < 0.5 and masses[at] > 0.9,
        "; ".join(f"{n} topics: {share:.0%} and {mass:.0%}" for n, share, mass in zip(about, curve, masses, strict=True)),
    )  # fmt: skip
    bench.figures |= {
        "share of the prompt kept over topics of 32 in the frame|x": [float(n) for n in about],
        "share of the prompt kept over topics of 32 in the frame|y": curve,
    }  # fmt: skip
    q, k, v = clusters(1560, 512, kinds=32, shown=8, noise=0.25, heads=1)
    kept = prompt_tokens(q, k, bits=12, tables=4)

    def passes(select: bool) -> None:
        some = prompt_tokens(q, k, bits=12, tables=4)[0, 0].nonzero()[:, 0] if select else slice(None)
        for _ in range(5):
            scaled_dot_product_attention(q, k[:, :, some], v[:, :, some])

    seconds = in_turns({"some": lambda: passes(True), "all": lambda: passes(False)}, 9)
    bench.row(
        "cross-attention of five passes over all of the prompt, over that of what is kept", "×2.2",
        f"×{ratio(seconds, 'all', 'some'):.2f}", ratio(seconds, "all", "some") > 1,
        f"chosen once a chunk; {float(kept.float().mean()):.0%} kept; 512 tokens of prompt, 1,560 queries",
    )  # fmt: skip
