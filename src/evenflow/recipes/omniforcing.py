"""OmniForcing: video and audio of one clock, which read each other and forget together."""

from ..memory import Linked
from .registry import register


@register(
    "omniforcing",
    paper="OmniForcing: Unleashing Real-time Joint Audio-Visual Generation, arXiv 2603.11647",
    claims=("omniforcing",),
)
def omniforcing(
    *, window: int = 5, sinks: int = 16, first: tuple[int, int] = (1, 1), grid: tuple[int, int] = (16, 24),
    horizon: int | None = None,
) -> Linked:  # fmt: skip
    """Block 0 with its sink tokens, and the newest `window` seconds, of both modalities.

    first: latents of video and audio in block 0; grid: rows and columns of tokens in a video latent. How many seconds are
    kept the paper does not say. horizon: for streams longer than the model was trained on, see `Linked`.
    """
    return Linked(window=window, sinks=sinks, first=first, grid=grid, horizon=horizon)
