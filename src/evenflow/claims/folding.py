"""What video memories promise that fold, choose or move: Reward, Deep and Rolling Forcing, StreamDiffusionV2, LiveAct."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from ..memory import Absolute, Contiguous, LeastAttended, Memory, MemoryState, View
from ..recipes import recipe
from .compare import Reading, built
from .registry import Bench, claim
from .streams import Frames, Step

CHUNK = 3  # frames
HEADS, DIM, SMALL = 2, 16, 2  # of the streams made here; tokens a frame

# -- Reward Forcing ------------------------------------------------------------------------------------------------


def small(memory: Memory, dtype: torch.dtype = torch.float64) -> MemoryState:
    """One layer, nothing rotates."""
    return memory.build(layers=1, heads=HEADS, head_dim=DIM, rope=None, dtype=dtype)


def shown(state: MemoryState, what: Tensor, commit: bool = True) -> Tensor:
    """A chunk whose values are all `what` [DIM]; what queries get that look at everything alike, [DIM]."""
    v = what.to(state.geometry.dtype).expand(1, HEADS, CHUNK * SMALL, DIM)
    with state.step(CHUNK * SMALL, commit=commit):
        return state.attend(0, torch.zeros_like(v), torch.zeros_like(v), v)[0].double().mean((0, 1))


def sinks(window: int = 9) -> dict[str, Memory]:
    """The same budget with a sink that is averaged, one that never changes, and one that is no sink."""
    return {
        "reward-forcing": recipe("reward-forcing", window=window, frame=SMALL),
        "static sink": recipe("reward-forcing", window=window, alpha=1.0, frame=SMALL),
        "plain window": recipe("self-forcing", window=window, frame=SMALL),
    }


@claim("reward-forcing")
def reward_forcing(bench: Bench) -> None:
    """The sink follows a scene that drifts and still knows the old one, and forgets by half in 693 chunks."""
    drifting(bench, 3000 if bench.full else 1500)
    half_life(bench)
    half_precision(bench, 700)


def drifting(bench: Bench, chunks: int) -> None:
    """A scene that turns into another one at an even pace: what of either is in what a look at everything gets."""
    first, last = torch.eye(DIM, dtype=torch.float64)[:2]
    old, new = {}, {}
    for name, memory in sinks().items():
        state = small(memory)
        for n in range(chunks):
            angle = math.pi / 2 * n / (chunks - 1)
            got = shown(state, math.cos(angle) * first + math.sin(angle) * last)
        held = state.state_dict()["layers.0.values"][0, :, : CHUNK * SMALL].double().mean((0, 1))
        if name != "plain window":
            bench.row(
                f"cosine of the sink with the scene of now, and with the first, after {chunks} chunks: {name}",
                "follows" if name == "reward-forcing" else "stays",
                f"{float(held @ last / held.norm()):.3f} and {float(held @ first / held.norm()):.3f}",
                bool(held @ last > 0.3 * held.norm()) if name == "reward-forcing" else None,
            )  # fmt: skip
        old[name], new[name] = float(got @ first), float(got @ last)
        bench.row(
            f"first scene in what an even look gets after {chunks} chunks: {name}",
            {"reward-forcing": "some", "static sink": "a third, for ever", "plain window": "0"}[name],
            f"{old[name]:.3f}", old[name] > 0.05 if name == "reward-forcing" else None,
            f"scene of now {new[name]:.3f}, of 1",
        )  # fmt: skip
    bench.row(
        "scene of now in an even look, reward-forcing over static sink", "> 1",
        f"×{new['reward-forcing'] / new['static sink']:.3f}", new["reward-forcing"] > new["static sink"],
    )  # fmt: skip


def half_life(bench: Bench) -> None:
    """An opening, then nothing: chunks until half of it is left in the sink."""
    for alpha in (0.999, 0.99, 0.9):
        state = small(recipe("reward-forcing", alpha=alpha, frame=SMALL))
        one = torch.ones(DIM, dtype=torch.float64)
        shown(state, one)
        shares = [float(shown(state, 0 * one).mean()) * 3 for _ in range(2)][-1:]  # sinks are a third of what is seen
        while shares[-1] > 0.5:
            shares.append(float(shown(state, 0 * one).mean()) * 3)
        expected = math.ceil(math.log(0.5) / math.log(alpha) - 1e-9)
        bench.row(
            f"chunks until the sink has forgotten half, alpha {alpha}", f"{expected}", f"{len(shares) - 1}",
            len(shares) - 1 == expected, "ln ½ / ln alpha, rounded up" if alpha == 0.999 else "",
        )  # fmt: skip
        bench.figures[f"share of the opening in the sink over chunks|x|alpha {alpha}"] = [
            float(n) for n in range(len(shares))
        ]
        bench.figures[f"share of the opening in the sink over chunks|y|alpha {alpha}"] = shares


def half_precision(bench: Bench, chunks: int) -> None:
    """A sink of zeros, then ones for ever: how far it has come, against alpha's closed form."""
    for carried in (True, False):
        state = small(recipe("reward-forcing", frame=SMALL), torch.bfloat16)
        one = torch.ones(DIM)
        for n in range(chunks + CHUNK):
            shown(state, one * (n > 0))
            if not carried:  # what rounding took is thrown away, as a sink kept in bfloat16 alone would
                held = state.state_dict()
                state.load_state_dict({name: x * 0 if ".fold." in name else x for name, x in held.items()})
        sink = float(state.state_dict()["layers.0.values"][0, :, : CHUNK * SMALL].double().mean())
        expected = 1 - 0.999**chunks
        bench.row(
            f"ones in a sink of zeros after {chunks} chunks of ones, bfloat16, "
            + ("rounding carried along" if carried else "rounding lost"),
            f"{expected:.4f}", f"{sink:.4f}", abs(sink - expected) < 0.002 if carried else None,
        )  # fmt: skip


