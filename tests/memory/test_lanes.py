"""Two lanes equal their definition whatever the cut, the order and the thread, and refuse what would break them."""

import gc
import threading
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory import Rope, lane_step, lane_store, read_state, write_state
from evenflow.memory.attention import softmax_attention
from evenflow.memory.lane_masks import packed_loss, packed_mask, packed_positions
from evenflow.memory.lane_places import Decoupled, Gapped
from evenflow.memory.lanes import Lanes
from evenflow.recipes.reference import lanes as oracle

from .lanes_drive import AXES, PLACES, grid, part, script

GEOMETRY = {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "dtype": torch.float64}
SCHEMES = sorted(PLACES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that lanes of a few tokens lie in several blocks, and their steps are cut into several products."""
    monkeypatch.setattr(lane_store, "FIRST", 4)
    monkeypatch.setattr(lane_step, "QUERIES", 3)


def qkv(m, state, seed=0):
    g, made = state.geometry, torch.Generator().manual_seed(seed)
    sizes = ((g.heads, g.head_dim), (g.kv_heads, g.head_dim), (g.kv_heads, g.value_dim))
    return [torch.randn(g.batch, h, m, d, generator=made, dtype=torch.float64).to(g.dtype) for h, d in sizes]


def feed(context, m, state, seed=0):
    with context as step:
        return [step.attend(layer, *qkv(m, state, seed + layer)) for layer in range(state.geometry.layers)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def begun():
    """A unit that is read and half said, and the next one read in part."""
    state = Lanes().build(**GEOMETRY)
    feed(state.read(5, 0), 5, state)
    state.close("source", 0)
    feed(state.write(2, 0), 2, state, 1)
    feed(state.read(3, 1), 3, state, 2)
    return state


# -- the definition --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    source=st.lists(st.integers(0, 9), min_size=1, max_size=4), said=st.data(), scheme=st.sampled_from(SCHEMES),
    kv_heads=st.sampled_from([1, 2, 4]), held=st.integers(0, 1), ahead=st.integers(0, 4), seed=st.integers(0, 99),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), style=st.sampled_from(["half", "interleaved", None]),
)  # fmt: skip
def test_any_cut_and_any_order_equal_the_definition(source, said, scheme, kv_heads, held, ahead, seed, sizes, style):
    least = 1 if held else 0
    target = said.draw(st.lists(st.integers(least, 6), min_size=len(source), max_size=len(source)))
    if not sum(source):
        source = [*source[:-1], 1]
    rope = None if style is None else Rope(style=style)
    stream = script(source, target, kv_heads=kv_heads, held=held, rope=rope, seed=seed, layers=1)
    stream.play(stream.build(scheme), ahead, sizes)
    assert stream.off(stream.reference(scheme)) < 1e-10
    packed = stream.packed(scheme)
    assert stream.off(packed) < 1e-10


UNITS = ([3, grid(2, 2, 3)], [grid(1, 3, 2), grid(2, 1, 5), 2], [grid(1, 1, 2), 1, grid(2, 2, 2, first=2)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", [(100,), (1,), (4, 1, 2)])
def test_pictures_on_three_axes_equal_the_definition(scheme, sizes):
    stream = script(UNITS, [3, 1, 4], rope=AXES, held=1)
    stream.play(stream.build(scheme), sizes=sizes)
    assert stream.off(stream.reference(scheme)) < 1e-10
    assert stream.off(stream.packed(scheme)) < 1e-10


@pytest.mark.parametrize("scheme", ["decoupled", "gap"])
def test_a_video_may_be_one_run_through_all_units(scheme):
    units = [[2, grid(1, 2, 3)], [grid(1, 2, 3, first=2)], [grid(1, 2, 3, first=4), 2]]
    stream = script(units, [2, 2, 2], rope=AXES)
    state = stream.build(scheme, origin="video")
    stream.play(state, sizes=(4,))
    assert stream.off(stream.reference(scheme, whole=True)) < 1e-10
    assert stream.off(stream.packed(scheme, origin="video")) < 1e-10
    assert state.positions("source")[:, 0].tolist() == [0, 1, *[2] * 6, *[4] * 6, *[6] * 6, 7, 8]
    assert state.positions("source")[2:14, 2].tolist() == [2, 3, 4] * 4  # columns begin again in every grid


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_two_threads_equal_the_definition(scheme, kv_heads):
    stream = script([7, 5, 0, 6, 3, 8], [3, 1, 4, 2, 1, 5], kv_heads=kv_heads, held=1)
    state = stream.build(scheme)
    stream.play_threads(state, (2, 1, 3))
    assert stream.off(stream.reference(scheme)) < 1e-10
    assert state.position == (29, 16) and state.units == (6, 6)


def test_a_reader_is_really_ahead_of_a_writer_that_is_in_the_middle_of_a_step():
    """The writer's step is open, and its first layer has attended, while all that is left is read."""
    stream = script([4, 6, 9], [3, 2, 2])
    state, alone = stream.build(), stream.build()
    stream.play(alone, ahead=0)
    expected = stream.results()["target"]
    state = stream.build()
    stream.read(state, 0)
    calls = [part(layer[0], slice(0, 3)) for layer in stream.target]
    with state.write(3, 0) as step:
        outs = [step.attend(0, *(x[None] for x in (calls[0].q, calls[0].k, calls[0].v)))[0]]
        reader = threading.Thread(target=lambda: [stream.read(state, unit, (2,)) for unit in (1, 2)])
        reader.start()
        reader.join(30)
        assert state.units.source == 3 and state.position == (19, 0)
        outs.append(step.attend(1, *(x[None] for x in (calls[1].q, calls[1].k, calls[1].v)))[0])
    for out, there in zip(outs, expected, strict=True):
        assert torch.equal(out, there[:, :3])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_seen_later_changes_nothing_that_was_said(scheme):
    """By perturbation: causal in both lanes, token by token."""
    stream = script([3, 4, 3], [2, 3, 2])
    base = {name: [x.clone() for x in layers] for name, layers in stream.play(stream.build(scheme)).items()}
    for lane, firsts in (("source", [0, 3, 7]), ("target", [0, 2, 5])):
        for unit, first in enumerate(firsts):
            changed = replace(stream, **{lane: [[*layer] for layer in getattr(stream, lane)]})
            for layer in getattr(changed, lane):
                layer[unit] = replace(layer[unit], v=layer[unit].v + 1)
            now = changed.play(changed.build(scheme))
            for layer in range(2):
                for name in ("source", "target"):
                    differs = (now[name][layer] != base[name][layer]).any(-1).any(0).tolist()
                    across = [0, 2, 5][unit] if lane == "source" else 10
                    begin = first if name == lane else across
                    assert not any(differs[:begin]) and all(differs[begin:])


def test_steps_in_and_outside_of_inference_mode():
    stream = script([5, 3, 4], [2, 3, 2], held=1)
    state = stream.build()
    for unit in range(3):
        with torch.inference_mode(unit != 1):
            stream.read(state, unit)
            stream.write(state, unit)
    assert stream.off(stream.reference()) < 1e-10


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_other_dtypes(dtype, limit):
    stream = script([5, 3, 4], [2, 3, 2], held=1)
    stream.play(stream.build(dtype=dtype), sizes=(2, 3))
    assert stream.results()["target"][0].dtype == dtype
    assert stream.off(stream.reference()) < limit


def test_rows_of_a_batch_and_what_a_model_brings():
    """Softcap, sink logits, own scale, values of another width; every row as if alone."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]], dtype=torch.float64)
    state = Lanes().build(
        layers=1, heads=4, kv_heads=2, head_dim=6, value_dim=5, rope=None, scale=0.4, softcap=3.0, sink_logits=logits,
        batch=3, dtype=torch.float64,
    )  # fmt: skip
    (seen,) = feed(state.read(7, 0), 7, state)
    state.close("source", 0)
    (said,) = feed(state.write(5, 0), 5, state, 9)
    q, k, v = (torch.cat(pair, 2) for pair in zip(qkv(7, state), qkv(5, state, 9), strict=True))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    bias = torch.zeros(12, 12, dtype=torch.float64).masked_fill(~mask, -torch.inf)[None, None]
    expected = softmax_attention(q, k, v, bias, 0.4, 3.0, logits.reshape(1, 4, 1, 1))
    torch.testing.assert_close(torch.cat([seen, said], 2), expected, rtol=0, atol=1e-12)


# -- packed ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    order=st.lists(st.tuples(st.booleans(), st.integers(-1, 3)), min_size=1, max_size=12), shift=st.booleans()
)  # fmt: skip
def test_the_packed_mask_equals_the_rule_pair_by_pair(order, shift):
    lanes = [sorted(u for said, u in order if said is lane and u >= 0) for lane in (False, True)]
    row = [(said, lanes[said].pop(0) if u >= 0 else -1) for said, u in order]
    mask = packed_mask(*(torch.tensor(x) for x in zip(*row, strict=True)), shift=shift)
    for i, (asks, own) in enumerate(row):
        later = [u for said, u in row[i + 1 :] if said and u >= 0]
        sees = later[0] if asks and shift and own >= 0 and later else own
        for j, (said, unit) in enumerate(row):
            if unit < 0:
                expected = i == j
            elif said:
                expected = asks and j <= i
            else:
                expected = unit <= sees if asks else j <= i
            assert bool(mask[i, j]) == (expected or i == j)


def test_a_batch_of_packed_rows_is_padded():
    target = torch.tensor([[False, False, True, True], [False, True, True, False]])
    unit = torch.tensor([[0, 1, 0, 1], [0, 0, 0, -1]])
    mask = packed_mask(target, unit, shift=True)
    for row in range(2):
        assert torch.equal(mask[row], packed_mask(target[row], unit[row], shift=True))
    assert not mask[1, :3, 3].any() and mask.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_positions_equal_the_definition(scheme):
    units = [[2, grid(1, 2, 2)], [0], [grid(3, 1, 1), 4], [1]]
    stream = script(units, [3, 0, 6, 1], rope=AXES)
    expected = oracle.places(stream.coordinates, [3, 0, 6, 1], scheme=scheme, axes=3)
    for got, there in zip(packed_positions(PLACES[scheme], units, [3, 0, 6, 1], axes=3), expected, strict=True):
        assert got.tolist() == [list(place) for unit in there for place in unit]


def test_the_loss_counts_what_was_said_and_learned():
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 5, generator=made, dtype=torch.float64)
    ids = torch.randint(5, (2, 7), generator=made)
    target = torch.tensor(
        [[False, True, True, False, True, True, False], [True, False, False, True, False, True, True]]
    )
    learned = torch.tensor([[True] * 7, [True, True, True, False, True, True, True]])
    terms = []
    for row in range(2):
        said = [n for n in range(7) if target[row, n]]
        for before, n in pairwise(said):
            if learned[row, n]:
                terms.append(-logits[row, before].log_softmax(-1)[ids[row, n]])
    torch.testing.assert_close(packed_loss(logits, ids, target, learned), torch.stack(terms).mean())
    with pytest.raises(ValueError, match="no token counts"):
        packed_loss(logits, ids, torch.zeros_like(target), learned)


# -- the operations of a session -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["source", "target"])
def test_what_is_not_committed_or_fails_leaves_no_trace(lane):
    state = begun()
    before, unit = state.state_dict(), {"source": 1, "target": 0}[lane]
    feed_in = state.read if lane == "source" else state.write
    tried = feed(feed_in(4, unit, commit=False), 4, state, 5)
    with pytest.raises(KeyError), feed_in(4, unit) as step:
        step.attend(0, *qkv(4, state, 6))
        raise KeyError
    with pytest.raises(RuntimeError, match=r"before layers \[0\] attended"), feed_in(4, unit) as step:
        assert step.m == 4
    with pytest.raises(ValueError, match="NaN or infinity"), feed_in(4, unit) as step:
        step.attend(0, *(x.fill_(torch.nan) for x in qkv(4, state, 6)))
    with pytest.raises(RuntimeError, match="step is over"):
        step.attend(0, *qkv(4, state, 6))
    assert same(state.state_dict(), before)
    assert torch.equal(tried[0], feed(feed_in(4, unit), 4, state, 5)[0])


def test_a_question_on_the_side_may_use_several_steps():
    state = begun()
    once = feed(state.write(3, 0, commit=False), 3, state, 4)
    assert state.position == (8, 2) and torch.equal(once[0], feed(state.fork().write(3, 0), 3, state, 4)[0])


def resume(stream, state):
    """Feed one token a step, wherever each lane stands, until all is there."""
    counts = {"source": [call.q.shape[1] for call in stream.source[0]], "target": stream.counts}
    units = len(stream.runs)
    while state.units != (units, units):
        for name, feed_in in (("source", state.read), ("target", state.write)):
            unit, at = getattr(state.units, name), getattr(state.position, name)
            if unit == units or not state.wait(name, unit, 0):
                continue
            back = stream.held if name == "target" and unit + 1 < units else 0
            if at == sum(counts[name][: unit + 1]) - back:
                state.close(name, unit, held=back)
                continue
            q, k, v = (torch.cat([getattr(call, x) for call in getattr(stream, name)[0]], 1)[None] for x in "qkv")
            with feed_in(1, unit) as step:
                step.attend(0, *(x[:, :, at : at + 1] for x in (q, k, v)))


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 99), held=st.integers(0, 1), n=st.integers(0, 14),
    units=st.integers(1, 4), lane=st.sampled_from(["source", "target"]),
)  # fmt: skip
def test_undoing_is_exact_or_refused(scheme, seed, held, n, units, lane):
    """Tokens are taken back and fed again: what is there in the end is what is there without that."""
    stream = script([3, 4, 2, 5], [2, 3, 1, 2], held=held, layers=1, seed=seed)
    plain, state = stream.build(scheme), stream.build(scheme)
    stream.play(plain)
    for unit in range(units):
        stream.read(state, unit)
        stream.write(state, unit)
    if units < 4:
        stream.read(state, units)
    before, twin, length = state.state_dict(), state.fork(), getattr(state.position, lane)
    try:
        state.truncate(lane, n)
        assert getattr(state.position, lane) == length - n
    except ValueError as error:
        assert "undo" in str(error) and (n > length or lane == "source" or scheme in ("interleaved", "overlapped"))
        assert same(state.state_dict(), before)
    resume(stream, state)
    assert same(state.state_dict(), plain.state_dict())
    assert same(twin.state_dict(), before)


def test_undoing_what_the_other_lane_built_on_is_refused():
    state = begun()
    state.truncate("source", 3)
    with pytest.raises(ValueError, match="1 units were said of what was seen; undo"):
        state.truncate("source", 1)
    state.truncate("target", 2)
    state.truncate("source", 1)
    assert state.units == (0, 0) and state.position == (4, 0)  # the unit is open again
    stream = script([2, 2, 2], [2, 3, 2])
    state = stream.build("overlapped")
    stream.play(state)
    with pytest.raises(ValueError, match="unit 2 was read behind what was said of 1 units"):
        state.truncate("target", 6)
    state.truncate("target", 5)
    assert state.units == (3, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("held", [0, 1])
def test_saved_and_forked_lanes_go_on_bit_for_bit(scheme, held, tmp_path):
    stream = script([3, 6, 4, 5], [2, 3, 1, 2], held=held)
    state = stream.build(scheme)
    stream.read(state, 0)
    stream.write(state, 0)
    stream.read(state, 1)
    twin = state.fork()
    write_state(tmp_path / "lanes", state.state_dict(), {})
    loaded = Lanes(PLACES[scheme]).build(layers=2, heads=4, kv_heads=2, head_dim=12, dtype=torch.float64)
    loaded.load_state_dict(read_state(tmp_path / "lanes")[0])
    ends = []
    for one in (state, twin, loaded):
        stream.out = {name: [[] for _ in range(2)] for name in ("source", "target")}
        stream.write(one, 1)
        for unit in (2, 3):
            stream.read(one, unit)
            stream.write(one, unit)
        ends.append((one.state_dict(), stream.results()))
    for other in ends[1:]:
        assert same(ends[0][0], other[0])
        assert all(map(torch.equal, ends[0][1]["target"], other[1]["target"]))
    assert twin.nbytes and loaded.position == (18, 8)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    state = begun()
    before, good = state.state_dict(), state.state_dict()
    wrong = [
        ({k: v for k, v in good.items() if k != "target.ends"}, "missing"),
        ({**good, "more": torch.zeros(1)}, "unknown"),
        ({**good, "source.layers.0.keys": good["source.layers.0.keys"].float()}, "these lanes hold"),
        ({**good, "source.layers.0.values": good["source.layers.0.values"][:, :, :3]}, "these lanes hold"),
        ({**good, "source.ends": torch.tensor([[50, 4, 0]])}, "units that end at"),
    ]
    for bad, what in wrong:
        with pytest.raises(ValueError, match=what):
            state.load_state_dict(bad)
        assert same(state.state_dict(), before)


def test_reset_forgets_everything():
    state = begun()
    state.reset()
    assert state.position == state.units == (0, 0) and state.nbytes == 0 and state.held(0, "source") == []
    assert same(state.state_dict(), Lanes().build(**GEOMETRY).state_dict())


def test_what_is_held():
    state = begun()
    assert state.held(0, "source") == [*range(8)] and state.held(0) == [0, 1]
    with pytest.raises(ValueError, match="no layer 1"):
        state.held(1)
    with pytest.raises(ValueError, match="no lane 'sauce'"):
        state.held(0, "sauce")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda s: s.read(1, 0), "unit 0 of the source lane is closed; its open unit is 1"),
        (lambda s: s.read(1, 2), "unit 2 of the source lane comes too early; close unit 1 first"),
        (lambda s: s.write(1, 1), "unit 1 of the target lane comes too early"),
        (lambda s: s.write(0, 0), "1 or more; got 0"),
        (lambda s: s.write(1, -1), "is closed"),
        (lambda s: s.read(2, 1, {"frame": torch.zeros(2)}), "unknown tags"),
        (lambda s: s.read(2, 1, {"coordinates": torch.zeros(2, 3)}), r"expected whole numbers from 0, \(2, 1\)"),
        (lambda s: s.read(2, 1, {"coordinates": torch.tensor([[0], [-1]])}), "whole numbers from 0"),
        (lambda s: s.close("source", 0), "unit 0 of the source lane is closed"),
        (lambda s: s.close("source", 1, held=1), "held is 1"),
        (lambda s: s.close("target", 0, held=-1), "held is -1"),
        (lambda s: s.truncate("target", 3), "cannot undo 3 tokens; the target lane has 2"),
    ],
)
def test_mistakes_are_told_and_leave_the_lanes_usable(wrong, what):
    state = begun()
    before = state.state_dict()
    with pytest.raises(ValueError, match=what):
        context = wrong(state)
        feed(context, 1, state)
    assert same(state.state_dict(), before)
    feed(state.read(1, 1), 1, state)
    feed(state.write(1, 0), 1, state)


def test_a_write_before_its_unit_is_read_and_closing_twice_are_refused():
    state = Lanes().build(**GEOMETRY)
    with pytest.raises(ValueError, match="unit 0 was not read to its end"):
        feed(state.write(1, 0), 1, state)
    feed(state.read(2, 0), 2, state)
    with pytest.raises(ValueError, match="unit 0 was not read to its end"):
        feed(state.write(1, 0), 1, state)
    state.close("source", 0)
    feed(state.write(1, 0), 1, state)
    state.close("target", 0)
    for lane in ("source", "target"):
        with pytest.raises(ValueError, match=f"unit 0 of the {lane} lane is closed"):
            state.close(lane, 0)
    with pytest.raises(ValueError, match="unit 1 was not read to its end"):
        state.close("target", 1)
    assert state.units == (1, 1)


def test_a_place_that_is_not_known_yet_is_refused():
    stream = script([2, 2, 2], [1, 1, 1])
    state = stream.build("overlapped")
    for unit in (0, 1):
        stream.read(state, unit)
    with pytest.raises(ValueError, match=r"unit 2 stands behind what is said of unit 0.*Overlapped"):
        stream.read(state, 2)
    assert not state.wait("source", 2, 0.01)
    stream.write(state, 0)
    assert state.wait("source", 2, 0)
    stream.read(state, 2)
    state = stream.build("interleaved")
    stream.read(state, 0)
    with pytest.raises(ValueError, match="unit 1 stands behind what is said of unit 0"):
        stream.read(state, 1)


def test_what_was_held_back_must_come():
    stream = script([2, 2], [3, 2], held=1)
    state = stream.build()
    stream.read(state, 0)
    stream.read(state, 1)
    stream.write(state, 0)
    with pytest.raises(
        ValueError, match=r"unit 0 is not whole: its last tokens, 1 held back, must be written to unit 1"
    ):
        state.close("target", 1)
    stream.write(state, 1)
    assert stream.off(stream.reference()) < 1e-10


def test_one_step_a_lane_and_nothing_else_while_one_is_open():
    state = begun()
    with pytest.raises(RuntimeError, match="before layers"), state.read(2, 1):
        for do in (
            lambda: feed(state.read(1, 1), 1, state),
            lambda: state.close("source", 1),
            lambda: state.truncate("target", 1),
            state.fork,
            state.reset,
            state.state_dict,
        ):
            with pytest.raises(RuntimeError, match="not possible while a step is open"):
                do()
        feed(state.write(1, 0), 1, state)  # the other lane may
    with state.read(2, 1) as step:
        q, k, v = qkv(2, state)
        for bad, what in (
            ((1, q, k, v), "there is no layer 1"), ((0, q[:, :1], k, v), "q is"), ((0, q, k.float(), v), "k is")
        ):  # fmt: skip
            with pytest.raises(ValueError, match=what):
                step.attend(*bad)
        step.attend(0, q, k, v)
        with pytest.raises(RuntimeError, match="attended twice"):
            step.attend(0, q, k, v)
    assert state.position == (10, 3)


def test_what_makes_no_sense_is_refused_when_lanes_are_made():
    with pytest.raises(TypeError, match="LanePlace"):
        Lanes(place="gap")
    with pytest.raises(ValueError, match="'unit' or 'video'"):
        Lanes(origin="frame")
    with pytest.raises(ValueError, match="Overlapped places each unit anew"):
        Lanes(PLACES["overlapped"], "video")
    with pytest.raises(ValueError, match="gap is -1"):
        Gapped(-1)
    with pytest.raises(ValueError, match="no distance"):
        Lanes().build(**GEOMETRY, reach=5)
    with pytest.raises(ValueError, match="bool and whole numbers"):
        packed_mask(torch.zeros(3), torch.zeros(3, dtype=torch.int64))


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_views_copy_nothing_and_blocks_never_move():
    state = begun()
    at = [block.keys[0].data_ptr() for block in state.source.store.blocks]
    seen = state.source.store.view(0, 5)
    kept = [pair[0].clone() for pair in seen]
    for n in range(40):
        feed(state.read(3, 1), 3, state, n)
    blocks = state.source.store.blocks
    assert [block.keys[0].data_ptr() for block in blocks][: len(at)] == at
    assert [pair[0].data_ptr() for pair in seen] == [block.keys[0].data_ptr() for block in blocks][: len(seen)]
    assert all(torch.equal(now[0], before) for now, before in zip(seen, kept, strict=True))
    assert len(blocks) <= 7  # of 4, 4, 8, 16, ... tokens


@pytest.mark.parametrize("lane", ["source", "target"])
def test_a_step_allocates_next_to_nothing_of_what_it_attends(lane):
    """Counted by the allocator: scores, and not a copy of keys and values."""
    state = Lanes().build(layers=1, heads=2, kv_heads=2, head_dim=128)
    feed(state.read(1500, 0), 1500, state)
    state.close("source", 0)
    feed(state.write(500, 0), 500, state)
    fresh, held = qkv(1, state), 4 * 2 * 2 * 128 * (1500 if lane == "source" else 2000)
    with state.read(1, 1) if lane == "source" else state.write(1, 0) as step:
        with torch.profiler.profile(profile_memory=True) as seen:
            step.attend(0, *fresh)
        assert 0 < sum(max(event.self_cpu_memory_usage, 0) for event in seen.events()) < held / 10


def test_a_step_that_is_over_is_gone():
    state = begun()
    gc.collect()
    gc.disable()
    try:
        with state.write(1, 0) as step:
            step.attend(0, *qkv(1, state))
        gone = weakref.ref(step)
        del step
        assert gone() is None
    finally:
        gc.enable()


def test_places_are_frozen_answers():
    assert Lanes() == Lanes(Decoupled()) and hash(Gapped(5)) != hash(Gapped(6))
