"""What streams on one clock and in blocks promise: the same as the whole, so soon, at even cost (Qwen2.5-Omni)."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as fn
from transformers import PreTrainedModel

from ..memory.blockwise import Operator, Part, S, Stacked, Windowed, block_mask, noise_at
from ..memory.time_aligned import Film, InTurns, Marks, Piece, TimeAligned, Words
from ..models import Stream, open_stream
from ..recipes import recipe
from .choosing import in_turns, ratio
from .exactness import gap
from .registry import Bench, claim
from .towers import HIDDEN, TEXT, WINDOW, Growing

DIM, HEADS, BLOCK, LAYERS = 64, 4, 24, 22
BACK, AHEAD = {0: 1, 20: 1}, {10: 1}
SOUND, IMAGE, VIDEO, STARTS, ENDS = 120, 121, 122, (124, 126), (127, 125)  # ids: placeholders, marks of sight and sound
SEEN, HEARD = 64, 25  # tokens of a second


class Layer:
    """A transformer layer over a window, for the window's own items; or over a whole stream, under a mask."""

    def __init__(self, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        sizes = (DIM, 3 * DIM), (DIM, DIM), (DIM, 2 * DIM), (2 * DIM, DIM)
        self.qkv, self.out, self.up, self.down = (torch.randn(*s, generator=made) * 0.7 / s[0] ** 0.5 for s in sizes)

    def __call__(self, window: Tensor, part: Part, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x in (fn.layer_norm(window, (DIM,)) @ self.qkv).chunk(3, -1)
        )
        own = slice(part.start, part.stop)
        seen = fn.scaled_dot_product_attention(q[:, :, own], k, v, mask).transpose(1, 2).flatten(2)
        x = window[:, own] + seen @ self.out
        return x + fn.gelu(fn.layer_norm(x, (DIM,)) @ self.up) @ self.down


def masked(x: Tensor, layers: list[Layer], back: dict[int, int], ahead: dict[int, int]) -> Tensor:
    """All of a stream at once, each layer under its block mask."""
    n = x.shape[1]
    for number, layer in enumerate(layers):
        x = layer(x, Part(0, 0, n), block_mask(n, BLOCK, back.get(number, 0), ahead.get(number, 0)))
    return x


def streamed(operator: Operator[S], x: Tensor, piece: int) -> tuple[Tensor, int]:
    """What an operator gives for x [B, n, D] in such pieces, and how many items had come at its first output."""
    state, outs, first = operator.reset(), list[Tensor](), 0
    for at in range(0, x.shape[1], piece):
        out, state = operator.step(x[:, at : at + piece], state)
        if out is not None:
            first = first or min(at + piece, x.shape[1])
            outs.append(out)
    last, _ = operator.flush(state)
    return torch.cat([*outs, *([] if last is None else [last])], 1), first


def cost(operator: Operator[S], items: Tensor, early: int, late: int, times: int) -> tuple[float, float]:
    """Median seconds of a step after `early` and after `late` steps, measured in turns, as others use the machine too."""
    states, took = list[S](), (list[float](), list[float]())
    for steps in (early, late):
        state = operator.reset()
        for _ in range(steps):
            _, state = operator.step(items, state)
        states.append(state)
    for n in range(2 * times):
        start = time.perf_counter()
        _, states[n % 2] = operator.step(items, states[n % 2])
        took[n % 2].append(time.perf_counter() - start)
    return median(took[0]), median(took[1])


def flow(layers: list[Layer], steps: int, back: dict[int, int], ahead: dict[int, int]) -> Windowed:
    """A decoder of chunks of 3 blocks that sees 2 before and 1 after: so many evaluations from noise, in each window."""

    def decoded(window: Tensor, part: Part) -> Tensor:
        x = noise_at(0, part.first, window.shape[1], (DIM,), BLOCK).expand_as(window)
        for _ in range(steps):
            x = x + (masked(x + window, layers, back, ahead) - x) / steps
        return x[:, part.start : part.stop]

    return Windowed(decoded, 3 * BLOCK, 2 * BLOCK, BLOCK)


@claim("qwen25-omni")
def qwen25_omni(bench: Bench) -> None:
    """Blocks give what the whole gives, as soon as their look-ahead allows; a thinker reads a film at even cost."""
    layers = [Layer(n) for n in range(LAYERS)]
    x = torch.randn(1, 30 * BLOCK + 7, DIM, generator=torch.Generator().manual_seed(1))
    stacks = {
        "an encoder's blocks alone": (Stacked.of(layers[:8], BLOCK), {}, {}, layers[:8]),
        "a decoder's layers, 2 blocks back and 1 ahead": (Stacked.of(layers, BLOCK, BACK, AHEAD), BACK, AHEAD, layers),
    }
    with torch.no_grad():
        for what, (operator, back, ahead, own) in stacks.items():
            whole = masked(x, own, back, ahead)
            worst = max(float((streamed(operator, x, piece)[0] - whole).abs().max()) for piece in (1, 7, BLOCK, 200))
            scale = float(whole.abs().mean())
            bench.row(
                f"{what}: error of any pieces against the masked whole", "0", f"{worst:.1e}", worst < 1e-4 * scale,
                f"float32, numbers of {scale:.1f}; pieces of 1, 7, {BLOCK} and 200",
            )  # fmt: skip
            first = streamed(operator, x, 1)[1]
            bench.row(
                f"{what}: blocks that have come at the first output", f"{1 + sum(ahead.values())}", f"{first / BLOCK:g}",
                first == operator.look_ahead + 1,
            )  # fmt: skip
            piece = torch.randn(1, BLOCK, DIM)
            early, late = cost(operator, piece, 100 // BLOCK, 10_000 // BLOCK, 100 if bench.full else 40)
            bench.row(
                f"{what}: time of a block at item 10,000 over item 100", "1", f"{late / early:.2f}", late < 1.3 * early,
                f"{1e3 * late:.1f} ms a block of {BLOCK}",
            )  # fmt: skip
        windows(bench, layers, x)
    film_places(bench)
    thinker_exact(bench)
    thinker_flat(bench)


def windows(bench: Bench, layers: list[Layer], x: Tensor) -> None:
    """A flow in windows, of one evaluation and of several."""
    for steps, exact in ((1, True), (4, False)):
        operator = flow(layers, steps, BACK, AHEAD)
        ours, first = streamed(operator, x, BLOCK)
        n = x.shape[1]
        theirs = operator.function(x, Part(0, 0, n))
        error = (ours - theirs).abs()
        scale = float(theirs.abs().mean())
        cuts = float(error.unflatten(1, (-1, 1))[:, ::72].mean()) / scale
        bench.row(
            f"windows of 3 blocks, {steps} evaluation{'s' * (steps > 1)} of the flow: error against the whole, relative",
            "0" if exact else "small (4e-3 in a random one)", f"{float(error.max()) / scale:.1e}",
            float(error.max()) < 1e-4 * scale if exact else None,
            f"mean where a chunk begins {cuts:.1e}; first output after {first // BLOCK} blocks",
        )  # fmt: skip


def film_places(bench: Bench) -> None:
    """A film on the clock, second by second: what waits, and what it costs."""
    clock, waits = TimeAligned(), list[int]()
    second = [Film(1, 8, 8, 1.0, heard=25)]
    states, took = [clock.step([Marks()], clock.reset())[1]] * 2, [list[float](), list[float]()]
    for steps, number in ((100, 0), (10_000, 1)):
        for _ in range(steps):
            _, states[number] = clock.step(second, states[number])
            film = states[number].film
            waits.append(0 if film is None else len(film.waiting.key))
    for n in range(1000):
        start = time.perf_counter()
        _, states[n % 2] = clock.step(second, states[n % 2])
        took[n % 2].append(time.perf_counter() - start)
    early, late = median(took[0]), median(took[1])
    bench.row(
        "places of a film: time of its 10,000th second over its 100th", "1", f"{late / early:.2f}", late < 1.3 * early,
        f"{1e3 * late:.2f} ms; 64 tokens of picture and 25 of sound a second",
    )  # fmt: skip
    bench.row("tokens that wait for their turn of 2 s, at most", "50 of sound", f"{max(waits)}", max(waits) <= 64 + 50)


def thinker() -> Any:
    """A random thinker of Qwen2.5-Omni, small."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]}
    sees = {"depth": 1, "num_heads": 2, "hidden_size": 16, "out_hidden_size": HIDDEN, "intermediate_size": 32}
    hears = {
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        "output_dim": HIDDEN,
    }
    ids: dict[str, Any] = {
        "audio_token_index": SOUND, "image_token_index": IMAGE, "video_token_index": VIDEO,
        "vision_start_token_id": STARTS[0], "audio_start_token_id": STARTS[1],
    }  # fmt: skip
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=sees | {"fullatt_block_indexes": [0]},
        audio_config=hears, **ids,
    )  # fmt: skip
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


def told(seconds: int) -> list[tuple[Piece, Tensor]]:
    """Words, a film told second by second, words: pieces, and ids of their tokens as they arrive."""
    words = torch.randint(3, SOUND, (8,), generator=torch.Generator().manual_seed(2))
    second = torch.tensor([VIDEO] * 16 + [SOUND] * HEARD)
    film: list[tuple[Piece, Tensor]] = [(Film(1, 4, 4, 1.0, heard=HEARD), second)] * seconds
    starts, ends = (Marks(), torch.tensor(STARTS)), (Marks(), torch.tensor(ENDS))
    return [(Words(8), words), starts, *film, ends, (Words(8), words)]


def thinker_exact(bench: Bench) -> None:
    """A thinker fed as a film comes, against its own forward at its own `get_rope_index`."""
    model, seconds, turns = thinker(), 9, InTurns()
    pieces = told(seconds)
    _, order = turns.clock.whole([piece for piece, _ in pieces])
    arrived = torch.cat([ids for _, ids in pieces])
    made = torch.randn(len(arrived), HIDDEN, generator=torch.Generator().manual_seed(3)) / 5
    words = (arrived < SOUND) | (arrived > VIDEO)
    with torch.no_grad():
        made[words] = model.get_input_embeddings()(arrived[words])
        ids, rows = arrived[order][None], made[order][None]
        places, _ = model.get_rope_index(
            ids, None, torch.tensor([[seconds, 8, 8]]), torch.ones_like(ids), True, torch.tensor([4 * HEARD * seconds]),
            torch.tensor([1.0]),
        )  # fmt: skip
        own = model(inputs_embeds=rows, position_ids=places).logits

    def played(memory: str, **settings: int) -> Tensor:
        stream, state, first, parts = open_stream(model, recipe(memory, **settings)), turns.reset(), 0, []
        for piece, some in pieces:
            (out, there), state = turns.step([piece], made[first : first + len(some)], state)
            first += len(some)
            if len(out):
                parts.append(stream.feed(embeds=out, tags={"coordinates": there}))
        return torch.cat(parts, 1)

    def cut(memory: str, size: int, **settings: int) -> Tensor:
        stream, there = open_stream(model, recipe(memory, **settings)), places[:, 0].T
        parts = zip(rows.split(size, 1), there.split(size), strict=True)
        return torch.cat([stream.feed(embeds=some, tags={"coordinates": at}) for some, at in parts], 1)

    error = gap(played("full"), own)
    bench.row(
        f"thinker: {seconds} s of film between words, fed second by second = its own forward", "equal", f"{error:.1e}",
        error <= 2e-5, "random small model of the real class, float32; places of both from one film, in turns",
    )  # fmt: skip
    error = max(gap(cut("full", size), own) for size in (1, 7, ids.shape[1]))
    bench.row("thinker: the same, fed 1, 7, all at a time", "equal", f"{error:.1e}", error <= 2e-5)
    small = {"sink": 4, "window": 60}
    one = cut("streaming-llm", 1, **small)
    error = max(gap(other, one) for other in (played("streaming-llm", **small), cut("streaming-llm", 37, **small)))
    apart = gap(one, own)
    bench.row(
        "thinker: 4 sinks + 60, film leaves: by seconds, or 37 at a time = one by one", "equal", f"{error:.1e}",
        error <= 2e-5 < 1e-3 < apart, f"full attention differs by {apart:.1g}",
    )  # fmt: skip


def thinker_flat(bench: Bench) -> None:
    """What a film of many seconds costs a thinker that holds a window, and one that holds all."""
    late = 1200 if bench.full else 300
    model: PreTrainedModel = thinker()
    turn, clock = Film(2, 8, 8, 1.0, heard=2 * HEARD), InTurns()
    rows = torch.randn(2 * (SEEN + HEARD), HIDDEN, generator=torch.Generator().manual_seed(4))
    memory = recipe("streaming-llm", sink=4, window=WINDOW)
    ours, own = [open_stream(model, memory) for _ in range(2)], [Growing(model) for _ in range(2)]
    shown = [clock.reset() for _ in range(2)]

    def watch(age: int, stream: Stream | None, cache: Growing | None) -> None:
        (out, places), shown[age] = clock.step([turn], rows, shown[age])
        if stream is not None:
            stream.feed(embeds=out, tags={"coordinates": places})
        if cache is not None:
            cache.read(out, places)

    for age, seconds in enumerate((20, late)):
        for _ in range(seconds // 2):
            watch(age, ours[age], own[age])
    held, grown = ours[1].nbytes / ours[0].nbytes, own[1].nbytes / own[0].nbytes
    waits = max(state.nbytes for state in shown) / 1024
    bench.row(
        f"thinker: bytes after {late} s of film over 20 s: `streaming-llm`", "1", f"{held:.2f}", held == 1,
        f"{ours[1].nbytes / 1024:.0f} KiB, and {waits:.0f} KiB of sound that waits",
    )  # fmt: skip
    bench.row("the same, transformers' DynamicCache", "grows", f"{grown:.1f}", grown > 2)
    seconds_of = in_turns(
        {
            "young": partial(watch, 0, ours[0], None), "old": partial(watch, 1, ours[1], None),
            "own young": partial(watch, 0, None, own[0]), "own old": partial(watch, 1, None, own[1]),
        },
        30 if bench.full else 15,
    )  # fmt: skip
    slower, theirs = ratio(seconds_of, "old", "young"), ratio(seconds_of, "own old", "own young")
    bench.row(
        f"thinker: time of 2 s of film after {late} s over 20 s: `streaming-llm`", "1", f"{slower:.2f}", slower < 1.15,
        f"{1e3 * median(seconds_of['old']):.0f} ms for {len(rows)} tokens",
    )  # fmt: skip
    bench.row("the same, transformers' DynamicCache", "grows", f"{theirs:.1f}", theirs > 1.5)
