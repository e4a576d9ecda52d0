"""Branches of one history, and their replay: what KVPO learns from, over a memory of recipe `kvpo`.

Branches differ only by what they attend: noise, text and history are shared, and the last of each group is the anchor,
which takes no route. Their noisy inputs are then shown to a model whose memory goes without routes, from the same history.
Source: KVPO, arXiv 2605.14278, sections on causal history routing and trajectory velocity energy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...generate.flow import noise
from ...memory import Memory, Rerouted
from ...memory.chunks import ArenaState
from ...models.video import Attend, Text, VideoTransformer, places
from ...models.video.transformer import seen
from .kvpo import energy


@dataclass(frozen=True, eq=False)
class Branches:
    """What N histories went on with, G branches and the anchor each.

    frames: clean latents [N, G + 1, F, C, H, W], the anchor last, of the routed blocks and of those that follow. noisy,
    clean: what the network was shown and what it predicted, of the branches in the routed blocks at every step,
    [N·G, blocks, steps, chunk, C, H, W].
    """

    frames: Tensor
    noisy: Tensor
    clean: Tensor


class Graded:
    """Attention of one call with a gradient: fresh tokens have one, what the memory holds has none, and nothing is stored.

    Equal to a step without route that is not committed: all that the recall shows of the newest frames and the sinks.
    """

    def __init__(self, state: ArenaState, frames: int, size: tuple[int, int]) -> None:
        recall, view, m = state.memory.recall, state.between(0), frames * size[0] * size[1]
        if not isinstance(recall, Rerouted) or state.raw or len(view.index) > 1:
            raise ValueError(
                f"{state.memory.name} cannot be replayed with a gradient; take recipe 'kvpo', all rows alike"
            )
        self.state = state
        plain = recall.among(replace(view, coming=torch.full_like(view.consumed, m)))
        self.columns = (plain & view.held)[0, 0].nonzero()[:, 0]
        first = int(view.consumed) // view.frame
        times = torch.arange(first, first + frames).repeat_interleave(size[0] * size[1])
        self.where = torch.cat([times[:, None], places(frames, *size)], 1).to(view.index.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, rotary = self.state.slots[layer], self.state.rotaries[self.state.geometry.rope[layer]]
        if rotary is not None:
            turn = rotary.at(self.where if rotary.coordinates else self.where[:, 0])
            q, k = rotary.rotate(q, *turn), rotary.rotate(k, *turn)
        keys, values = (x.index_select(2, self.columns) for x in (slots.keys, slots.values))
        return seen(q, torch.cat([keys, k], 2), torch.cat([values, v], 2))


def memory_of(model: VideoTransformer, memory: Memory, rows: int) -> ArenaState:
    """An empty memory of so many rows for a network; it takes frames as large as the first step brings."""
    config, weight = model.config, model.head.head.weight
    built = memory.build(
        layers=config.layers, heads=config.heads, head_dim=config.head_dim, rope=model.rope, batch=rows,
        dtype=weight.dtype, device=weight.device,
    )  # fmt: skip
    assert isinstance(built, ArenaState)
    return built


def copies(state: ArenaState, count: int) -> ArenaState:
    """A memory with `count` rows for each row of `state`, side by side; it holds the same, and `state` is not touched."""
    twin = ArenaState(state.memory, replace(state.geometry, batch=count * state.batch))
    kept = {name: x for name, x in state.state_dict().items() if not name.startswith("pending.")}
    every = ("layers.", "positions", "time")
    twin.load_state_dict(
        {
            name: x.repeat_interleave(count, 0) if name.startswith(every) or len(x) == state.batch > 1 else x
            for name, x in kept.items()
            if name != "floor"
        }
        | {"floor": kept["floor"]}
    )
    return twin


def spread(text: Text, count: int) -> Text:
    """A text with `count` rows for each, side by side."""
    return Text(*(tuple(x.repeat_interleave(count, 0) for x in part) for part in (text.keys, text.values)))


def predicted(model: VideoTransformer, x: Tensor, sigma: float, text: Text, attend: Attend) -> Tensor:
    """x0 of latents [B, F, C, H, W] at one noise level; conditions are blank."""
    extra = x.new_zeros(*x.shape[:2], model.config.in_channels - x.shape[2], *x.shape[3:])
    times = torch.full(x.shape[:2], 1000 * sigma, device=x.device)
    return x - sigma * model(torch.cat([x, extra], 2), times, text, attend)


class Roll:
    """A network that goes on from a memory, chunk after chunk: un-routed, or with a tag for each row."""

    def __init__(self, model: VideoTransformer, state: ArenaState, text: Text, latent: tuple[int, int]) -> None:
        self.model, self.state, self.text, self.latent = model, state, text, latent
        config = model.config
        self.size = latent[0] // config.patch[1], latent[1] // config.patch[2]
        self.m = config.chunk * self.size[0] * self.size[1]
        self.tags = {"coordinates": places(config.chunk, *self.size, device=state.geometry.device)}

    def call(self, x: Tensor, sigma: float, routes: Tensor | None = None, commit: bool = False) -> Tensor:
        """x0 of a chunk [B, chunk, C, H, W] as the memory sees it. routes: int64 [B]."""
        tags = self.tags if routes is None else self.tags | {"route": routes[:, None].expand(-1, self.m)}
        with self.state.step(self.m, tags=tags, commit=commit):
            return predicted(self.model, x, sigma, self.text, self.state.attend)

    def know(self, x: Tensor, routes: Tensor | None = None) -> None:
        """Keep clean frames [B, F, C, H, W], chunk by chunk."""
        with torch.no_grad():
            for chunk in x.split(self.model.config.chunk, 1):
                self.call(chunk, 0.0, routes, commit=True)

    @torch.no_grad()
    def chunk(
        self, sigmas: Sequence[float], drawn: Callable[[int], Tensor], routes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One more chunk: what the network was shown and its x0, [B, steps, chunk, C, H, W]; the last x0 is kept.

        drawn(step): noise [B, chunk, C, H, W].
        """
        noisy, clean = list[Tensor](), list[Tensor]()
        for step, sigma in enumerate(sigmas):
            noisy.append((1 - sigma) * clean[-1] + sigma * drawn(step) if step else drawn(0))
            clean.append(self.call(noisy[-1], sigma, routes))
        self.know(clean[-1], routes)
        return torch.stack(noisy, 1), torch.stack(clean, 1)