# -- Deep Forcing --------------------------------------------------------------------------------------------------


class Newest(LeastAttended):
    """Keeps the newest of what is neither sink nor recent."""

    def scores(self, view: View) -> Tensor:
        return view.index[:, :1].expand(view.batch, -1, -1).float()


class AtRandom(LeastAttended):
    """Keeps any tokens."""

    def scores(self, view: View) -> Tensor:
        made = torch.Generator().manual_seed(int(view.consumed.max()) * view.layers + view.layer)
        return torch.rand(view.batch, 1, view.index.shape[-1], generator=made)


WATCHED = (12, 14, 16, 18)  # frames that bring a detail which later frames look at: behind the deep sink
LIVE = Frames(watched=WATCHED, focus=0.5)


def choosing(reuse: int = 7) -> dict[str, Memory]:
    """The same sinks, recent frames and budget; what is between them is chosen in different ways."""
    ours = recipe("deep-forcing", frame=LIVE.frame, reuse=reuse)
    assert isinstance(ours.evict, LeastAttended)
    given = {name: getattr(ours.evict, name) for name in ("capacity", "recent", "fusion")}
    return {
        "deep-forcing": ours,
        "newest instead": replace(ours, evict=Newest(**given, reuse=0)),
        "random instead": replace(ours, evict=AtRandom(**given, reuse=0)),
        "plain window": recipe("self-forcing", frame=LIVE.frame),
    }


@claim("deep-forcing")
def deep_forcing(bench: Bench) -> None:
    """What recent queries look at is kept, where the newest tokens and random ones lose it, for the same budget."""
    participative(bench, 60 if bench.full else 30)
    drowned(bench, 30)
    released(bench, 26)
    sizes(bench)
    price(bench, 256 if bench.full else 128)


def looked_at(reading: Reading, stream: Frames, now: int) -> list[float]:
    """What questions at chunk `now` get back of each detail that frames look at; 1 is all.

    After an even number of chunks the next one is not compressed: a question gets what is held, and rescues nothing.
    """
    needles = [stream.needle("watched", frame) for frame in WATCHED]
    return [stream.recalled(needle, reading.ask(stream.question(now * CHUNK, CHUNK, needle))) for needle in needles]


def read(memory: Memory, stream: Frames, chunks: int) -> Reading:
    """The memory after so many chunks."""
    reading = built(memory, stream)
    for n in range(chunks):
        reading.step(stream.step(n * CHUNK, CHUNK))
    return reading


