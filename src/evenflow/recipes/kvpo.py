"""KVPO: LongLive's window over a longer history, of which branches that are to differ attend other parts."""

from ..memory import Absolute, Memory, Oldest, Rerouted
from .registry import register


@register(
    "kvpo",
    paper="KVPO: ODE-Native GRPO for Autoregressive Video Alignment via KV Semantic Exploration, arXiv 2605.14278",
    claims=("kvpo",),
)
def kvpo(
    *, window: int = 12, sink: int = 3, physical: int = 33, nearest: int = 4, blocks: int = 5, branches: int = 8,
    seed: int = 0, chunk: int = 3, frame: int | None = None,
) -> Memory:  # fmt: skip
    """The first `sink` frames and the newest that make `window` with them are attended; `physical` frames are held.

    Steps with the tag `route` (`memory.recall.route(branch, block)`, for `blocks` steps from a fork on) see, instead of
    all recent frames, the `nearest` ones, those of the step among them, and older ones drawn from what is held: as many
    in all. Give the tag with all calls of a chunk. Without it, in deployment, this is LongLive with the chunk in the
    window. Group-relative training takes `branches` forks (or rows) of one history and one without a tag, all with the
    same noise; replays for its likelihood go without a tag too, from a fork kept since, which no branch changes. Where
    to fork: `fork_starts`, `drawn_fork`.

    Routed frames are not copied, as the paper's are: all that a route may choose stays until its last step, unchanged,
    at its own place in time. So 33 frames are held between the steps, and the frames of the step come on top.
    """
    if window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    if physical < window:
        raise ValueError(f"physical is {physical}; all {window} frames that are attended are held")
    return Memory(
        sink=sink, window=physical - sink, evict=Oldest(),
        recall=Rerouted(window - sink, nearest, blocks, branches, seed),
        place=Absolute(), frame=frame, chunk=chunk, inside="both",
    )  # fmt: skip