def draws(model: VideoTransformer, roll: Roll, seed: int, block: int, rows: int) -> Callable[[int], Tensor]:
    """Noise by steps, keyed by (seed, block, step): whoever asks for as many rows gets the same."""
    shape = (rows, model.config.chunk, model.config.out_channels, *roll.latent)
    weight = model.head.head.weight
    return lambda step: noise(seed, (block, step), shape).to(weight)


def rolled(
    model: VideoTransformer, state: ArenaState, text: Text, sigmas: Sequence[float], blocks: int, seed: int,
    latent: tuple[int, int],
) -> Tensor:  # fmt: skip
    """`blocks` more chunks without routes, [B, F, C, H, W]; the memory goes on with them."""
    roll = Roll(model, state, text, latent)
    made = [roll.chunk(sigmas, draws(model, roll, seed, block, state.batch))[1][:, -1] for block in range(blocks)]
    return torch.cat(made, 1)


def explored(
    model: VideoTransformer, state: ArenaState, text: Text, sigmas: Sequence[float], seed: int,
    latent: tuple[int, int], after: int = 0,
) -> Branches:  # fmt: skip
    """Branches of every row of a memory of recipe `kvpo`, which stays as it is, and `after` blocks of each without routes.

    All draw the same noise, by `seed`. The anchor is what `rolled` makes of the memory with this seed.
    """
    recall = state.memory.recall
    if not isinstance(recall, Rerouted):
        raise ValueError(f"{state.memory.name} has no routes; take recipe 'kvpo'")
    group = recall.branches + 1
    roll = Roll(model, copies(state, group), spread(text, group), latent)
    noisy, clean, frames = list[Tensor](), list[Tensor](), list[Tensor]()
    for block in range(recall.blocks + after):
        routed = block < recall.blocks
        tags = [recall.route(branch, block) for branch in range(recall.branches)] + [0] if routed else [0] * group
        own = draws(model, roll, seed, block, state.batch)

        def drawn(step: int, own: Callable[[int], Tensor] = own) -> Tensor:
            return own(step).repeat_interleave(group, 0)

        shown, made = roll.chunk(sigmas, drawn, torch.tensor(tags * state.batch) if routed else None)
        shown, made = (x.unflatten(0, (-1, group)) for x in (shown, made))
        frames.append(made[:, :, -1])
        if routed:
            noisy.append(shown[:, :-1].flatten(0, 1))
            clean.append(made[:, :-1].flatten(0, 1))
    return Branches(torch.cat(frames, 2), torch.stack(noisy, 1), torch.stack(clean, 1))


def replayed(
    model: VideoTransformer, state: ArenaState, text: Text, sigmas: Sequence[float], branches: Branches, graded: int = 2
) -> Tensor:
    """Energies [N, G] of branches for a model that goes without routes from their history, `state`, which stays as it is.

    The model's own last x0 of a block, without gradient, is what the next block finds in the memory. graded: steps of a
    block, from the noisiest, that carry a gradient.
    """
    rows, blocks = branches.noisy.shape[:2]
    group = rows // state.batch
    latent = (branches.noisy.shape[-2], branches.noisy.shape[-1])
    roll, made = Roll(model, copies(state, group), spread(text, group), latent), list[Tensor]()
    with_gradient = torch.is_grad_enabled()
    for block in range(blocks):
        attend = Graded(roll.state, model.config.chunk, roll.size)
        for step, sigma in enumerate(sigmas):
            with torch.set_grad_enabled(with_gradient and step < graded):
                made.append(predicted(model, branches.noisy[:, block, step], sigma, roll.text, attend))
        roll.know(made[-1])
    levels = branches.clean.new_tensor(list(sigmas) * blocks)
    return energy(branches.clean.flatten(1, 2), torch.stack(made, 1), levels).unflatten(0, (-1, group))