def participative(bench: Bench, chunks: int) -> None:
    """Details that later frames look at, asked for when any window has lost them."""
    recalled = {}
    for name, memory in choosing(reuse=0).items():
        reading = read(memory, LIVE, chunks)
        shares = looked_at(reading, LIVE, chunks)
        recalled[name] = sum(shares) / len(shares)
        needles = [LIVE.needle("detail", frame) for frame in (0, 15)]
        opening, unseen = (
            LIVE.recalled(needle, reading.ask(LIVE.question(chunks * CHUNK, CHUNK, needle))) for needle in needles
        )
        ours = name == "deep-forcing"
        bench.row(
            f"recall of details that frames look at, {CHUNK * chunks - WATCHED[-1]} frames later: {name}",
            "kept" if ours else "lost", f"{recalled[name]:.3f}", min(shares) > 0.9 if ours else None,
            f"mean of {len(WATCHED)}, least {min(shares):.3f}; no bound on re-use",
        )  # fmt: skip
        bench.row(
            f"recall of the opening, and of a detail that nobody looked at: {name}",
            "0 and 0" if name == "plain window" else "1 and –", f"{opening:.3f} and {unseen:.3f}",
            opening > 0.9 if ours else None,
        )  # fmt: skip
    best = max(share for name, share in recalled.items() if name != "deep-forcing")
    bench.row(
        "recall of what frames look at, less that of the best other", "> 0", f"{recalled['deep-forcing'] - best:+.3f}",
        recalled["deep-forcing"] > best + 0.1,
    )  # fmt: skip


def drowned(bench: Bench, chunks: int) -> None:
    """The same where the other 31 queries of a frame look four times as sharply at their own likes."""
    stream = replace(LIVE, focus=2.0)
    for fusion in ("sum", "max"):
        memory = recipe("deep-forcing", frame=stream.frame, reuse=0, fusion=fusion)
        shares = looked_at(read(memory, stream, chunks), stream, chunks)
        bench.row(
            f"recall of details that one query in {stream.frame} looks at, among sharp others, fusion {fusion}", "–",
            f"{sum(shares) / len(shares):.3f}", None,
            "a sum of logits over all queries drowns the few that look" if fusion == "sum" else "",
        )  # fmt: skip


def released(bench: Bench, chunks: int) -> None:
    """The released bound of seven re-uses: until when a detail that all frames look at is kept."""
    curves = {}
    for reuse in (7, 0):
        reading, shares = built(choosing(reuse)["deep-forcing"], LIVE), []
        for n in range(chunks):
            reading.step(LIVE.step(n * CHUNK, CHUNK))
            if n % 2 and n * CHUNK > max(WATCHED):
                shares.append(looked_at(reading, LIVE, n + 1)[0])
        name = f"deep-forcing, re-use {reuse or 'without a bound'}"
        curves[reuse] = shares
        numbers = [float(n + 1) for n in range(chunks) if n % 2 and n * CHUNK > max(WATCHED)]
        bench.figures[f"recall of a watched detail over chunks|x|{name}"] = numbers
        bench.figures[f"recall of a watched detail over chunks|y|{name}"] = shares
    kept = sum(share > 0.5 for share in curves[7])
    bench.row(
        "compressions that a detail at which all frames look survives", "7", f"{kept}", kept == 7,
        f"the released bound on re-use; without it {sum(share > 0.5 for share in curves[0])} of {len(curves[0])}",
    )  # fmt: skip


