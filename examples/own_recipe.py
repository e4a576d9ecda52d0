"""A memory method of one's own, named in a spec string: python examples/own_recipe.py

TOVA: of what is held, the tokens leave that the last query attended least, in every layer others.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import evenflow as ef
from evenflow.memory import Evict, Geometry, Memory, View
from evenflow.recipes import register

TEXT = "".join(f"Day {day}: the tide came in at {day % 12 + 1}, and the tide went out again.\n" for day in range(1, 21))


@dataclass(frozen=True)
class LeastNoticed(Evict):
    """When more than `window` tokens are held, those leave that the last query attended least, in each layer others."""

    content: ClassVar[bool] = True  # queries and keys decide, so that layers come to hold different tokens

    def serves(self, geometry: Geometry) -> None:
        if geometry.alibi is not None or geometry.softcap is not None:
            raise ValueError(
                "attention is computed anew here, with rotary positions only; take window or streaming-llm"
            )

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {"asked": torch.zeros(geometry.batch, geometry.heads, 1, geometry.head_dim, dtype=geometry.dtype)}

    def arrive(self, view: View) -> None:
        assert view.query is not None
        last = (view.stream == (view.consumed + view.coming)[:, None] - 1).cumsum(1).argmax(1)  # padding may follow it
        view.mine["asked"] = view.query.take_along_dim(last[:, None, None, None], 2)

    def keep(self, view: View) -> Tensor | None:
        assert view.window is not None
        held, g = view.held, view.geometry
        count = held.sum(-1)
        over = count - view.window
        if not bool((over > 0).any()):
            return None
        query = view.turned(view.mine["asked"], count - 1)  # at its own place in the cache, keys at theirs
        keys = view.turned(view.keys, view.rank()).repeat_interleave(g.heads // g.kv_heads, 1)
        scores = g.scale[view.layer] * (query @ keys.transpose(-1, -2))
        attention = scores.masked_fill(~held[:, :, None], -torch.inf).softmax(-1).mean(1)
        least = attention.masked_fill(~held, torch.inf).argsort(dim=-1, stable=True).argsort(-1) < over[..., None]
        return view.fresh | (held & ~least)

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return None if window is None else sink + slots + window + m


@register("tova", paper="Oren et al., Transformers are Multi-State RNNs, EMNLP 2024, arXiv 2401.06104")
def tova(*, cache_size: int = 512) -> Memory:
    """The `cache_size` tokens that remain when after each step those leave that its last query attended least.

    Attention is the mean over the heads of a layer, and every layer decides for itself (Token Omission Via Attention).
    What leaves does so as the next step begins, which no query can tell. The rule is per step: in one of several tokens
    all are attended. Positions are places in the cache, so that a stream never reaches the end of what the model knows;
    the released code keeps those of the stream.
    """
    return Memory(window=cache_size, evict=LeastNoticed())


def main() -> None:
    """Read one text with memories of one size, and count what each holds that a window would have lost."""
    tiny = ef.open("tiny")
    ids = tiny.tokenizer.encode(TEXT)
    for memory in ("window(window=64)", "streaming-llm(sink=4, window=60)", "tova(cache_size=64)"):
        stream = ef.open(tiny.model, memory, tokenizer=tiny.tokenizer)
        nats = stream.surprisal(ids).nanmean()
        held = [stream.state.held(layer) for layer in range(stream.state.geometry.layers)]
        old = ", ".join(str(sum(index < len(ids) - 64 for index in layer)) for layer in held)
        print(
            f"{memory:32} {len(ids)} tokens, perplexity {nats.exp():.1f}, {stream.nbytes:,} bytes; old by layer: {old}"
        )


if __name__ == "__main__":
    main()
