"""Self-Forcing: the last frames of a video that is generated chunk by chunk; what other video memories start from."""

from ..memory import Absolute, Memory, Oldest
from .registry import register


@register(
    "self-forcing",
    paper="Self Forcing: Bridging the Train-Test Gap in Autoregressive Video Diffusion, arXiv 2506.08009",
    claims=("self-forcing",),
)
def self_forcing(*, window: int | None = 21, sink: int = 0, chunk: int = 3, frame: int | None = None) -> Memory:
    """The last `window` frames, the chunk being generated among them, at their times in the stream.

    A chunk (3 latent frames, or 1) is seen by itself both ways and by every later chunk. Its denoising passes are steps
    with commit=False, the clean pass is the one that is kept; the oldest frames leave once a chunk, before its first
    pass. window = 21 is what the released model was trained on (32 760 tokens); None keeps every frame. sink: first
    frames that never leave, counted in the window; 0 in the paper, which its code allows.

    The official no-window cache ends at 21 frames and the rotary table at 1024; here neither bound exists.
    """
    if window is not None and window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    return Memory(
        sink=sink if window is not None else 0,
        window=None if window is None else window - sink,
        evict=Oldest(with_fresh=True),
        place=Absolute(),
        frame=frame,
        chunk=chunk,
        inside="both",
    )
