"""What is let in of real films, before any memory: how much, what is lost by it, what it costs, and what cuts do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..media.video import read_frames
from ..memory.admission import LOW, Curvature, Novelty, Salient, SimilarFrames, TokenDrop, Verdict
from ..world.film import film
from .choosing import in_turns, off, random, ratio
from .registry import Bench, claim

SIDE, PATCH, AREAS = 224, 16, 4  # pixels of a frame and of a token's patch; areas of a patch each way
ROWS = SIDE // PATCH
SENSOR = 2 / 255  # deviation of a pixel of a camera at rest
APART = 0.05  # mean difference from which on a token counts as changed, of a range of 1


@dataclass(frozen=True, eq=False)
class Film:
    """pixels: float32 [n, SIDE, SIDE, 3] about mid-grey, −0.5 to 0.5. cuts: frames at which another shot begins."""

    name: str
    pixels: Tensor
    cuts: tuple[int, ...] = ()


def films(limit: int) -> list[Film]:
    """The first frames of the clips in $EVENFLOW_DATA/video, else of films of the synthetic world."""
    folder = Path(os.environ.get("EVENFLOW_DATA", "")) / "video"
    paths = sorted(folder.glob("*.mp4")) if os.environ.get("EVENFLOW_DATA") else []
    shot = [(path.stem, np.stack(list(read_frames(path, (SIDE, SIDE), limit=limit)))) for path in paths]
    if not shot:
        shot = [(f"film {n}", film(n, frames=min(limit, 96), size=SIDE, truth=False).pixels) for n in range(3)]
    made = [(name, torch.from_numpy(frames).float() / 255 - 0.5) for name, frames in shot]
    return [Film(name, pixels, tuple(sharp_cuts(pixels))) for name, pixels in made]


def sharp_cuts(pixels: Tensor) -> Iterator[int]:
    """Frames that differ from the one before more than three times as much as any of six beside them do."""
    change = (pixels[1:] - pixels[:-1]).abs().mean((1, 2, 3))
    for t in range(3, len(change) - 3):
        beside = torch.cat([change[t - 3 : t], change[t + 1 : t + 4]])
        if change[t] > max(3 * float(beside.max()), 0.02):
            yield t + 1


def spliced(shot: Sequence[Film]) -> list[Film]:
    """Every film cut to the next, at frame 60 or where it ends."""
    parts = [(a, b, a.pixels[:60]) for a, b in zip(shot, [*shot[1:], shot[0]], strict=True)]
    return [Film(f"{a.name} to {b.name}", torch.cat([head, b.pixels[-30:]]), (len(head),)) for a, b, head in parts]


def patches(pixels: Tensor) -> Tensor:
    """Frames [n, SIDE, SIDE, 3] as tokens [n, 196, 48]: the colours of 4 × 4 areas of each patch."""
    size = PATCH // AREAS
    cut = pixels.unflatten(2, (ROWS, AREAS, size)).unflatten(1, (ROWS, AREAS, size))
    return cut.mean((3, 6)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def features(pixels: Tensor) -> Tensor:
    """The same about the mean patch of each frame, so that likeness is of what is to be seen, not of how light it is."""
    seen = patches(pixels)
    return seen - seen.mean(1, keepdim=True)


def thumbnail(pixels: Tensor) -> Tensor:
    """One feature a frame, [n, 588]: the mean colour of every patch, about that of the frame."""
    small = patches(pixels).unflatten(2, (-1, 3)).mean(2)
    return (small - small.mean(1, keepdim=True)).flatten(1)


@dataclass(frozen=True)
class Case:
    """An admission, what it is given, what a frame is rebuilt from, and what its paper says of how much it keeps."""

    admission: Any
    given: Any
    seen: Any = patches
    paper: str = "–"
    why: str = ""  # where it does not keep best what a film looks like
    rest: str = ""  # where it does not drop most of a scene at rest


TURNS = "it looks for turns, not for what is far"
FOLLOWS = "thresholds follow the scene, so some noise is always over them, and no change at all equals its mean"
LOST = "against the frame before, what changes little by little is dropped for ever"
CASES = {
    "tokens, τ 0.25": Case(TokenDrop(0.25), features, features, "15 % at a frame a second", LOST),
    "tokens, τ 0.5": Case(TokenDrop(0.5), features, features, "55 % at a frame a second", LOST),
    "tokens, τ 0.9": Case(TokenDrop(0.9), features, features, why=LOST),
    "tokens, τ 0.9, last kept": Case(TokenDrop(0.9, reference="last_kept"), features, features),
    "tokens, pixels": Case(TokenDrop(APART, by="pixels"), patches, why=LOST),
    "tokens, pixels, last kept": Case(TokenDrop(APART, by="pixels", reference="last_kept"), patches),
    "salient": Case(Salient(), features, features, "25 %", "it looks for what stands out", "a share, whatever comes"),
    "curvature": Case(Curvature(), thumbnail, paper="10 to 20 frames", why=TURNS, rest=FOLLOWS),
    "curvature, guarded": Case(Curvature(eps_noise=0.02), thumbnail, why=TURNS),
    "similar frames": Case(SimilarFrames(), partial(torch.flatten, start_dim=1), paper="42 to 50 % of the energy"),
}


def judged(case: Case, pixels: Tensor) -> Verdict:
    """What an admission says of a film."""
    verdict: Verdict = case.admission.step(case.given(pixels), case.admission.start())[0]
    return verdict


def share(verdict: Verdict) -> float:
    """What part of all tokens gets in; those of a frame in low resolution are a quarter."""
    return float(verdict.keep.float().mean() - 0.75 * (verdict.resolution == LOW).float().mean())


def held(seen: Tensor, verdict: Verdict) -> Tensor:
    """What is known of every place after each frame, [n, tokens, 48]: its token that got in last, coarse if that was so,
    0 where none did."""
    coarse = seen.unflatten(2, (AREAS // 2, 2, AREAS // 2, 2, 3)).mean((3, 5), keepdim=True)
    coarse = coarse.expand(-1, -1, -1, 2, -1, 2, -1).flatten(2)
    keep = verdict.keep.view(len(seen), -1).expand(-1, seen.shape[1])
    latest = torch.where(keep, torch.arange(len(seen))[:, None], -1).cummax(0).values
    shown = torch.where((verdict.resolution == LOW)[:, None, None], coarse, seen)
    known = shown.gather(0, latest.clamp_min(0)[..., None].expand_as(seen))
    return torch.where((latest < 0)[..., None], 0, known)


def in_turn(like: Verdict) -> Verdict:
    """As many tokens without looking: places, or whole frames, get in one after the other, and the first frame whole."""
    size = like.keep[0].numel()
    place = (torch.arange(size) / size + torch.arange(len(like.keep))[:, None]).double() * share(like)
    keep = (place + share(like)).floor() > place.floor()
    keep[0] = True
    return Verdict.of(keep if like.keep.ndim > 1 else keep[:, 0])


@claim("admission")
def admission(bench: Bench) -> None:
    """Most tokens of a film repeat what was there: dropped before any memory they are hardly missed, and cuts get in."""
    shot = films(10_000 if bench.full else 250)
    cut = spliced(shot)
    bench.say(f"films: {', '.join(one.name for one in shot)}")
    for name, case in CASES.items():
        kept(bench, name, case, shot)
        at_rest(bench, name, case, shot)
        at_cuts(bench, name, case, cut, shot)
    triggers(bench, cut)
    drift(bench, cut)
    prefill(bench, shot[0])


def kept(bench: Bench, name: str, case: Case, shot: Sequence[Film]) -> None:
    """How much gets in, how far what is held is off, and how long it takes."""
    shares, slow, errors, turns = [], [], [], []
    for one in shot:
        seen, verdict = case.seen(one.pixels), judged(case, one.pixels)
        shares.append(share(verdict))
        slow.append(share(judged(case, one.pixels[::25])))
        errors.append(off(held(seen, verdict), seen))
        turns.append(off(held(seen, in_turn(verdict)), seen))
    bench.row(
        f"kept: {name}", case.paper, f"{mean(shares):.1%}; {mean(slow):.0%} of every 25th frame", None,
        ", ".join(f"{one.name} {part:.1%}" for one, part in zip(shot, shares, strict=True))
        + f"; {milliseconds(case, shot[0]):.2f} ms a frame",
    )  # fmt: skip
    less = mean(errors) / mean(turns)
    bench.row(
        f"error of what is held over that of as many tokens in turn: {name}", "< 1", f"{less:.2f}", less < 1,
        f"{mean(errors):.3f} over {mean(turns):.3f}" + (f"; {case.why}" if less >= 1 else ""),
    )  # fmt: skip


def milliseconds(case: Case, one: Film, turns: int = 60) -> float:
    """Of judging a frame when it comes, without making what is judged: a median."""
    took, state = [], case.admission.start()
    for item in case.given(one.pixels[:turns]):
        start = time.perf_counter()
        _, state = case.admission.step(item[None], state)
        took.append(1e3 * (time.perf_counter() - start))
    return median(took)


def at_rest(bench: Bench, name: str, case: Case, shot: Sequence[Film], frames: int = 100) -> None:
    """The first picture of every film by a camera at rest, whose sensor is noisy."""
    made = random(0, "sensor")
    first = [one.pixels[:1].expand(frames, -1, -1, -1) for one in shot]
    noisy = [picture + SENSOR * torch.randn(picture.shape, generator=made) for picture in first]
    dropped, equal = (1 - mean(share(judged(case, scene)) for scene in scenes) for scenes in (noisy, first))
    bench.row(
        f"dropped of a scene at rest: {name}", "≥ 80 %", f"{dropped:.1%}", dropped >= 0.8,
        f"{equal:.0%} where its frames are equal" + (f"; {case.rest}" if dropped < 0.8 else ""),
    )  # fmt: skip


def at_cuts(bench: Bench, name: str, case: Case, cut: Sequence[Film], shot: Sequence[Film]) -> None:
    """Of what a cut has changed, how much gets in with the first frame after it; from film to film, and within films."""
    found: list[list[float]] = [[], []]
    for number, some in enumerate((cut, shot)):
        for one in some:
            if one.cuts:
                seen, keep = patches(one.pixels), judged(case, one.pixels).keep.view(len(one.pixels), -1)
                for at in one.cuts:
                    changed = (seen[at] - seen[at - 1]).abs().mean(-1) >= APART
                    found[number].append(float(keep[at].expand(len(changed))[changed].float().mean()))
    whole = mean(found[0])
    within = f"; {mean(found[1]):.1%} at {len(found[1])} cuts within films" if found[1] else ""
    bench.row(
        f"changed tokens let in at the first frame after a cut: {name}", "all", f"{whole:.1%}", whole >= 0.99,
        f"{len(cut)} cuts from film to film{within}" + (f"; {case.rest or 'the others are like enough by chance'}" if whole < 0.99 else ""),
    )  # fmt: skip


def triggers(bench: Bench, cut: Sequence[Film]) -> None:
    """The gate that speaks where less than 60 % of the tokens are dropped."""
    for name in ("tokens, τ 0.25", "tokens, τ 0.9"):
        met, others, count = 0, 0, 0
        for one in cut:
            speak = Novelty().step(judged(CASES[name], one.pixels).novelty)[0]
            met += int(speak[one.cuts[0]])
            others += int(speak[1:].sum()) - int(speak[one.cuts[0]])
            count += len(speak) - 2
        bench.row(
            f"cuts at which less than 60 % is dropped: {name}", "all", f"{met} of {len(cut)}", met == len(cut),
            f"and {others} of {count:,} other frames, cuts within films among them",
        )  # fmt: skip


def drift(bench: Bench, cut: Sequence[Film], frames: int = 250) -> None:
    """One picture that turns into another so slowly that no two frames differ by much."""
    part = torch.linspace(0, 1, frames)[:, None, None, None]
    for name in ("tokens, pixels", "tokens, pixels, last kept"):
        worst, shares, ours = [], [], name.endswith("kept")
        for one in cut:
            pixels = (1 - part) * one.pixels[0] + part * one.pixels[-1]
            seen, verdict = patches(pixels), judged(CASES[name], pixels)
            worst.append(float((held(seen, verdict)[-1] - seen[-1]).abs().mean(-1).max()))
            shares.append(share(verdict))
        bench.row(
            f"most that a token is off at the end of a slow fade: {name}", f"< {APART}" if ours else "–", f"{max(worst):.4f}",
            max(worst) < APART if ours else None, f"{mean(shares):.1%} kept of {frames} frames" + ("" if ours else "; " + LOST),
        )  # fmt: skip


def prefill(bench: Bench, one: Film, slices: int = 8, width: int = 512) -> None:
    """Two layers of a language model's shape read all tokens, or those that get in when 81 % of a slice is dropped."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True, norm_first=True)
    network, drop = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), TokenDrop(share=0.81)
    given = features(one.pixels[:slices])
    given = given @ torch.randn(given.shape[-1], width, generator=random(0, "prefill"))

    @torch.no_grad()
    def read(select: bool) -> None:
        keep = drop.step(given, drop.start())[0].keep if select else torch.ones(given.shape[:2], dtype=torch.bool)
        x = given[keep][None]
        network(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)

    seconds = in_turns({"all": partial(read, False), "some": partial(read, True)}, 5)
    faster, part = ratio(seconds, "all", "some"), share(drop.step(given, drop.start())[0])
    bench.row(
        "reading all tokens over dropping and reading the rest", "×1.76 at 81 % dropped", f"×{faster:.2f}", faster > 1.5,
        f"{slices} slices of {given.shape[1]} tokens, of which the first is kept whole: {part:.0%}; the paper's has an encoder in it",
    )  # fmt: skip
