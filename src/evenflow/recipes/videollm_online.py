"""VideoLLM-online: every frame gets in, and after each one token decides between silence and speech."""

from ..memory.admission import Door, OneToken
from .registry import register


@register(
    "videollm-online",
    paper="VideoLLM-online: Online Video Large Language Model for Streaming Video, arXiv 2406.11816",
    claims=("watching",),
)
def videollm_online(*, silent: int = 11, threshold: float = 0.725) -> Door:
    """Silent where the next token is `silent`, with `threshold` probability at least; silence never enters the stream.

    silent: 11 is the comma of Llama 3, which the released model writes between frames; give your model's own. A higher
    threshold speaks more often: 0.5 to 0.8 is what the paper suggests.
    """
    return Door(speaks=OneToken(silent, threshold))
