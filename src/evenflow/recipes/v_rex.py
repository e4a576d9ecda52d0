"""V-Rex: everything that was read, in clusters of alike keys off the device; each query takes what holds its attention."""

from __future__ import annotations

from ..memory import Absolute, Clustered, Memory, UntilMass
from ..memory.mass import Weights
from .registry import register


@register(
    "v-rex",
    paper="V-Rex: Real-Time Streaming Video LLM Acceleration via Dynamic KV Cache Retrieval, HPCA 2026, arXiv 2512.12284",
    claims=("v-rex", "recall-trained"),
)
def v_rex(
    *, window: int = 1024, n_hp: int = 32, th_hd: int = 7, th_r: float = 0.3, seed: int = 0, per_head: bool = False,
    union: bool = False, weights: Weights = "exp", unrotated: bool = False, page: int = 16,
    ram_bytes: int | None = None, disk: str | None = None, disk_bytes: int | None = None, device_bytes: int = 0,
) -> Memory:  # fmt: skip
    """The last `window` tokens, and of all older ones the clusters of keys that hold `th_r` of a query's attention.

    Every token joins a cluster when it arrives (ReSV, stage A): `n_hp` random hyperplanes, drawn from `seed`, give its
    rotated key as many bits, and it joins the nearest cluster that differs in fewer than `th_hd`, or opens one. A cluster
    keeps the bits of its first member, the mean key and the count; keys and values themselves are never changed. What
    leaves the window, the device's maximum, goes into its cluster's pages of `page` tokens in RAM (`ram_bytes`, None for
    no limit), from there on to `disk`.

    Each query takes clusters by its score with their mean keys, best first, until they hold `th_r` of the sum over all
    (WiCSum, stage B), and attends their tokens, what is in the window, and the fresh tokens before it (stage C). In every
    step, of many tokens or of one; th_r=1 is full attention, th_hd=0 chooses token by token. A query counts what came
    before it and has what it took itself, so that any cut gives the same; `union` is the paper's way: a step is a frame,
    which is clustered before it is scored, and what one of its queries takes all see that share a key head.

    The table on the device grows with what is new in the stream (1.67 % of a bfloat16 cache at 32 tokens a cluster, with
    the members' numbers, which are in RAM here): scene cuts make clusters of one. Ours, where the paper is silent: the
    heads' keys are clustered as one vector, from the size of its table (`per_head` clusters each key head's); the window
    is attended always; the weight of a score s is e^s, as raw scores may be negative ("shifted": s above the least one).
    Left out: fetching for the next layer ahead, which is approximate, and the paper's hardware. There is no public code.
    """
    if n_hp < 1 or not 0 <= th_hd <= n_hp + 1:
        raise ValueError(f"n_hp is {n_hp}, th_hd {th_hd}; take 1 bit or more, and th_hd from 0 to n_hp + 1")
    if not th_r > 0 or weights not in ("exp", "shifted"):
        raise ValueError(f"th_r is {th_r}, weights {weights!r}; take a share above 0, and 'exp' or 'shifted'")
    return Memory(
        window=window,
        fold=Clustered(th_hd, n_hp, seed, per_head, unrotated, page, ram_bytes, disk, disk_bytes, device_bytes),
        recall=UntilMass(th_r, weights, union),
        place=Absolute(),
    )