def sizes(bench: Bench) -> None:
    """How many frames are held after each chunk."""
    reading, held = built(choosing()["deep-forcing"], LIVE), []
    for n in range(13):
        reading.step(LIVE.step(n * CHUNK, CHUNK))
        held.append(len(reading.state.held(0)) // LIVE.frame)
    bench.row(
        "frames held after chunks 7 to 13", "21, 16, 19, 16, 19, 16, 19", ", ".join(map(str, held[6:])),
        held[6:] == [21, 16, 19, 16, 19, 16, 19],
    )  # fmt: skip


def price(bench: Bench, frame: int) -> None:
    """Attention of a chunk of five passes, as it would be with a full window of 21 frames."""
    big = replace(LIVE, frame=frame, layers=1, watched=())
    window = recipe("self-forcing", frame=frame)
    memories = {
        "ours": recipe("deep-forcing", frame=frame),
        "keys kept as they stand": window,
        "keys placed when they are read": replace(window, place=Contiguous()),
    }
    readings = {name: built(memory, big) for name, memory in memories.items()}
    took: dict[str, list[float]] = {name: [] for name in readings}
    for n in range(17):
        chunk = big.step(n % 4 * CHUNK, CHUNK)
        for name, reading in readings.items():
            start = time.perf_counter()
            for last in (False, False, False, False, True):
                reading.step(chunk, commit=last)
            took[name].append(time.perf_counter() - start)
    for name, seconds in list(took.items())[1:]:
        # Of two chunks together, as only every second one is compressed.
        ratios = [sum(took["ours"][n : n + 2]) / sum(seconds[n : n + 2]) for n in range(7, 16)]
        bench.row(
            f"attention time over that of a window of 21 frames, {name}; frames of {frame}", "≤ 1",
            f"×{median(ratios):.3f}", median(ratios) <= 1.05,
            "a sink that moves is turned at every read" if "stand" in name else "same work to place keys",
        )  # fmt: skip


# -- Rolling Forcing -----------------------------------------------------------------------------------------------

FLIGHT = 5  # blocks in flight
ROLL = Frames(needle_every=CHUNK)


@claim("rolling-forcing")
def rolling_forcing(bench: Bench) -> None:
    """The first block is always directly before what a window sees, so that it counts the same in any hour."""
    offset(bench)
    anchored(bench, 60 if bench.full else 24)
    flat(bench, 60 if bench.full else 30)


def attended(state: MemoryState, shift: int) -> list[Tensor]:
    """What a window of 15 frames reads after 9 blocks, the stream having gone on by `shift` frames since."""
    later = state.fork()
    later.seek(state.position + shift * ROLL.frame)
    return Reading(later).step(ROLL.step(9 * CHUNK, FLIGHT * CHUNK), commit=False)


def offset(bench: Bench) -> None:
    """The same window over the same cache, ever later: in 2 minutes, in an hour, in a month of 4 frames a second."""
    ours = recipe("rolling-forcing", frame=ROLL.frame)
    memories = {"rolling-forcing": ours, "anchor at its own time": replace(ours, place=Absolute())}
    shifts = {"2 minutes": 480, "an hour": 14_400, "a month": 10_368_000}
    for name, memory in memories.items():
        reading = built(memory, ROLL)
        for n in range(9):
            reading.step(ROLL.step(n * CHUNK, CHUNK))
        now = attended(reading.state, 0)
        size = max(float(out.norm()) for out in now)
        for later, shift in shifts.items():
            moved = max(
                float((a - b).norm()) for a, b in zip(attended(reading.state, shift), now, strict=True)
            ) / size  # fmt: skip
            bench.row(
                f"change of what a window reads from the same cache {later} later: {name}",
                "0" if name == "rolling-forcing" else "–", f"{moved:.0e}",
                moved < 1e-4 if name == "rolling-forcing" else None, "float32; relative to its size",
            )  # fmt: skip


def anchored(bench: Bench, blocks: int) -> None:
    """A detail of the first block, asked for by a window in flight and by a clean pass."""
    ours = recipe("rolling-forcing", frame=ROLL.frame)
    memories = {"rolling-forcing": ours, "plain window": recipe("self-forcing", frame=ROLL.frame)}
    first = ROLL.needle("detail", 0)
    for name, memory in memories.items():
        reading, shares = built(memory, ROLL), []
        for n in range(blocks):
            reading.step(ROLL.step(n * CHUNK, CHUNK))
            question = ROLL.question((n + 1) * CHUNK, FLIGHT * CHUNK, first)
            shares.append(ROLL.recalled(first, reading.ask(question)))
        mine = name == "rolling-forcing"
        bench.row(
            f"recall of the opening by a window of 15 frames, {CHUNK * blocks} frames later: {name}",
            "kept" if mine else "lost", f"{shares[-1]:.3f}", min(shares) > 0.99 if mine else None,
            f"21 frames attended; least at any time {min(shares):.3f}",
        )  # fmt: skip
        bench.figures[f"recall of the opening over blocks|x|{name}"] = [float(n + 1) for n in range(blocks)]
        bench.figures[f"recall of the opening over blocks|y|{name}"] = shares
        clean = Reading(reading.state.fork()).step(ROLL.question(blocks * CHUNK, CHUNK, first))
        got = ROLL.recalled(first, clean)
        bench.row(
            f"recall of the opening by a clean pass, {CHUNK * blocks} frames later: {name}", "lost", f"{got:.3f}",
            abs(got) < 0.05 if mine else None, "the card: from 24 cached frames on it sees the last 21" if mine else "",
        )  # fmt: skip


def flat(bench: Bench, blocks: int) -> None:
    """Bytes and time of a window, early and late, and the calls that a finished block takes."""
    reading, sizes, took = built(recipe("rolling-forcing", frame=ROLL.frame), ROLL), [], []
    for n in range(blocks):
        start = time.perf_counter()
        reading.step(ROLL.step(n % 4 * CHUNK, FLIGHT * CHUNK), commit=False)
        reading.step(ROLL.step(n % 4 * CHUNK, CHUNK))
        took.append(time.perf_counter() - start)
        sizes.append(reading.state.nbytes)
    slower = median(took[-10:]) / median(took[8:18])
    bench.row(
        f"bytes after {blocks} blocks over those after 8", "1", f"×{sizes[-1] / sizes[7]:.2f}", sizes[-1] == sizes[7]
    )
    bench.row("time of a window and a clean pass there", "1", f"×{slower:.2f}", slower < 1.2)


# -- StreamDiffusionV2 ---------------------------------------------------------------------------------------------

SCENES = Frames(first=20, scene=20, needle_every=1000)
SINKS = 3  # latents, of 6


@claim("streamdiffusion-v2")
def streamdiffusion_v2(bench: Bench) -> None:
    """Sinks stay while they look like the scene and are replaced when it changes, and the ring goes on where it was."""
    replaced(bench, 100 if bench.full else 60)
    ring(bench)
    refresh(bench)
    copies(bench)


def latent(number: int) -> Step:
    """One latent of the stream, or its first two."""
    return SCENES.step(number, 1) if number > 1 else SCENES.step(0, 2)


def first_held(reading: Reading, layer: int = 0) -> list[int]:
    """Latents in the sink slots."""
    return [n // SCENES.frame for n in reading.state.held(layer)[: SINKS * SCENES.frame : SCENES.frame]]


def replaced(bench: Bench, latents: int) -> None:
    """A stream of scenes of 20 latents: which latents become sinks, and from which scene those are that are held."""
    changes = [n for n in range(1, latents) if SCENES.scene_at(n) != SCENES.scene_at(n - 1)]
    for threshold in (0.2, -1.0):
        name = f"threshold {threshold}" if threshold > -1 else "off"
        reading = built(recipe("streamdiffusion-v2", steps=1, threshold=threshold, frame=SCENES.frame), SCENES)
        reading.step(latent(0))
        news, own = [], []
        for n in range(2, latents):
            before = first_held(reading)
            reading.step(latent(n))
            after = first_held(reading)
            news += [n] if after != before and n >= 6 else []
            own.append(sum(SCENES.scene_at(sink) == SCENES.scene_at(n) for sink in after) / SINKS)
        if threshold > -1:
            late = [next((n - change for n in news if n >= change), latents) for change in changes]
            false = [n for n in news if min(abs(n - change) for change in changes) >= SINKS]
            bench.row(
                "latents from a change of scene to the first new sink, at most", "a few", f"{max(late)}", max(late) < 3,
                f"{len(changes)} changes; sinks were replaced at {', '.join(map(str, news))}",
            )  # fmt: skip
            bench.row("sinks replaced where no scene had changed", "0", f"{len(false)}", not false)
        else:
            bench.row("sinks ever replaced, off", "0", f"{len(news)}", not news)
        share = sum(own[4:]) / len(own[4:])
        bench.row(
            f"share of sinks that show the scene of now, mean over the stream: {name}",
            "most" if threshold > -1 else "–", f"{share:.2f}", share > 0.8 if threshold > -1 else None,
        )  # fmt: skip
        bench.figures[f"sinks of the scene of now over latents|x|{name}"] = [float(n) for n in range(2, latents)]
        bench.figures[f"sinks of the scene of now over latents|y|{name}"] = own


def ring(bench: Bench) -> None:
    """Slots that latents 6 to 15 are written to."""
    reading = built(recipe("streamdiffusion-v2", steps=1, threshold=-1, frame=SCENES.frame), SCENES)
    reading.step(latent(0))
    slots, before = [], torch.empty(0)
    for n in range(2, 16):
        reading.step(latent(n))
        index = reading.state.state_dict()["tables.0.index"][0, 0, :: SCENES.frame] // SCENES.frame
        slots += [int((index != before).nonzero()[0, 0])] if n >= 6 else []
        before = index
    expected = [3 + n % 3 for n in range(10)]
    bench.row(
        "slots that latents 6 to 15 go to", ", ".join(map(str, expected)), ", ".join(map(str, slots)), slots == expected
    )


def refresh(bench: Bench) -> None:
    """The same latent again and again: how much what it reads changes from one call to the next, around latent 50."""
    for t_reset in (50, None):
        reading = built(recipe("streamdiffusion-v2", steps=1, t_reset=t_reset, frame=SCENES.frame), SCENES)
        reading.step(latent(0))
        same, jumps, last = SCENES.step(2, 1), [], None
        for _ in range(2, 60):
            out = torch.cat(reading.step(same), -1)
            jumps.append(0.0 if last is None else float((out - last).norm() / out.norm()))
            last = out
        usual, at = max(jumps[20:46]), jumps[48]
        bench.row(
            "change of what a latent reads at latent 50, before it at most: "
            + ("set back to 5" if t_reset else "placed by age"),
            "a jump" if t_reset else "none", f"{at:.1e}, {usual:.1e}", None if t_reset else at < 1e-5,
            "the card's pitfall, and its way out" if t_reset else "",
        )  # fmt: skip


def copies(bench: Bench) -> None:
    """Bytes of a cache for each denoising step."""
    sizes = []
    for steps in (1, 2, 4):
        reading = built(recipe("streamdiffusion-v2", steps=steps, frame=SCENES.frame), SCENES)
        for n in (0, *range(2, 20)):
            step = latent(n)
            wide = tuple(
                (q.repeat(steps, 1, 1, 1), k.repeat(steps, 1, 1, 1), v.repeat(steps, 1, 1, 1))
                for q, k, v in step.layers
            )
            reading.step(Step(wide, step.tags))
            sizes += [reading.state.nbytes] if n in (10, 19) else []
    flat = sizes[::2] == sizes[1::2]
    bench.row(
        "bytes of 2 and of 4 copies over those of one", "2 and 4", f"×{sizes[2] / sizes[0]:.2f} and ×{sizes[4] / sizes[0]:.2f}",
        flat and abs(sizes[4] / sizes[0] - 4) < 0.1, "as after 10 latents so after 19" if flat else "growing",
    )  # fmt: skip


# -- LiveAct -------------------------------------------------------------------------------------------------------

SLOTS = 14  # latents that a block sees, itself among them


@claim("liveact")
def liveact(bench: Bench) -> None:
    """What has left the window can still be read, a fifth of it after each block, at constant size."""
    impulse(bench, 12)
    long_ago(bench, 12)
    constant(bench, 200 if bench.full else 60)


def even(state: MemoryState, count: int, value: float, where: int | None = None) -> float:
    """A block of `count` latents, one of which shows `value` (None: all); what an even look at all slots gets, summed."""
    v = torch.zeros(1, HEADS, count * SMALL, DIM, dtype=torch.float64)
    v[:, :, slice(None) if where is None else slice(where * SMALL, (where + 1) * SMALL)] = value
    with state.step(count * SMALL, row=0 if state.memory.rows > 1 else None):
        out = state.attend(0, torch.zeros_like(v), torch.zeros_like(v), v)
    return float(out.mean()) * SLOTS


def impulse(bench: Bench, blocks: int) -> None:
    """One latent of a block shows something: how much of it an even look gets, block by block."""
    most = []
    for where in range(8):
        state = small(recipe("liveact", steps=1, frame=SMALL))
        even(state, 6, 0.0)
        even(state, 8, 1.0, where)
        most.append([even(state, 8, 0.0) for _ in range(blocks)])
    late = [max(share[k] for share in most) for k in range(blocks)]
    # The last two latents are held for a block more before they are compressed for the first time.
    bound = max(max(most[where][k] * 5 ** (k + 1 - (where > 5)) for k in range(blocks)) for where in range(8))
    bench.row(
        f"an impulse after k compressions, times 5 to the k, at most over {blocks} blocks", "≤ 1", f"{bound:.6f}",
        bound <= 1 + 1e-9,
    )  # fmt: skip
    least = min(share[-1] / share[-2] for share in most)
    bench.row(
        "share that is left from one block to the next, at the end",
        "about 1/5",
        f"{least:.3f}",
        abs(least - 0.2) < 1e-6,
    )
    bench.figures["an impulse in an even look over blocks|x|liveact"] = [float(k + 1) for k in range(blocks)]
    bench.figures["an impulse in an even look over blocks|y|liveact"] = late


def long_ago(bench: Bench, blocks: int) -> None:
    """A block that differs from all later ones: is anything left of it, with the same 14 latents in view?"""
    memories = {
        "liveact": recipe("liveact", steps=1, frame=SMALL),
        "plain window": recipe("self-forcing", window=SLOTS, frame=SMALL),
    }
    for name, memory in memories.items():
        state = small(memory)
        even(state, 6, 0.0)
        even(state, 8, 1.0)
        shares = [even(state, 8, 0.0) for _ in range(blocks)]
        for k in (1, 3):
            ours = name == "liveact"
            bench.row(
                f"what an even look gets of a block of ones, {k + 1} blocks later: {name}",
                "something" if ours else "0", f"{shares[k]:.4f}", shares[k] > 0.1**k if ours else None, "summed over 14 latents",
            )  # fmt: skip
    stream = Frames(needle_every=1)
    needle = stream.needle("detail", 8)
    for name, memory in {
        "liveact": recipe("liveact", steps=1, frame=stream.frame),
        "plain window": recipe("self-forcing", window=SLOTS, frame=stream.frame),
    }.items():
        reading = built(memory, stream)
        reading.step(stream.step(0, 6))
        got = []
        for n in range(3):
            got.append(stream.recalled(needle, reading.ask(stream.question(6 + 8 * n, 8, needle))))
            reading.step(stream.step(6 + 8 * n, 8))
        got.append(stream.recalled(needle, reading.ask(stream.question(30, 8, needle))))
        bench.row(
            f"recall by a question for a detail of a block, one and two blocks after it: {name}", "–",
            f"{got[2]:.3f} and {got[3]:.3f}", None,
            "a fifth of a key is not found by a softmax that is as sharp as for a whole one" if name == "liveact" else "",
        )  # fmt: skip


def constant(bench: Bench, blocks: int) -> None:
    """Bytes and time of a block, for each of three steps one call, early and late."""
    stream = Frames(frame=16, needle_every=1000, layers=1)
    reading = built(recipe("liveact", frame=stream.frame), stream)
    sizes, took = [], []
    for n in range(blocks):
        block = stream.step(n % 4 * 8, 8 if n else 6)
        start = time.perf_counter()
        for row in range(3):
            with reading.state.step(block.m, tags=block.tags, row=row):
                reading.state.attend(0, *block.layers[0])
        took.append(time.perf_counter() - start)
        sizes.append(reading.state.nbytes)
    slower = median(took[-20:]) / median(took[5:25])
    bench.row(
        f"bytes after {blocks} blocks over those after 2", "1", f"×{sizes[-1] / sizes[1]:.2f}", sizes[-1] == sizes[1]
    )
    bench.row("time of a block there, three calls", "1 ± 10 %", f"×{slower:.2f}", slower < 1.15)
