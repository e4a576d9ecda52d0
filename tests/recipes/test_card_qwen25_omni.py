"""What must hold for Qwen2.5-Omni's streams (arXiv 2503.20215): one clock for all, and blocks that need no more than a few others."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as fn

from evenflow.memory.blockwise import Part, Stacked, Windowed, block_mask, noise_at
from evenflow.memory.time_aligned import ClockState, Film, InTurns, Marks, Picture, TimeAligned, TurnsState, Words

CLOCK = TimeAligned()
DIM, BLOCK = 16, 4


# -- places ------------------------------------------------------------------------------------------------------------


def spans(times, start, places):
    """The released rule for turns, by its definition: token by token, a turn closes at the first that lies behind it."""
    found, turn = [], 1
    current = []
    for n, t in enumerate(times):
        if t - start >= turn * places:
            found.append(current)
            current, turn = [], turn + 1
        current.append(n)
    return [*found, current]


def definition(pieces):
    """TMRoPE over lists: places and kinds of tokens in their final order, for the released rule."""
    out, at = [], 0
    for piece in pieces:
        if isinstance(piece, Words):
            out += [(at + i,) * 3 for i in range(piece.count)]
            at += piece.count
        elif isinstance(piece, Marks):
            out += [(at,) * 3] * piece.count
            at += piece.count > 0
        elif isinstance(piece, Picture):
            own = [(at, at + y, at + x) for y in range(piece.height) for x in range(piece.width)]
            out += own
            at = max(map(max, own)) + 1
        else:
            seconds = torch.tensor(piece.seconds)
            times = [int(torch.tensor(float(k)) * seconds * 25) for k in range(piece.grids)]
            seen = [(at + t, at + y, at + x) for t in times for y in range(piece.height) for x in range(piece.width)]
            if piece.heard is None:
                own = seen
                last = seen
            else:
                heard = [(at + i,) * 3 for i in range(piece.heard)]
                own, last = [], []
                turns = [
                    [[track[n] for n in span] for span in spans([p[0] for p in track], at, 50)]
                    for track in (seen, heard)
                ]
                for n in range(max(map(len, turns))):
                    for track in turns:
                        if n < len(track) and track[n]:
                            own, last = own + track[n], track[n]
            out += own
            at = max(map(max, last)) + 1 if last else at
    return torch.tensor(out, dtype=torch.int64).reshape(-1, 3), at


def told(pieces, clock=CLOCK):
    return clock.whole(pieces)[0].tolist()


def test_point_2_the_examples_of_the_paper():
    silent = told([Words(3), Film(3, 2, 2), Words(2)])
    assert [p[0] for p in silent[3:15]] == [3] * 4 + [28] * 4 + [53] * 4
    assert [p[1:] for p in silent[3:7]] == [[3, 3], [3, 4], [4, 3], [4, 4]]
    assert silent[15:] == [[54] * 3, [55] * 3]
    assert told([Words(125)]) == [[n] * 3 for n in range(125)]
    places, order = CLOCK.whole([Marks(), Film(4, 1, 2, 1.0, heard=100), Marks()])
    kinds = ["m"] * 2 + ["v"] * 8 + ["a"] * 100 + ["m"] * 2
    shown = "".join(kinds[n] for n in order.tolist())
    assert shown == "mm" + "vvvv" + "a" * 50 + "vvvv" + "a" * 50 + "mm"
    assert places[2:, 0].tolist()[:4] == [1, 1, 26, 26] and len(places) == 112
    film = {n: p[0] for n, p in zip(order.tolist(), places.tolist(), strict=True)}
    assert film[2 + 2] == film[2 + 8 + 25]  # what is seen and heard after one second stands at the same time
    assert places[-1].tolist() == places[-2].tolist() == [101] * 3


counts = st.integers(0, 7)
films = st.builds(
    Film, st.integers(1, 7), st.integers(1, 3), st.integers(1, 60) | st.integers(1, 3), st.sampled_from([0.3, 0.5, 1.0, 1.7, 2.0, 4.0, 9.0]),
    st.none() | st.integers(1, 260),
)  # fmt: skip
things = st.lists(
    st.one_of(st.builds(Words, counts), st.builds(Picture, st.integers(1, 4), st.integers(1, 4)), films), min_size=1, max_size=5
)  # fmt: skip


def parted(things):
    """Films do not follow each other directly."""
    return [
        piece for thing in things for piece in ((Marks(2), thing, Marks(2)) if isinstance(thing, Film) else (thing,))
    ]


@settings(max_examples=40, deadline=None)
@given(things)
def test_places_are_those_of_the_definition(things):
    pieces = parted(things)
    theirs, _ = definition(pieces)
    places, order = CLOCK.whole(pieces)
    assert places.tolist() == theirs.tolist()
    assert sorted(order.tolist()) == list(range(len(places)))  # every token once


@st.composite
def cut(draw):
    """Pieces, and the same ones in smaller ones."""
    pieces, smaller = parted(draw(things)), []
    for piece in pieces:
        if isinstance(piece, Words):
            smaller += [Words(1)] * piece.count
        elif isinstance(piece, Film):
            rest, heard = piece.grids, piece.heard
            while rest or heard:
                grids = draw(st.integers(0, rest))
                some = None if heard is None else draw(st.integers(0, heard) if grids or not rest else st.just(heard))
                smaller.append(Film(grids, piece.height, piece.width, piece.seconds, some))
                rest, heard = rest - grids, None if heard is None else heard - some
        else:
            smaller.append(piece)
    return pieces, smaller


@settings(max_examples=30, deadline=None)
@given(cut(), st.booleans())
def test_point_3_places_do_not_depend_on_how_the_stream_was_cut(cut, exact):
    pieces, smaller = cut
    clock = TimeAligned(exact=exact)
    state, got = clock.reset(), []
    for piece in smaller:
        loaded = ClockState.load(state.state_dict())
        (places, _), state = clock.step([piece], loaded)
        got += places.tolist()  # what is out never changes: later pieces only add
    (places, _), state = clock.flush(state)
    whole = told(pieces, clock)
    assert got + places.tolist() == whole and state.film is None and state.position == len(whole)
    (text, _), after = clock.step([Words(1)], state)
    assert text.tolist() == [[state.position + state.delta] * 3]
    assert state.nbytes == 0 and after.position == state.position + 1


@settings(max_examples=30, deadline=None)
@given(cut(), st.booleans(), st.integers(0, 99))
def test_point_3_rows_come_with_their_places_in_any_cut_and_from_any_start(cut, exact, first):
    pieces, smaller = cut
    turns = InTurns(TimeAligned(exact=exact))
    _, order = turns.clock.whole(smaller)  # tracks of a film told in parts arrive in turns
    content, state, came, rows = torch.randn(len(order), 2), turns.reset(first, 7), 0, [torch.empty(0, 2)]
    got = [torch.empty(0, 3, dtype=torch.int64)]
    for piece in [*smaller, None]:
        if piece is None:
            (some, there), state = turns.flush(state)
        else:
            count = len(turns.clock.whole([piece])[1])
            state = TurnsState.load(state.state_dict())
            (some, there), state = turns.step([piece], content[came : came + count], state)
            came += count
        assert len(some) == len(there)
        rows, got = [*rows, some.reshape(-1, 2)], [*got, there]
    assert torch.equal(torch.cat(rows), content[order]) and (torch.cat(got) - first).tolist() == told(
        pieces, turns.clock
    )
    assert state.position == came + 7 and not state.nbytes


def test_rows_that_wait_are_few_and_mistakes_change_nothing():
    turns, held = InTurns(), []
    state = turns.reset()
    for _ in range(100):
        _, state = turns.step([Film(1, 2, 2, 1.0, heard=25)], torch.ones(29, 8), state)
        held.append(state.nbytes)
    assert max(held) == max(held[:4]) and len(state.rows)
    for rows, match in ((torch.ones(3, 8), "3 rows"), (torch.ones(29, 7), "wait"), (torch.ones(29, 8).long(), "wait")):
        with pytest.raises(ValueError, match=match):
            turns.step([Film(1, 2, 2, 1.0, heard=25)], rows, state)
    good = state.state_dict()
    for bad in ({**good, "rows": good["rows"][1:]}, {n: v for n, v in good.items() if n != "rows"}):
        with pytest.raises(ValueError, match="rows"):
            TurnsState.load(bad)
    with pytest.raises(ValueError, match="count from 0"):
        turns.reset(-1)


def test_which_tokens_came_where_is_told_in_order_of_arrival():
    state, order = CLOCK.reset(), []
    for _ in range(4):  # 1 s at a time: two tokens of a grid, then 25 of sound
        (_, some), state = CLOCK.step([Film(1, 1, 2, 1.0, heard=25)], state)
        order += some.tolist()
    (_, some), state = CLOCK.flush(state)
    order += some.tolist()
    seen = [[27 * n, 27 * n + 1] for n in range(4)]
    heard = [list(range(27 * n + 2, 27 * n + 27)) for n in range(4)]
    assert order == [*seen[0], *seen[1], *heard[0], *heard[1], *seen[2], *seen[3], *heard[2], *heard[3]]


def test_what_is_heard_waits_no_longer_than_a_turn():
    """In steps of a grid (1 s) and 25 sounds, never more than a turn and a step wait, and all that is seen is out at its turn."""
    state, waits = CLOCK.reset(), []
    for _ in range(200):
        _, state = CLOCK.step([Film(1, 2, 2, 1.0, heard=25)], state)
        waits.append(len(state.film.waiting.key))
    assert max(waits) <= 50 + 4 and state.nbytes <= 54 * 40


def test_exact_turns_are_those_of_the_clock_where_pictures_are_rare():
    """A grid every 9 s: the released rule goes on a turn a token, the exact one when the time has come."""
    film = [Film(2, 1, 1, 9.0, heard=250)]
    released, exact = (clock.whole(film)[0][:, 0].tolist() for clock in (CLOCK, TimeAligned(exact=True)))
    assert released.index(225) == 51  # after one turn of sound
    assert exact.index(225) == 201  # after the four that come before it
    assert TimeAligned(exact=True).whole([Film(1, 1, 90, 1.0, heard=3), Words(1)])[0][-1].tolist() == [90] * 3
    assert CLOCK.whole([Film(1, 1, 90, 1.0, heard=3), Words(1)])[0][-1].tolist() == [3] * 3
    late = ClockState.load({**TimeAligned().step(film, ClockState())[1].state_dict()})
    assert late.film.seconds == 9.0


@pytest.mark.parametrize("seed", range(6))
def test_places_are_those_of_the_released_model(seed):
    released = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    owner = released.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    ids = {"image": 90, "video": 91, "audio": 92, "vision_start": 93, "audio_start": 94}
    config = {f"{name}_token_id": number for name, number in ids.items()}
    model = SimpleNamespace(
        spatial_merge_size=2, config=SimpleNamespace(**config, position_id_per_seconds=25, seconds_per_chunk=2),
        get_chunked_index=lambda *a: owner.get_chunked_index(None, *a),
    )  # fmt: skip
    model.get_llm_pos_ids_for_vision = lambda *a: owner.get_llm_pos_ids_for_vision(model, *a)
    draw = torch.Generator().manual_seed(seed)

    def some(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    together = seed % 2 == 1
    tokens, pieces, images, videos, audios, seconds = [1] * 3, [Words(3)], [], [], [], []
    for _ in range(4):
        kind, h, w, text = some(0, 3), some(1, 4), some(1, 4), some(1, 6)
        if kind == 0:
            images.append([1, 2 * h, 2 * w])
            tokens += [93] + [90] * (h * w) + [2]
            pieces += [Words(1), Picture(h, w), Words(1)]
        elif kind == 1 and not together:
            count = some(2, 130)
            audios.append(4 * count)
            tokens += [94] + [92] * count + [2]
            pieces += [Words(1), Words(count), Words(1)]
        else:
            grids, apart, count = some(1, 8), (0.5, 1.0, 2.0, 0.7)[some(0, 4)], some(2, 260)
            videos.append([grids, 2 * h, 2 * w])
            seconds.append(apart)
            if together:
                audios.append(4 * count)
                tokens += [93, 94] + [91] * (grids * h * w) + [92] * count + [2, 2]
                pieces += [Marks(), Film(grids, h, w, apart, heard=count), Marks()]
            else:
                tokens += [93] + [91] * (grids * h * w) + [2]
                pieces += [Words(1), Film(grids, h, w, apart), Words(1)]
        tokens += [1] * text
        pieces += [Words(text)]
    if not images + videos:
        images, tokens, pieces = [[1, 2, 2]], [*tokens, 93, 90, 2], [*pieces, Words(1), Picture(1, 1), Words(1)]

    def grid(some):
        return torch.tensor(some) if some else None

    theirs, delta = owner.get_rope_index(
        model, torch.tensor([tokens]), grid(images), grid(videos), torch.ones(1, len(tokens), dtype=torch.long), together,
        grid(audios), grid(seconds),
    )  # fmt: skip
    places, _ = CLOCK.whole(pieces)
    assert places.T.tolist() == theirs[:, 0].long().tolist()
    assert CLOCK.step(pieces, CLOCK.reset())[1].delta == int(delta)


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([Words(-1)], "count"), ([Picture(0, 2)], "height"), ([Film(1, 1, 1, 0.0)], "seconds"), (["text"], "piece"),
        ([Film(1, 2, 2, 1.0, heard=1), Film(1, 2, 3, 1.0, heard=1)], "goes on"),
        ([Film(1, 2, 2, 1.0, heard=1), Film(1, 2, 2, 2.0, heard=1)], "goes on"), ([Film(True, 1, 1)], "grids"),
        ([Film(1, 1, 1, 1.0, heard=-1)], "heard"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(pieces, match):
    with pytest.raises(ValueError, match=match):
        CLOCK.step(pieces, CLOCK.reset())


def test_a_state_that_is_none_is_refused():
    good = CLOCK.step([Film(1, 1, 1, 1.0, heard=60)], CLOCK.reset())[1].state_dict()
    for bad in ({}, {**good, "more": torch.zeros(1)}, {**good, "key": torch.zeros(1, dtype=torch.int64)}):
        with pytest.raises(ValueError, match="expected"):
            ClockState.load(bad)
    with pytest.raises(ValueError, match="turn"):
        TimeAligned(turn=0.01)


# -- blocks ------------------------------------------------------------------------------------------------------------


class Layer:
    """Attention with relative rotation and a perceptron, both residual: over a window, or over all under a mask."""

    def __init__(self, seed, dtype=torch.float64):
        made = torch.Generator().manual_seed(seed)
        self.qkv, self.up, self.down = (
            torch.randn(a, b, generator=made, dtype=dtype) / 4
            for a, b in ((DIM, 3 * DIM), (DIM, 2 * DIM), (2 * DIM, DIM))
        )

    def __call__(self, window, part, mask=None):
        n = torch.arange(window.shape[1], dtype=window.dtype) * 0.3
        q, k, v = fn.layer_norm(window, (DIM,)).matmul(self.qkv).chunk(3, -1)
        q, k = (torch.cat([x * n.cos()[:, None] - y * n.sin()[:, None], x * n.sin()[:, None] + y * n.cos()[:, None]], -1)
                for x, y in ((z[..., : DIM // 2], z[..., DIM // 2 :]) for z in (q, k)))  # fmt: skip
        own = slice(part.start, part.stop)
        out = window[:, own] + fn.scaled_dot_product_attention(q[:, None, own], k[:, None], v[:, None], mask)[:, 0]
        return out + fn.gelu(fn.layer_norm(out, (DIM,)) @ self.up) @ self.down


BACK, AHEAD = {0: 1, 4: 1}, {2: 1}
LAYERS = [Layer(n) for n in range(6)]
STACK = Stacked.of(LAYERS, BLOCK, BACK, AHEAD)


def masked(x, layers=LAYERS, block=BLOCK, back=BACK, ahead=AHEAD):
    """The whole stream at once, under masks: the definition."""
    n = x.shape[1]
    for number, layer in enumerate(layers):
        x = layer(x, Part(0, 0, n), block_mask(n, block, back.get(number, 0), ahead.get(number, 0)))
    return x


def played(operator, x, cuts):
    state, outs, at = operator.reset(), [], 0
    for m in [*cuts, x.shape[1]]:
        out, state = operator.step(x[:, at : at + m], state)
        outs += [] if out is None else [out]
        at = min(at + m, x.shape[1])
    out, state = operator.flush(state)
    assert all(one.held is None for one in (state if isinstance(state, tuple) else (state,)))
    return torch.cat([*outs, *([] if out is None else [out])], 1)


def random(n, seed=0, dim=DIM):
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_block_masks_by_definition():
    mask = block_mask(11, 3, 1, 2)
    for q in range(11):
        for k in range(11):
            assert bool(mask[q, k]) == (-1 <= k // 3 - q // 3 <= 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 45), st.lists(st.integers(0, 9), max_size=12))
def test_point_1_any_cut_equals_the_masked_whole(n, cuts):
    x = random(n)
    theirs = masked(x)
    assert torch.allclose(played(STACK, x, cuts), theirs, rtol=0, atol=1e-12)
    assert torch.allclose(STACK.whole(x), theirs, rtol=0, atol=1e-12)
    encoder = Stacked.of(LAYERS[:3], 10)
    assert torch.allclose(played(encoder, x, cuts), masked(x, LAYERS[:3], 10, {}, {}), rtol=0, atol=1e-12)


def test_point_1_another_grid_of_chunks_gives_something_else():
    encoder, x = Stacked.of(LAYERS[:3], 10), random(30)
    assert float((encoder.whole(x)[:, 5:] - encoder.whole(x[:, 5:])).abs().max()) > 1e-3


def test_point_1_the_released_audio_encoder_in_blocks_is_the_whole():
    released = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig

    torch.manual_seed(0)
    config = Qwen2_5OmniAudioEncoderConfig(
        num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16, output_dim=12, n_window=100,
        max_source_positions=200,
    )  # fmt: skip
    encoder = released.Qwen2_5OmniAudioEncoder._from_config(config, attn_implementation="eager").eval()

    @torch.no_grad()
    def heard(mel):
        """mel [n, 8] → [tokens, 12]."""
        after = (len(mel) - 1) // 2 + 1
        out = encoder(mel.T, feature_lens=torch.tensor([len(mel)]), aftercnn_lens=torch.tensor([after]))
        return out.last_hidden_state

    mel = torch.randn(1, 2 * 200 + 120, 8)
    whole = heard(mel[0])
    # 4 frames make a token; the last chunk is shorter, so that it is asked for by itself.
    blocks = Windowed(lambda window, part: heard(window[0])[None].repeat_interleave(4, 1), 200)
    ours = played(blocks, mel, [37] * 20)[0, ::4]
    assert whole.shape == ours.shape and float((whole - ours).abs().max()) < 1e-5


def test_point_5_the_reach_of_a_block_is_two_back_and_one_ahead():
    """22 layers, of which two see a block back, one a block ahead: block b moves the outputs b − 1 … b + 2."""
    layers = [Layer(n) for n in range(22)]
    stack, x = Stacked.of(layers, BLOCK, {0: 1, 20: 1}, {10: 1}), random(8 * BLOCK)
    for b in (0, 3, 7):
        y = x.clone()
        y[:, b * BLOCK : (b + 1) * BLOCK] += 1
        moved = (stack.whole(y) - stack.whole(x)).abs().amax((0, 2)).unflatten(0, (8, BLOCK)).amax(-1)
        assert [n for n in range(8) if moved[n] > 0] == [n for n in range(b - 1, b + 3) if 0 <= n < 8]
    assert (stack.look_ahead, stack.reach) == (2 * BLOCK - 1, 3 * BLOCK - 1)


@pytest.mark.parametrize("operator", [STACK, Windowed(LAYERS[0], 5, 3, 4), Windowed(LAYERS[0], 1, 0, 2)])
def test_look_ahead_is_as_declared_and_no_item_waits_longer(operator):
    x, out_at, state = random(40), [], operator.reset()
    for n in range(40):
        out, state = operator.step(x[:, n : n + 1], state)
        out_at += [n] * (0 if out is None else out.shape[1])
    waits = [came - n for n, came in enumerate(out_at)]
    assert max(waits) == operator.look_ahead


# -- a decoder over windows --------------------------------------------------------------------------------------------


def euler(layers, steps, seed=3):
    """A flow from noise to what is asked for, over a window of a masked network; noise by items of the stream."""

    def flow(window, part):
        n = window.shape[1]
        x = noise_at(seed, part.first, n, (DIM,), BLOCK).double().expand(len(window), -1, -1)
        first = part.first // BLOCK  # blocks are those of the stream: windows begin at one
        assert first * BLOCK == part.first
        for _ in range(steps):
            x = x + masked(x + window, layers) / steps / 4
        return x[:, part.start : part.stop]

    return flow


def error(past, future, steps):
    x = random(30 * BLOCK, 1)
    ours = Windowed(euler(LAYERS, steps), 3 * BLOCK, past * BLOCK, future * BLOCK)
    streamed = played(ours, x, [7] * 40)
    assert torch.equal(streamed, ours.whole(x))
    return float((streamed - euler(LAYERS, steps)(x, Part(0, 0, 30 * BLOCK))).abs().max())


def test_point_6_one_evaluation_in_a_window_is_exact_and_more_context_helps_several():
    assert error(2, 1, 1) < 1e-12
    errors = [error(2, 1, 4), error(4, 2, 4), error(8, 4, 4)]
    assert (
        errors[0] > 1e-6 and errors[0] > errors[1] > errors[2] and errors[2] < 1e-12
    )  # 4 evaluations reach 8 back, 4 ahead


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300), st.integers(0, 120), st.integers(1, 30))
def test_point_6_noise_is_one_field(first, count, block):
    field = noise_at(5, 0, 420, (2,), block)
    assert torch.equal(noise_at(5, first, count, (2,), block), field[first : first + count])


def vocoder(rate=6, reach=3, seed=0):
    """Samples of frames by a convolution that sees `reach` frames either way."""
    weight = torch.randn(rate, DIM, 2 * reach + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def sound(window, part):
        wave = fn.conv1d(window.transpose(1, 2), weight, padding=reach).tanh()  # [B, rate, n]
        return wave.transpose(1, 2).flatten(1)[:, part.start * rate : part.stop * rate, None]

    return sound


@pytest.mark.parametrize("n", [1, 11, 12, 50])
def test_point_7_the_wave_has_no_gaps_and_no_seams_where_context_is_its_reach(n):
    x, whole = random(n), vocoder()(random(n), Part(0, 0, n))
    wide, narrow = (played(Windowed(vocoder(), 12, c, c, rate=6), x, [5] * 9) for c in (3, 1))
    assert wide.shape[1] == 6 * n and torch.allclose(wide, whole, rtol=0, atol=1e-12)
    assert narrow.shape == wide.shape and (n <= 12 or float((narrow - whole).abs().max()) > 1e-3)


def test_point_8_what_is_held_and_done_is_flat():
    seen, state, sizes = [], None, []
    operator = Windowed(lambda w, part: seen.append(w.shape[1]) or w[:, part.start : part.stop], 24, 48, 24)
    state = operator.reset()
    for _ in range(100):
        _, state = operator.step(random(24), state)
        sizes.append(state.nbytes)
    assert max(seen) == 96 and sizes[4:] == [sizes[4]] * 96


# -- sessions and mistakes ---------------------------------------------------------------------------------------------


def test_states_are_kept_saved_and_cut_back():
    operator, x = Windowed(LAYERS[0], 5, 3, 4), random(40)
    _, state = operator.step(x[:, :23], operator.reset())
    after = [operator.step(x[:, 23:], s)[0] for s in (state, operator.load(state.state_dict()))]
    assert torch.equal(*after) and state.position == 23
    _, longer = operator.step(x[:, 23:26] + 1, operator.truncate(state, 0))
    back = operator.truncate(longer, 2)  # item 23 was seen by the chunk that ended with 19, and is what came second
    assert back.position == 24
    with pytest.raises(ValueError, match="keep an earlier state"):
        operator.truncate(longer, 3)
    good = state.state_dict()
    for bad in ({}, {**good, "done": torch.tensor(99)}, {**good, "held": good["held"][:, 1:]}):
        with pytest.raises(ValueError, match="state"):
            try:
                operator.load(bad)
            except ValueError as wrong:
                raise ValueError(f"state: {wrong}") from None


def test_mistakes_are_told_and_change_nothing():
    operator = Windowed(LAYERS[0], 5, 3, 4)
    _, state = operator.step(random(7), operator.reset())
    for bad, match in (
        (random(3)[:1], "those before"), (random(3).float(), "those before"), (random(3)[0, 0], "B, t"),
        (random(3) * torch.nan, "NaN"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            operator.step(bad, state)
    assert torch.equal(
        operator.step(random(20), state)[0], operator.whole(torch.cat([random(7), random(20)], 1))[:, :20]
    )
    with pytest.raises(ValueError, match="outputs"):
        Windowed(lambda w, part: w[:, :1], 3).whole(random(3))
    with pytest.raises(ValueError, match="chunk"):
        Windowed(LAYERS[0], 0)
    with pytest.raises(ValueError, match="share one"):
        Stacked((Windowed(LAYERS[0], 4), Windowed(LAYERS[1], 5)))
    with pytest.raises(ValueError, match="first"):
        noise_at(0, -1, 3)
    assert operator.flush(operator.reset())[0] is None
