"""A small video model with random weights, and networks that know the answer."""

from functools import cache

import numpy as np
import torch

from evenflow.generate import Call, Given, Schedule
from evenflow.generate.engine import Engine
from evenflow.models.video import VideoConfig, VideoTransformer
from evenflow.models.video.codec import TinyCodec
from evenflow.models.video.model import VideoModel
from evenflow.models.video.words import Words

CONFIG = VideoConfig(
    "small", dim=24, ffn_dim=32, heads=2, layers=2, in_channels=48, text_dim=16, text_len=8, freq_dim=16, shift=3.0,
    stride=(4, 4, 4), size=(16, 16),
)  # fmt: skip
SHAPE = (4, 2, 2)


@cache
def small() -> VideoModel:
    """16×16 pixels, 4 tokens a latent frame; weights large enough that text and tracks show in the pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = Words(["a", "red", "blue", "ball", "cube"], dim=16, length=8)
        network, codec = VideoTransformer(CONFIG), TinyCodec(channels=16)
    with torch.no_grad():
        network.patch_embedding.weight[:, 16:] *= 5
    return VideoModel(CONFIG, network.eval(), codec.eval(), words.eval().encode)


def picture(seed: int = 0, count: int | None = None) -> np.ndarray:
    """One picture [16, 16, 3], or a video of `count`."""
    made = np.random.default_rng(seed).integers(0, 256, (count or 1, 16, 16, 3), dtype=np.uint8)
    return made if count else made[0]


class Oracle:
    """The velocity (x − x*)/σ that leads every frame to its own target, or noise to data; counts what it is asked.

    A frame is told from others by `call`, which the test sets, for a network does not know numbers of frames.
    """

    def __init__(self, targets, sigma):
        self.targets, self.sigma, self.frames, self.seen = targets, sigma, (), []

    def __call__(self, x, t, text, attend):
        target = torch.stack([self.targets[frame] for frame in self.frames]).view_as(x)
        self.seen.append((self.frames, t.flatten().tolist(), x))
        sigma = torch.tensor([self.sigma(v) for v in t.flatten().tolist()], dtype=torch.float64).view(*t.shape, 1, 1, 1)
        return torch.where(sigma > 0, (x.double() - target.double()) / sigma.clamp_min(1e-9), 0.0).to(x.dtype)


def drive(engine: Engine, schedule: Schedule, turns: int, given: Given | None = None, end: int | None = None):
    """Latents by frame of so many turns; an `Oracle` is told which frames each call has."""
    emitted: dict[int, torch.Tensor] = {}
    call_of = engine._call

    def told(call: Call, *rest):
        if isinstance(engine.network, Oracle):
            engine.network.frames = call.frames
        made = call_of(call, *rest)
        if call.emit:
            emitted.update(zip(call.emit, made[0], strict=True))
        return made

    engine._call = told
    try:
        for n in range(turns):
            engine.turn(schedule.turn(n, end), schedule.turn(n + 1, end), given or Given(), lambda latents: latents)
    finally:
        del engine._call
    return emitted
