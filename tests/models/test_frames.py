"""A session whose layers wait for the next frame equals reading films whole, and is undone, copied and saved."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory import FastWeights
from evenflow.memory.fast_weights import flushed, frame_convolution
from evenflow.models.hybrid import PRESETS, FastLayer, FrameSession, Hybrid, HybridSession, Windowed, in_a_row

ROWS, COLUMNS, FRAME = 2, 3, 6
CONFIG = replace(PRESETS["toy-spatial"], window=9, rule=FastWeights(chunk=7))


@cache
def network(config=CONFIG):
    torch.manual_seed(0)
    model = Hybrid(config).double().eval()
    for block in model.blocks:
        if isinstance(block.mixer, FastLayer):
            for parameter in (block.mixer.conv, block.mixer.gate.weight, block.mixer.offset):
                torch.nn.init.normal_(parameter, std=0.5)
            block.mixer.bias = -2.0  # steps large enough to be seen
    return model.requires_grad_(False)


def film(count, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, ROWS, COLUMNS, CONFIG.dim, generator=made, dtype=torch.float64)


def film_places(base, count):
    row, column = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    grid = torch.stack([row, column], -1).reshape(-1, 2) + base
    return torch.cat([torch.cat([torch.full((FRAME, 1), base + n), grid], 1) for n in range(count)])


def whole(model, parts):
    """The definition: layer by layer over everything, each film convolved as a whole. parts: ids, or frames."""
    embedded, places, films, free = [], [], [], 0
    for part in parts:
        at = sum(len(p) for p in places)
        if part.ndim == 5:
            films.append((at, part.shape[1]))
            embedded.append(part.flatten(1, 3))
            places.append(film_places(free, part.shape[1]))
        else:
            embedded.append(model.embedding(part)[None])
            places.append(in_a_row(free, len(part)))
        free = int(places[-1].max()) + 1
    x, attend = torch.cat(embedded, 1), Windowed(model.config, torch.cat(places), torch.float64)
    for number, block in enumerate(model.blocks):
        h, own = block.norm(x), model.attends(number, attend)
        if not isinstance(block.mixer, FastLayer):
            x = block.fed(x + block.mixer(h, own))
            continue
        heads = block.mixer.projected(h)
        wide = [one.clone() for one in block.mixer.widened(*heads)]
        for one, weight in zip(wide, block.mixer.conv, strict=True):
            for at, count in films:
                here = slice(at, at + count * FRAME)
                some, tail = frame_convolution(one[:, here].unflatten(1, (count, ROWS, COLUMNS)).clone(), weight)
                one[:, here] = torch.cat([some, flushed(weight, tail)], 1).flatten(1, 3)
        x = block.fed(x + block.mixer.read(h, heads, wide, own, attend.turn, block.mixer.empty(1))[0])
    return model.norm(x)


def streamed(session, parts, sizes=(100,)):
    """Logits in order; frames come `sizes` at a time, in turn."""
    out, turn = [], 0
    for part in parts:
        if part.ndim == 5:
            at = 0
            while at < part.shape[1]:
                size = sizes[turn % len(sizes)]
                out.append(session.model.logits(session.see(part[:, at : at + size])))
                at, turn = at + size, turn + 1
            out.append(session.model.logits(session.flush()))
        else:
            out.append(session.feed(part))
    return torch.cat(out, 1)


PARTS = [torch.tensor([3, 4, 5]), film(5), torch.tensor([6, 7]), film(4, 1), film(1, 2), torch.tensor([8, 9, 1])]


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_films_in_any_pieces_equal_films_read_whole(sizes):
    model = network()
    want, session = whole(model, PARTS), FrameSession(model)
    got = streamed(session, PARTS, sizes)
    torch.testing.assert_close(got, model.logits(want), rtol=0, atol=1e-10)
    assert session.position == want.shape[1] == 3 + 2 + 3 + 10 * FRAME


def test_a_whole_film_is_what_the_network_says_of_it_at_once():
    model, frames = network(), film(6)
    attend = Windowed(CONFIG, film_places(0, 6), torch.float64)
    want, _ = model(frames.flatten(1, 3), attend, turn=attend.turn, grid=(6, ROWS, COLUMNS))
    torch.testing.assert_close(streamed(FrameSession(model), [frames], (1,)), model.logits(want), rtol=0, atol=1e-10)


def test_output_is_late_by_a_frame_a_layer_that_looks_ahead():
    session = FrameSession(network())
    counts = [session.see(film(1, n)).shape[1] // FRAME for n in range(6)]
    assert session.look_ahead == 3 and counts == [0, 0, 0, 1, 1, 1]
    assert session.flush().shape[1] == 3 * FRAME and not session.flush().shape[1]


def test_words_end_a_film():
    model = network()
    one, other = FrameSession(model), FrameSession(model)
    one.see(film(4))
    other.see(film(4))
    other.flush()
    assert torch.equal(one.feed(torch.tensor([3, 4])), other.feed(torch.tensor([3, 4])))


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("undo", [0, 5, 14])
def test_what_is_undone_never_came(undo):
    """From within a film too, whose frames under way come back."""
    model, ids = network(), torch.tensor([1, 2, 3, 4])
    for frames, words in ((0, 0), (2, 0), (3, 1), (3, 4)):
        session, witness = FrameSession(model, undo=undo), FrameSession(model)
        for one in (session, witness):
            one.feed(ids)
            one.see(film(2))
            if one is session:
                one.see(film(3, 1))
                one.feed(ids)
            else:
                if frames:
                    one.see(film(3, 1)[:, :frames])
                if words:
                    one.feed(ids[:words])
        before, n = session.fork(), (3 - frames) * FRAME + 4 - words
        try:
            session.truncate(n)
        except ValueError as error:
            assert "larger undo" in str(error) and n > undo and same(session, before)
            continue
        assert same(session, witness) and session.position == witness.position
        assert torch.equal(session.see(film(2, 5)), witness.see(film(2, 5)))


def test_saved_forked_and_forgotten_within_a_film():
    model = network()
    session = FrameSession(model)
    session.feed(torch.tensor([3, 4]))
    session.see(film(3))
    twin, loaded = session.fork(), FrameSession(model)
    loaded.load_state_dict(session.state_dict())
    outs = []
    for one in (session, twin, loaded):
        parts = [one.see(film(2, 3)), one.flush()]
        outs.append(torch.cat([model.logits(x) for x in parts] + [one.feed(torch.tensor([5]))], 1))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]) and same(session, loaded)
    session.reset()
    assert session.position == 0 and same(session, FrameSession(model))


def test_what_is_saved_of_a_bounded_session_stays_bounded():
    session = FrameSession(network(), anchor=12)
    for n in range(6):
        session.see(film(1, n))
    loaded = FrameSession(network(), anchor=12)
    loaded.load_state_dict(session.state_dict())
    for n in range(6, 9):
        assert torch.equal(session.see(film(1, n)), loaded.see(film(1, n))) and loaded.nbytes == session.nbytes


def test_bytes_are_bounded_where_all_layers_have_a_window():
    session, sizes = FrameSession(network(), undo=6, anchor=12), []
    for n in range(30):
        session.see(film(1, n))
        sizes.append(session.nbytes)
    assert max(sizes[:15]) == max(sizes[15:])


def test_what_is_refused_leaves_it_as_it_was():
    session = FrameSession(network(), undo=6)
    session.see(film(2))
    before, broken = session.fork(), film(1)
    broken[..., 0] = torch.nan
    for call, message in (
        (lambda: session.see(broken), "finite"),
        (lambda: session.see(film(1)[:, :, :1]), "end it with `flush`"),
        (lambda: session.see(film(1)[0]), "expected"),
        (lambda: session.see(film(1), torch.zeros(2, 3)), "whole numbers"),
        (lambda: session.feed(torch.tensor([64])), "0 to 63"),
        (lambda: session.truncate(1), "would be cut"),
        (lambda: session.truncate(99), "12 have come"),
        (lambda: session.load_state_dict({}), "`numbers` is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert same(session, before)
    with pytest.raises(ValueError, match="HybridSession"):
        FrameSession(Hybrid(PRESETS["toy"]))
    with pytest.raises(ValueError, match="no layers with fast weights"):
        FrameSession(Hybrid(replace(PRESETS["toy"], pattern=("full",))))
    with pytest.raises(ValueError, match="FrameSession"):
        HybridSession(Hybrid(replace(PRESETS["toy"], pattern=("window", "fast"))))
