"""What is no single list of keys, compared: a table for every kind of recipe, on one stream a kind, beside what one would
use instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..memory import Decoupled, Gapped, Interleaved, Linked, Mixed, Overlapped, packed_positions
from ..memory.admission import Curvature, Door, SimilarFrames, TokenDrop, Whole
from ..memory.composition import Kind
from ..memory.fast_weights import FastWeights
from ..memory.features import Flash, pooled
from ..recipes import recipe, recipes
from ..world.film import film
from .admission import SENSOR, SIDE, Film, features, held, in_turn, patches, share, thumbnail
from .choosing import in_turns, off, random, ratio
from .features import shown
from .lanes import finished, opened, speak, unit, watch
from .linking import Naive, attended, built, drawn

Say = Callable[[str], None]


@dataclass(frozen=True)
class Section:
    """One table: a heading, the names of its columns, a row of text a recipe, and how to read it."""

    kind: Kind
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    told: str


def sections(names: Sequence[str] = (), say: Say = lambda text: None, quick: bool = False) -> list[Section]:
    """The tables that recipes `names` belong to (none: all of them). quick: small sizes, a trial of the program."""
    kinds = {info.name: info.kind for info in recipes()}
    asked = {kinds[name] for name in names} if names else {*MEASURE}
    found = []
    for kind, measure in MEASURE.items():
        if kind in asked:
            found.append(measure(quick))
            say(f"{found[-1].title}: {len(found[-1].rows)} rows")
    return found


# -- doors -----------------------------------------------------------------------------------------------------------


def seen_by(door: Door) -> Callable[[Tensor], Tensor]:
    """What a door judges of the pixels of a film."""
    if isinstance(door.lets, Curvature):
        return thumbnail
    if isinstance(door.lets, (SimilarFrames, Whole)):
        return partial(torch.flatten, start_dim=1)
    return patches if isinstance(door.lets, TokenDrop) and door.lets.by == "pixels" else features


def doors(quick: bool) -> Section:
    """Films of the synthetic world, a scene at rest, and cuts from film to film."""
    frames, count = (24, 2) if quick else (96, 3)
    made = [film(n, frames=frames, size=SIDE, truth=False).pixels for n in range(count)]
    films = [Film(f"film {n}", torch.from_numpy(one).float() / 255 - 0.5) for n, one in enumerate(made)]
    cut = [torch.cat([a.pixels[-20:], b.pixels[:4]]) for a, b in zip(films, [*films[1:], films[0]], strict=True)]
    sensor = random(0, "sensor")
    still = [one.pixels[:1].expand(40, -1, -1, -1) for one in films]
    still = [one + SENSOR * torch.randn(one.shape, generator=sensor) for one in still]
    given: list[tuple[str, dict[str, Any]]] = [
        ("timechat-online", {}), ("timechat-online", {"threshold": 0.05, "by": "pixels", "reference": "last_kept"}),
        ("curve-stream", {}), ("curve-stream", {"eps_noise": 0.02}), ("stc", {}), ("streamdiffusion", {}), ("videollm-online", {}),
    ]  # fmt: skip
    rows = []
    for name, how in given:
        door = recipe(name, **how)
        look = seen_by(door)

        def judged(pixels: Tensor, door: Door = door, look: Callable[[Tensor], Tensor] = look) -> Any:
            return door.lets.step(look(pixels), door.lets.start())[0]

        verdicts = [judged(one.pixels) for one in films]
        seen = [patches(one.pixels) for one in films]
        errors = [off(held(x, v), x) for x, v in zip(seen, verdicts, strict=True)]
        turns = [off(held(x, in_turn(v)), x) for x, v in zip(seen, verdicts, strict=True)]
        rest = 1 - mean(share(judged(one)) for one in still)
        entered, spoken, unasked = [], 0, 0
        for one in cut:
            verdict, before = judged(one), patches(one)
            changed = (before[20] - before[19]).abs().mean(-1) >= 0.05
            entered.append(float(verdict.keep.view(len(one), -1)[20].expand(len(changed))[changed].float().mean()))
            if door.speaks is not None and door.speaks.asks == "novelty":
                said = door.speaks.step(verdict.novelty)[0]
                spoken, unasked = spoken + int(said[20]), unasked + int(said[1:].sum()) - int(said[20])
        took, state = [], door.lets.start()
        for item in look(films[0].pixels[:24]):
            start = time.perf_counter()
            _, state = door.lets.step(item[None], state)
            took.append(time.perf_counter() - start)
        told = (
            f"{spoken} of {len(cut)}, {unasked} others"
            if door.speaks is not None and door.speaks.asks == "novelty"
            else "–"
        )
        less = f"{mean(errors) / mean(turns):.2f}" if mean(turns) else "–"
        rows.append(
            (name + (f"({', '.join(f'{key}={value!r}' for key, value in how.items())})" if how else ""), f"{mean(map(share, verdicts)):.0%}", f"{rest:.0%}", f"{mean(entered):.0%}", less,
             told, f"{1e3 * median(took):.2f}")
        )  # fmt: skip
    return Section(
        "door", "Doors before a memory",
        ("door", "kept of films", "dropped at rest", "of a cut let in", "error / in turn", "speaks at cuts", "ms a frame"), tuple(rows),
        f"{count} films of the synthetic world, {frames} frames each; a picture at rest with the noise of a sensor; cuts from film to "
        "film. Error: of what is held of every place, over that of as many tokens let in one after the other. A gate that "
        "asks the model is not asked here.",
    )  # fmt: skip


# -- lanes -----------------------------------------------------------------------------------------------------------


def lanes(quick: bool) -> Section:
    """A clip of 12 s at 5 units a second, of 4 tokens each, of which three words are said."""
    units, cost = (12, 0.31) if quick else (60, 0.31)
    arrive = [(n + 1) / 5 for n in range(units)]
    named = [(f"speak-while-watching(scheme={name!r})", place) for name, place in
             (("interleaved", Interleaved()), ("overlapped", Overlapped()), ("decoupled", Decoupled()), ("gap", Gapped()))]  # fmt: skip
    named += [(name, recipe(name).place) for name in ("tays", "think-while-watching")]
    rows = []
    for name, place in named:
        ends = finished(place, arrive, [0.36 * cost] * units, [0.64 * cost] * units)[1]
        waits = sum(place.said_before(number) > 0 for number in range(units))
        before, after = (packed_positions(place, [[4]] * units, [words, *[3] * (units - 1)]) for words in (3, 6))
        moved = float((before[0] != after[0]).any(-1).float().mean())
        largest = max(int(part.max()) for part in before)
        state = opened(place)
        for number in range(8):
            watch(state, number, unit(number, 4, "seen"))
            speak(state, number, unit(number, 3, "said"))
        rows.append(
            (
                name,
                f"{ends[-1] - arrive[-1]:.2f}",
                f"{waits} of {units}",
                f"{moved:.0%}",
                f"{largest:,}",
                f"{state.nbytes / 1e3:,.0f}",
            )
        )
    return Section(
        "lanes", "Two lanes", ("recipe", "s late at the end", "units that wait for words", "moved by words", "largest position", "held, kB"),
        tuple(rows),
        f"A clip of {arrive[-1]:.0f} s at 5 units a second, {cost} s to read a unit and say three words of it, simulated event by "
        "event. Moved: positions of what was seen that change when three words more are said of the first unit.",
    )  # fmt: skip


# -- mixed -----------------------------------------------------------------------------------------------------------

AGES = (4, 16, 64, 256, 1024)
HEADS, DIM = 4, 64
SHARP = 24 * DIM**0.5  # by which a query finds its key among thousands


def mixed(quick: bool) -> Section:
    """Pairs of random keys and values; what a query with an old key gets of its value, by age, from each part of a layer."""
    ages, window = (AGES[:4], 32) if quick else (AGES, 64)
    pairs, made = ages[-1] + 1, random(0, "pairs")
    keys = normalize(torch.randn(1, HEADS, pairs, DIM, generator=made), dim=-1)
    values = torch.randn(1, HEADS, pairs, DIM, generator=made)
    near = recipe("window", window=window - 1)
    shapes = {
        "infinite-vl": recipe("infinite-vl", window=window, kernel=1, ratio=1),
        "spatial-ttt": recipe("spatial-ttt", window=window, chunk=window, ratio=1),
        "window alone": Mixed(pattern=((near,),)), "everything (full)": Mixed(pattern=((recipe("full"),),)),
    }  # fmt: skip
    rows = []
    for name, shape in shapes.items():
        layers = len(shape.pattern)
        start = {
            n: tuple(torch.randn(HEADS, DIM, DIM, generator=made) / DIM**0.5 for _ in range(3)) for n in range(layers)
        }
        state = shape.build(layers=layers, heads=HEADS, head_dim=DIM, rope=None, first=start)

        def step(state: Any, query: Tensor, at: slice, commit: bool) -> dict[tuple[int, str], Tensor]:
            out, m = {}, query.shape[2]
            with state.step(m, commit=commit) as taken:
                for layer in range(state.geometry.layers):
                    if layer in state.places:
                        out[layer, "window"] = taken.attend(layer, query * SHARP, keys[:, :, at], values[:, :, at])
                    if rule := state.rules.get(layer):
                        ones = query.new_ones(1, HEADS, m)
                        how = {"beta": ones, "g": 0 * ones}
                        if isinstance(rule, FastWeights):
                            how = {"rates": 0.05 * ones[..., None].expand(-1, -1, -1, 3), "momenta": 0 * ones}
                        part = type(rule).__name__
                        out[layer, part] = taken.fold(layer, query, keys[:, :, at], values[:, :, at], **how)
            return out

        for n in range(pairs - 1):
            if n == 2 * window:
                young = state.fork()
            step(state, keys[:, :, n : n + 1], slice(n, n + 1), True)
        last = slice(pairs - 1, pairs)  # what a question brings itself, which it does not look for
        recalls: dict[tuple[int, str], list[float]] = {}
        for age in ages:
            old = pairs - 1 - age
            out = step(state.fork(), keys[:, :, old : old + 1], last, False)
            for at, x in out.items():
                recalls.setdefault(at, []).append(
                    float(cosine_similarity(x[:, :, 0], values[:, :, old], dim=-1).mean())
                )
        query = keys[:, :, last]
        took = in_turns(
            {"late": partial(step, state, query, last, False), "early": partial(step, young, query, last, False)}, 41
        )
        costs = (
            f"{state.nbytes / 1e3:,.0f}",
            f"{1e3 * median(took['late']):.2f}",
            f"{ratio(took, 'late', 'early'):.2f}",
        )
        for (layer, part), found in recalls.items():
            everything = part == "window" and not [p for p in shape.pattern[layer] if getattr(p, "window", None)]
            label = name if len(recalls) == 1 else f"{name}: {'everything' if everything else part}"
            shown_costs = costs if (layer, part) == (0, "window") else ("", "", "")
            rows.append((label, *(f"{x:.2f}" if x >= 0.05 else "·" for x in found), *shown_costs))
    return Section(
        "mixed", "Layers that differ", ("layers", *(str(age) for age in ages), "held, kB", "ms a token", "late/early"), tuple(rows),
        f"Recall of a value by its key's age in tokens (cosine), by each part of a layer of each kind, {HEADS} heads of {DIM} channels, random keys, "
        f"nothing trained, a window of {window}. Costs are of all parts together, late over early in turns with a copy that stayed at {2 * window} tokens. A matrix of "
        f"{DIM} channels cannot hold {ages[-1]:,} unrelated pairs; fast weights begin at random here and learn once every {window} tokens.",
    )  # fmt: skip


# -- features --------------------------------------------------------------------------------------------------------


def summaries(quick: bool) -> Section:
    """One frame a second of 40 places that come back."""
    frames = shown(200 if quick else 2000)
    rows = []
    for name, how in (
        ("version 1", {"version": 1}),
        ("version 2", {"version": 2}),
        ("version 1, as published", {"version": 1, "seed": 0}),
    ):
        made = recipe("flash-vstream", bank=60, details=3, **how)
        if isinstance(made, Flash):
            made = Flash(synopsis=25, details=3, full=(8, 8), bank=60)
        state, sizes = made.build(frames.shape[-1]), list[int]()

        def feed(one: Any, frame: Tensor, both: bool = isinstance(made, Flash)) -> None:
            one.feed(frame[None], *([pooled(frame[None], 4)] if both else []))

        for frame in frames:
            if len(sizes) == len(frames) // 4:
                young = state.fork()
            feed(state, frame)
            sizes.append(state.nbytes)
        coarse, means = pooled(frames, 4).flatten(1), state.summary.mean
        spread = (coarse - coarse.mean(0)).norm(dim=1).mean()
        known = float(torch.cdist(coarse, means).amin(1).mean() / spread)
        read = state.read()
        tokens = len(read.coordinates) if isinstance(made, Flash) else len(read.tokens)
        took = in_turns({"late": partial(feed, state, frames[0]), "early": partial(feed, young, frames[0])}, 41)
        rows.append(
            (f"flash-vstream, {name}", f"{known:.2f}", f"{len(means)}", f"{tokens:,}", f"{1e3 * median(took['late']):.2f}",
             f"{ratio(took, 'late', 'early'):.2f}", f"{sizes[-1] / sizes[len(sizes) // 4]:.2f}")
        )  # fmt: skip
    queue = coarse[-25:]
    rows.append(
        (
            "a queue of the newest",
            f"{float(torch.cdist(coarse, queue).amin(1).mean() / spread):.2f}",
            "25",
            "–",
            "–",
            "–",
            "1.00",
        )
    )
    return Section(
        "features", "Features that become tokens when asked",
        ("memory", "distance", "means", "tokens read", "ms a frame", "late/early", "bytes"), tuple(rows),
        f"{len(frames):,} frames of 40 places that come back. Distance: of all frames to what is held, of the spread; late over early: "
        "a frame now, over one on a copy that stayed at the first quarter, in turns.",
    )  # fmt: skip


# -- linked ----------------------------------------------------------------------------------------------------------


def clocks(quick: bool) -> Section:
    """A second of video and audio, late in a stream, beside caches that are put together."""
    seconds = 12 if quick else 60
    linked = Linked(grid=(4, 6))
    state = built(linked, wide=2)
    rivals = {"caches put together, cut": Naive(state, True), "caches put together, masked": Naive(state, False)}
    prepared = [drawn(state, *linked.tokens(block, linked.latents(block)), 5) for block in (0, 1)]
    sizes: dict[str, int] = {}

    def caches(naive: Naive) -> int:
        return sum(x.nbytes for pair in naive.cache.values() for x in pair)

    for block in range(seconds):
        if block == 8:
            young, sizes = state.fork(), {name: caches(naive) for name, naive in rivals.items()}
            sizes["omniforcing"] = state.nbytes
        attended(state, prepared[block > 0])
        for naive in rivals.values():
            naive.attend(prepared[block > 0], commit=True)
    calls: dict[str, Callable[[], object]] = {
        "omniforcing": partial(attended, state, prepared[1], commit=False), "young": partial(attended, young, prepared[1], commit=False),
    }  # fmt: skip
    calls |= {name: partial(naive.attend, prepared[1], commit=False) for name, naive in rivals.items()}
    took = in_turns(calls, 5 if quick else 41)
    rows = []
    for name in ("omniforcing", *rivals):
        now = state.nbytes if name == "omniforcing" else caches(rivals[name])
        slower = f"{ratio(took, name, 'young'):.2f}" if name == "omniforcing" else "–"
        rows.append((name, f"{now / 1e6:.1f}", f"{now / sizes[name]:.2f}", f"{1e3 * median(took[name]):.1f}", slower))
    return Section(
        "linked", "Two modalities, one clock", ("memory", "held, MB", "bytes late/early", "ms a pass", "late/early"), tuple(rows),
        f"A pass over one second after {seconds} of them, 24 tokens a video latent, a window of 5 s; early: after 8 s.",
    )  # fmt: skip


MEASURE: dict[Kind, Callable[[bool], Section]] = {
    "door": doors, "lanes": lanes, "mixed": mixed, "features": summaries, "linked": clocks,
}  # fmt: skip
