"""The papers' definitions of what gets in, item by item and number by number in float64."""

import math
import struct
from hashlib import blake2b
from itertools import pairwise

import torch


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    if lengths == 0:
        return float(list(a) == list(b))
    return min(1.0, dot / lengths)


def token_drop(slices, threshold, share, by, reference):
    """Bool per slice and place. slices: [n][tokens][d], or [n][frames][tokens][values]."""
    keeps, before = [], None
    for one in slices.double().tolist():
        framed = slices.ndim == 4
        first, last = (one[0], one[-1]) if framed else (one, one)
        if before is None:
            keep, before = [True] * len(last), list(first)
        else:
            if by == "features":
                likeness = [cosine(a, b) for a, b in zip(before, last, strict=True)]
                keep = [not like > threshold for like in likeness]
            else:
                apart = [sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a) for a, b in zip(before, last, strict=True)]  # fmt: skip
                likeness = [-x for x in apart]
                keep = [not x < threshold for x in apart]
            if share is not None:
                keep = [True] * len(last)
                for i in sorted(range(len(last)), key=lambda i: -likeness[i])[: int(share * len(last))]:
                    keep[i] = False
            for i, token in enumerate(first):
                if reference == "previous" or keep[i]:
                    before[i] = token
        keeps.append(keep)
    return keeps


def curve(features, lam, k1, k2, gamma, warm, eps_noise=0.0, asked=()):
    """State of each frame (0 discard, 1 blurred, 2 clear) and its score; None for frames without one."""
    unit = [[x / math.sqrt(sum(y * y for y in f)) for x in f] for f in features.double().tolist()]
    states, scores, mu, variance = [], [], 0.0, 0.0
    for t, f in enumerate(unit):
        if t < 3:
            states.append(2)
            scores.append(None)
            continue
        one, two, three = unit[t - 2], unit[t - 1], f
        d1 = [b - a for a, b in zip(one, two, strict=True)]
        d2 = [b - a for a, b in zip(two, three, strict=True)]
        motion = 1 - cosine(three, two)
        lengths = [math.sqrt(sum(x * x for x in d)) for d in (d1, d2)]
        still = min(lengths) == 0 or min(lengths) < eps_noise
        score = motion + lam * (0.0 if still else 1 - cosine(d1, d2))
        if t == 3 and warm == "first":
            mu = score
        else:
            mu = gamma * mu + (1 - gamma) * score
            variance = gamma * variance + (1 - gamma) * (score - mu) ** 2
        sigma = math.sqrt(variance)
        routed = 2 if score >= mu + k2 * sigma else 1 if score >= mu + k1 * sigma else 0
        states.append(2 if t in asked else 0 if lengths[1] < eps_noise else routed)
        scores.append(score)
    return states, scores


def similar(frames, threshold, most, seed):
    """Bool per frame, by the filter's own steps."""
    keeps, last, skipped = [], None, 0
    for number, frame in enumerate(frames.double().flatten(1).tolist()):
        if last is None:
            keeps.append(True)
            last = frame
            continue
        like = cosine(last, frame)
        skip = 0.0 if threshold >= 1 else max(0.0, 1 - (1 - like) / (1 - threshold))
        key = int.from_bytes(blake2b(struct.pack("<3q", seed, -2, number), digest_size=8).digest(), "little")
        normal = float(torch.randn(1, generator=torch.Generator().manual_seed(key)))
        uniform = 0.5 * math.erfc(-normal / math.sqrt(2))
        if skip < uniform:
            keeps.append(True)
            last = frame
        elif skipped > most:
            keeps.append(True)
            last, skipped = frame, 0
        else:
            keeps.append(False)
            skipped += 1
    return keeps


def fifo(resolutions, room, costs):
    """Frames that are held after each frame, one list of numbers a frame."""
    held, after = [], []
    for number, resolution in enumerate(resolutions):
        if resolution:
            held.append((number, costs[resolution - 1]))
        while sum(cost for _, cost in held) > room:
            held.pop(0)
        after.append([n for n, _ in held])
    return after


def peaks(novelty, least):
    """Bool per item: whether the one before it, or the run of equal ones that ends there, was over both its sides."""
    spoken = [False]
    for before, now in pairwise(range(len(novelty))):
        first = before
        while first > 0 and novelty[first - 1] == novelty[before]:
            first -= 1
        rose = first == 0 or novelty[first - 1] < novelty[first]
        spoken.append(novelty[now] < novelty[before] and rose and novelty[before] > least)
    return spoken
