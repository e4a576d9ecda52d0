"""Linked memories equal their definition, in every layout; they are flat, undone, copied and saved exactly, and refuse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory import Clock, Linked, Rate, Rope, linked_step, read_state, write_state

from .linked_drive import READS, SMALL, definition, draw, feed, tiny

PLAIN = {"layers": 1, "heads": 2, "head_dim": 6, "dtype": torch.float64}


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """So that reads of several pieces are cut into several products."""
    monkeypatch.setattr(linked_step, "QUERIES", 5)


def played(state, video, seed=0, passes=0):
    """A whole stream of so many video latents: what was drawn and read, by read, over all blocks."""
    drawn, out = {}, {}
    for latents in state.linked.blocks(video):
        for n in range(passes):
            feed(state, draw(state, latents.video, 50 + n), latents.video, commit=False)
        fresh = draw(state, latents.video, seed)
        for key, one in feed(state, fresh, latents.video).items():
            out.setdefault(key, []).append(one)
            drawn.setdefault(key, []).append(fresh[key])
    return (
        {key: [torch.cat(x, 2) for x in zip(*parts, strict=True)] for key, parts in drawn.items()},
        {key: torch.cat(parts, 2) for key, parts in out.items()},
    )


def off(state, video, **kw):
    drawn, out = played(state, video, **kw)
    return max(
        float((out[key][row] - definition(state.linked, key[1], *(x[row] for x in drawn[key]), video)).abs().max())
        for key in out
        for row in range(state.geometry["video"].batch)
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the definition --------------------------------------------------------------------------------------------------


@settings(max_examples=16, deadline=None)
@given(
    window=st.integers(1, 4), undo=st.integers(0, 2), sinks=st.integers(0, 4), more=st.integers(0, 14),
    first=st.sampled_from([(1, 1), (4, 26), (2, 9)]), kv_heads=st.sampled_from([1, 2]), late=st.integers(0, 2),
    passes=st.integers(0, 1),
)  # fmt: skip
def test_every_layout_equals_the_definition(window, undo, sinks, more, first, kv_heads, late, passes):
    horizon = window + late if late else None
    linked = Linked(window=window, undo=undo, sinks=sinks, first=first, grid=(1, 2), horizon=horizon)
    state = linked.build(**PLAIN, kv_heads=kv_heads)
    assert off(state, first[0] + more, passes=passes) < 1e-9
    blocks = linked.blocks(first[0] + more)
    assert state.position == (first[0] + more, sum(b.audio for b in blocks))
    assert state.held(0) == [0, *range(max(1, len(blocks) - window), len(blocks))]


def test_heads_of_its_own_for_every_read_and_rows_of_a_batch():
    state = Linked(**SMALL).build(
        layers=2, heads=2, head_dim=4, batch=2, dtype=torch.float64, video={"heads": 3, "head_dim": 10, "value_dim": 7},
        a2v={"kv_heads": 1},
    )  # fmt: skip
    assert off(state, 8) < 1e-9


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_other_dtypes(dtype, limit):
    linked = Linked(**SMALL)
    drawn, out = played(linked.build(**PLAIN | {"dtype": dtype}), 10)
    assert out[0, "a2v"].dtype == dtype
    for (layer, read), qkv in drawn.items():
        expected = definition(linked, read, *(x[0].double() for x in qkv), 10)
        assert (out[layer, read][0].double() - expected).abs().max() < limit


def test_softcap_scale_sink_logits_and_no_rotation():
    logits = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    bring = {"rope": None, "scale": 0.4, "softcap": 3.0, "sink_logits": logits}
    for undo in (0, 2):  # in one piece, and in two
        state = Linked(**SMALL | {"undo": undo}).build(**PLAIN, **bring)
        drawn, out = played(state, 13)
        q, k, v = (x[0] for x in drawn[0, "v2a"])
        rows = slice(-25, None)
        keys, values = (torch.cat([x[:, :4], x[:, -36:]], 1) for x in (k, v))
        scores = 3 * torch.tanh(0.4 * q[:, rows] @ keys.mT / 3)
        weights = torch.cat([scores, logits.reshape(2, 1, 1).expand(-1, 25, 1)], -1).softmax(-1)[..., :-1]
        torch.testing.assert_close(out[0, "v2a"][0, :, rows], weights @ values, rtol=0, atol=1e-12)


def test_a_rope_of_the_model_s_own_turns_every_head_alike():
    rope, linked = Rope(inv_freq=(1e-3, 1e-4, 1e-5), style="interleaved"), Linked(**SMALL)
    state = linked.build(**PLAIN, a2v={"rope": rope, "heads": 4, "kv_heads": 2})
    drawn, out = played(state, 4)
    q, k, v = (x[0] for x in drawn[0, "a2v"])
    place = {"video": torch.cat([linked.places("video", b)[:, 0] for b in (0, 1)]).double(),
             "audio": torch.cat([linked.places("audio", b)[:, 0] for b in (0, 1)]).double()}  # fmt: skip
    scores = torch.zeros(4, len(place["video"]), len(place["audio"]), dtype=torch.float64)
    for c, w in enumerate(rope.inv_freq):
        a, b = (torch.complex(x[..., 2 * c].contiguous(), x[..., 2 * c + 1].contiguous()) for x in (q, k))
        a, b = a * torch.exp(1j * place["video"] * w), b * torch.exp(1j * place["audio"] * w)
        scores += (a[:, :, None] * b.conj().repeat_interleave(2, 0)[:, None]).real
    scores[:, :4, 4:] = -torch.inf  # block 0 sees itself only: 3 sinks and one latent
    expected = (scores * 6**-0.5).softmax(-1) @ v.repeat_interleave(2, 0)
    torch.testing.assert_close(out[0, "a2v"][0], expected, rtol=0, atol=1e-10)


def test_rates_that_need_longer_blocks():
    clock = Clock(audio=Rate(50, 4))  # 12.5 latents a second
    with pytest.raises(ValueError, match=r"1 s are 25/2 latents.*make it longer"):
        Linked(clock=clock)
    linked = Linked(clock=clock, seconds=2)
    assert linked.latents(3) == (6, 25) and linked.starts(3) == (13, 51)
    ends = [(linked.places(name, 3)[-1, 0] - linked.places(name, 2)[-1, 0]).item() for name in ("video", "audio")]
    assert ends == [2 * clock.ticks] * 2


def test_places_are_exact_days_later():
    """The same block of seconds, three days on: reads differ by rounding only, where all that is seen moved along."""
    linked = Linked(**SMALL | {"sinks": 0, "horizon": 3})
    early, late = (linked.build(**PLAIN) for _ in range(2))
    outs = {}
    for name, state, jump in (("early", early, 3), ("late", late, 3 * 86_400)):
        for n in range(6):
            if n == 1:
                state.blocks = state._oldest = jump  # as if there had been more
            outs[name] = feed(state, {key: [x.clone() for x in qkv] for key, qkv in fixed(n, linked).items()})
    for key, one in outs["early"].items():
        torch.testing.assert_close(one, outs["late"][key], rtol=0, atol=1e-9)


def fixed(n, linked):
    """Draws for the n-th fed block, whatever its number."""
    state = linked.build(**PLAIN)
    state.blocks = min(n, 1)
    return draw(state, seed=n)


# -- flat ------------------------------------------------------------------------------------------------------------


def test_nothing_is_allocated_copied_or_moved_as_blocks_come():
    state = Linked(**SMALL).build(**PLAIN)
    size, where = state.nbytes, {t.data_ptr() for ring in state.rings.values() for t in (*ring.keys, *ring.values)}
    for n in range(12):
        before = {read: ring.keys[0].clone() for read, ring in state.rings.items()}
        feed(state, draw(state))
        for read, ring in state.rings.items():
            changed = (ring.keys[0] != before[read]).any(-1).any(1)[0].nonzero().flatten().tolist()
            start = ring.start(n)
            assert changed == [*range(start, start + (ring.size if n else ring.head))]
    assert state.nbytes == size
    assert where == {t.data_ptr() for ring in state.rings.values() for t in (*ring.keys, *ring.values)}


def test_a_pass_that_is_not_committed_leaves_no_trace():
    state, other = (Linked(**SMALL | {"horizon": 3}).build(**PLAIN) for _ in range(2))
    for _ in range(7):
        feed(other, draw(other, seed=7), commit=False)
        feed(other, draw(other, seed=8), commit=False)
        outs = [feed(one, draw(one)) for one in (state, other)]
        assert same(*({str(k): x for k, x in out.items()} for out in outs))
        assert same(state.state_dict(), other.state_dict())


# -- undo, copy, save ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [None, 3])
@pytest.mark.parametrize("undo", [1, 3])
def test_undone_blocks_were_never_there(undo, horizon):
    linked = Linked(**SMALL | {"undo": undo, "horizon": horizon})
    for fed in (3, 4, 9):
        state, never = linked.build(**PLAIN), linked.build(**PLAIN)
        for _ in range(fed):
            feed(never, draw(never))
        for _ in range(fed):
            feed(state, draw(state))
        for n in range(undo):
            feed(state, draw(state, 2 if n == undo - 1 else None, seed=3), 2 if n == undo - 1 else None)
        state.truncate(undo)
        assert state.position == never.position and state.held(0) == never.held(0)
        for _ in range(4):
            a, b = (feed(one, draw(one, seed=4)) for one in (state, never))
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_undo_beyond_what_is_left_is_refused_and_all_can_be_undone_before():
    state = Linked(**SMALL).build(**PLAIN)
    for _ in range(6):
        feed(state, draw(state))
    saved = state.state_dict()
    for n in (1, 4):
        with pytest.raises(ValueError, match=rf"cannot undo {n} blocks.*build with undo={n}"):
            state.truncate(n)
    with pytest.raises(ValueError, match="there are 6"):
        state.truncate(7)
    assert same(saved, state.state_dict())
    state.truncate(5)  # block 0 is never evicted
    assert state.held(0) == [0] and state.position == (1, 1)
    never = Linked(**SMALL).build(**PLAIN)
    feed(never, draw(never))
    for _ in range(4):
        a, b = (feed(one, draw(one, seed=4)) for one in (state, never))
        assert all(torch.equal(a[key], b[key]) for key in a)
    state.truncate(0)
    state.reset()
    assert state.position == (0, 0) and state.held(0) == []


@settings(max_examples=12, deadline=None)
@given(video=st.integers(1, 16), undo=st.integers(0, 1), horizon=st.sampled_from([None, 3, 4]))
def test_saved_and_forked_streams_go_on_bit_for_bit(tmp_path_factory, video, undo, horizon):
    linked = Linked(**SMALL | {"undo": undo, "horizon": horizon})
    state, again = linked.build(**PLAIN), linked.build(**PLAIN)
    played(state, video)
    path = tmp_path_factory.mktemp("linked") / "state"
    write_state(path, state.state_dict(), {})
    again.load_state_dict(read_state(path)[0])
    twin = state.fork()
    assert again.position == state.position and same(again.state_dict(), state.state_dict())
    if (video - 1) % 3:
        for one in (state, again, twin):
            with pytest.raises(ValueError, match="the stream has ended"):
                one.step().__enter__()
        return
    for _ in range(4):
        outs = [feed(one, draw(one, seed=5)) for one in (state, again, twin)]
        assert all(torch.equal(outs[0][key], out[key]) for key in outs[0] for out in outs[1:])
    feed(state, draw(state))
    assert twin.position != state.position


@pytest.mark.parametrize(
    "harm", ["missing", "unknown", "shape", "dtype", "layout", "counts", "counts shape", "partial"]
)
def test_a_state_that_does_not_fit_changes_nothing(harm):
    state, other = (Linked(**SMALL).build(**PLAIN) for _ in range(2))
    played(state, 10)
    played(other, 4, seed=2)
    saved, kept = state.state_dict(), other.state_dict()
    name = "v2a.layers.0.values"
    if harm == "missing":
        del saved[name]
    elif harm == "unknown":
        saved["more"] = torch.zeros(1)
    elif harm == "shape":
        saved[name] = saved[name][:, :, 1:]
    elif harm == "dtype":
        saved[name] = saved[name].float()
    elif harm == "layout":
        saved["layout"] = torch.tensor(Linked(**SMALL | {"first": (2, 1), "sinks": 3}).build(**PLAIN)._layout())
    else:
        saved["blocks"] = torch.tensor({"counts": [4, 3, 0], "partial": [4, 2, 3], "counts shape": [4, 2]}[harm])
    if harm == "counts":
        with pytest.raises(ValueError, match=r"these memories hold"):
            other.load_state_dict(saved)
    else:
        with pytest.raises(ValueError, match=r"does not fit|these memories (hold|have)|impossible"):
            other.load_state_dict(saved)
    assert same(kept, other.state_dict())


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_bad_step_leaves_the_memories_as_they_were():
    state = Linked(**SMALL | {"undo": 1}).build(**PLAIN)
    played(state, 10)
    saved, good = state.state_dict(), draw(state)
    for read in READS:
        bad = {key: [x.clone() for x in qkv] for key, qkv in good.items()}
        bad[0, read][2][0, 0, -1, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            feed(state, bad)
    with pytest.raises(RuntimeError, match=r"before the reads \[\(0, 'v2a'\)\] were made"):
        feed(state, {key: x for key, x in good.items() if key[1] != "v2a"})
    q, k, v = good[0, "a2v"]
    cases = [
        ((0, "a2v", q[:, :, 1:], k, v), ValueError, r"q of a2v is .* expected torch.float64 \(1, 2, 12, 6\) in block 4"),
        ((0, "a2v", q, k, v.float()), ValueError, "v of a2v is torch.float32"),
        ((1, "a2v", q, k, v), ValueError, "there is no layer 1"), ((0, "v2v", q, k, v), ValueError, "'a2v', 'v2a'"),
    ]  # fmt: skip
    with state.step(commit=False) as step:
        for call, error, words in cases:
            with pytest.raises(error, match=words):
                step.attend(*call)
        step.attend(0, "a2v", q, k, v)
        with pytest.raises(RuntimeError, match="twice"):
            step.attend(0, "a2v", q, k, v)
        for refused in (state.state_dict, state.reset, state.fork, lambda: state.truncate(0), state.step().__enter__):
            with pytest.raises(RuntimeError, match="while a step is open"):
                refused()
    with pytest.raises(RuntimeError, match="this step is over"):
        step.attend(0, "a2v", q, k, v)
    for video in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match="video"):
            state.step(video).__enter__()
    assert same(saved, state.state_dict())
    state.truncate(1)  # what a bad pass wrote into its own place is never read
    never = Linked(**SMALL | {"undo": 1}).build(**PLAIN)
    played(never, 7)
    for video in (None, 1):
        a, b = (feed(one, draw(one, video, seed=4), video) for one in (state, never))
        assert all(torch.equal(a[key], b[key]) and a[key].isfinite().all() for key in a)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"window": 0}, "window is 0"), ({"sinks": -1}, "sinks is -1"), ({"first": (1,)}, "two whole numbers"),
        ({"grid": (0, 4)}, "grid is 0"), ({"undo": True}, "undo is True"), ({"horizon": 5}, "horizon is 5.* 6 or more"),
    ],
)  # fmt: skip
def test_layouts_that_make_no_sense(layout, words):
    with pytest.raises(ValueError, match=words):
        Linked(**layout)


def test_geometries_that_make_no_sense():
    linked = Linked(**SMALL)
    with pytest.raises(ValueError, match=r"video has \['layers'\] of its own"):
        linked.build(**PLAIN, video={"layers": 3})
    with pytest.raises(ValueError, match="ALiBi or `reach`"):
        linked.build(**PLAIN, a2v={"reach": 4})
    with pytest.raises(ValueError, match="cannot be turned on 3 axes"):
        linked.build(layers=1, heads=2, head_dim=2)
    with pytest.raises(ValueError, match="multiple of patch 3"):
        replace(Clock(), patch=3)


def test_a_model_streams_as_it_packs_in_two_pieces():
    duet = tiny(undo=2, window=3)
    video, audio = duet.inputs(20)
    with torch.no_grad():
        packed = duet.packed(video, audio)
    for got, expected in zip(duet.stream(duet.build(), video, audio), packed, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
