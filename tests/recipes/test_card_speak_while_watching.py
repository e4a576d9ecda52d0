"""What must hold for Speak While Watching (arXiv 2601.06843): one mask, and positions that let two lanes run at once."""

import pytest
import torch

import evenflow as ef
from evenflow.claims.lanes import finished
from evenflow.memory import Rope
from evenflow.memory.lane_masks import packed_mask, packed_positions
from evenflow.memory.lane_places import Gapped
from evenflow.memory.lanes import Lanes
from evenflow.memory.rope import Rotary
from evenflow.recipes.reference import lanes as oracle

from ..memory.lanes_drive import AXES, PLACES, Tiny, grid, joined, script

SCHEMES = sorted(PLACES)
FREE = ["decoupled", "gap"]


def seen(state):
    return {name: tensor for name, tensor in state.state_dict().items() if name.startswith("source.layers")}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def watched(said, scheme, seed=0):
    """What the source lane holds when other things, of these lengths, were said."""
    stream = script([4, 4, 4, 4], [3, 3, 3, 3], seed=1)
    other = script([4, 4, 4, 4], said, seed=seed + 2)
    stream.target = other.target
    state = stream.build(scheme)
    stream.play(state)
    return seen(state)


@pytest.mark.parametrize("scheme", FREE)
def test_point_1_what_is_seen_is_the_same_to_the_bit_whatever_is_said(scheme):
    assert same(watched([3, 3, 3, 3], scheme), watched([9, 1, 0, 20], scheme, seed=1))


def test_point_1_overlapped_it_depends_on_the_length_of_what_is_said_only():
    base = watched([3, 3, 3, 3], "overlapped")
    assert same(base, watched([3, 3, 3, 3], "overlapped", seed=1))
    assert same(base, watched([4, 1, 0, 2], "overlapped"))  # shorter than what is seen: its end is all that counts
    assert not same(base, watched([5, 3, 3, 3], "overlapped"))
    assert not same(watched([3, 3, 3, 3], "interleaved"), watched([4, 3, 3, 3], "interleaved"))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_point_2_one_pass_over_the_packed_sequence_equals_the_lanes(scheme, held, kv_heads):
    """Through a whole model, where what is read in one layer is what the next one asks with."""
    tiny, made = Tiny(kv_heads=kv_heads), torch.Generator().manual_seed(0)
    sizes, counts = (5, 3, 4, 6), (4, 2, 3, 5)
    source, target = ([torch.randint(29, (m,), generator=made) for m in lane] for lane in (sizes, counts))
    unit = torch.cat([torch.full((m,), u) for lane in (sizes, counts) for u, m in enumerate(lane)])
    lane = torch.arange(len(unit)) >= sum(sizes)
    where = torch.cat(packed_positions(PLACES[scheme], [[m] for m in sizes], counts))[:, 0]
    logits = tiny.packed(torch.cat(source + target), packed_mask(lane, unit, shift=bool(held)), where)[lane]
    for ahead, pieces in ((0, (100,)), (1, (1,)), (9, (2, 3))):
        if ahead <= {"interleaved": 0, "overlapped": 1}.get(scheme, 9):
            got = tiny.stream(tiny.build(scheme), source, target, held=held, ahead=ahead, sizes=pieces)
            torch.testing.assert_close(got, logits, rtol=0, atol=1e-10)


def test_point_2_the_shift_and_the_mask_matter():
    tiny, made = Tiny(), torch.Generator().manual_seed(0)
    source, target = ([torch.randint(29, (m,), generator=made) for m in lane] for lane in ((5, 3), (4, 2)))
    got = tiny.stream(tiny.build(), source, target)
    unit, lane = torch.tensor([0] * 5 + [1] * 3 + [0] * 4 + [1] * 2), torch.arange(14) >= 8
    where = torch.cat(packed_positions(PLACES["decoupled"], [[5], [3]], [4, 2]))[:, 0]
    plain = tiny.packed(torch.cat(source + target), packed_mask(lane, unit), where)[lane]
    assert (got - plain).abs().amax(-1)[:3].max() < 1e-10 and (got - plain)[3].abs().max() > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_point_3_in_silence_all_schemes_give_the_positions_of_the_video(scheme):
    states = []
    for name in (scheme, "decoupled"):
        stream = script([[2, grid(1, 2, 3)], [grid(1, 2, 3)], [3]], [0, 0, 0], rope=AXES)
        states.append(stream.build(name))
        stream.play(states[-1])
    assert torch.equal(*(state.positions("source") for state in states))
    words = script([4, 3, 5], [0, 0, 0])
    flat = words.build(scheme)
    words.play(flat)
    assert flat.positions("source")[:, 0].tolist() == [*range(12)]


def test_point_3_a_gap_as_long_as_the_video_is_an_ordinary_sequence():
    """All is watched first: one sequence under causal attention, as the memory that keeps everything has it."""
    stream = script([12], [7], kv_heads=2)
    state = Lanes(Gapped(gap=11)).build(
        layers=2, heads=4, kv_heads=2, head_dim=12, rope=Rope(), dtype=torch.float64
    )  # 11 is the last position of the video
    stream.play(state, sizes=(3,))
    full = ef.recipe("full").build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ef.Rope(), dtype=torch.float64)
    ours = stream.results()
    with full.step(19):
        for layer in range(2):
            call = joined(stream.source[layer][0], stream.target[layer][0])
            out = full.attend(layer, *(x[None] for x in (call.q, call.k, call.v)))[0]
            torch.testing.assert_close(
                torch.cat([ours["source"][layer], ours["target"][layer]], 1), out, rtol=0, atol=1e-10
            )


def test_point_4_a_gap_turns_what_is_said_as_one():
    """Scores within what is said are those of decoupled lanes; only those to what is seen differ."""
    outs = []
    for scheme in FREE:
        stream = script([0, 0], [5, 4])
        outs.append(stream.play(stream.build(scheme))["target"])
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    stream = script([6, 3], [5, 4])
    stream.play(stream.build("gap"))
    assert stream.off(stream.reference("decoupled")) > 1e-2
    call, video = stream.target[0][0], stream.source[0][0]
    rotary = Rotary(Rope(), 12, torch.float64, torch.device("cpu"))
    near, far = rotary.at(torch.arange(5)), rotary.at(torch.arange(5) + 10_001)
    keys = rotary.rotate(video.k, *rotary.at(torch.arange(6)))
    within = [rotary.rotate(call.q[:2], *turn) @ rotary.rotate(call.k, *turn).mT for turn in (near, far)]
    across = [rotary.rotate(call.q[:2], *turn) @ keys.mT for turn in (near, far)]
    torch.testing.assert_close(*within, rtol=0, atol=1e-10)
    assert (across[0] - across[1]).abs().max() > 0.1


def test_point_5_the_worked_example_of_overlapped_positions():
    stream = script([14, 4, 4], [3, 6, 2])
    state = stream.build("overlapped")
    stream.play(state)
    assert state.positions("source")[10:, 0].tolist() == [*range(10, 14), *range(14, 18), *range(18, 22)]
    assert state.positions("target")[:, 0].tolist() == [*range(14, 17), *range(18, 24), 24, 25]
    seen, said = oracle.places([[None] * 14, [None] * 4, [None] * 4], [3, 6, 2], scheme="overlapped")
    assert [unit[0][0] for unit in seen] == [0, 14, 18] and [unit[0][0] for unit in said] == [14, 18, 24]


@pytest.mark.parametrize("held", [0, 1])
def test_point_5_what_is_held_back_keeps_its_place(held):
    """The last word of a unit comes with the next, and still stands in its own unit, as in the packed sequence."""
    stream = script([10, 4, 4, 4], [3, 6, 1, 2], held=held)
    state = stream.build("overlapped")
    stream.play(state)
    for lane, where in zip(("source", "target"), packed_positions(PLACES["overlapped"], stream.runs, [3, 6, 1, 2]), strict=True):  # fmt: skip
        assert torch.equal(state.positions(lane), where)


@pytest.mark.parametrize("scheme", ["overlapped", *FREE])
@pytest.mark.parametrize("r", [0.25, 0.5, 1, 2, 4])
@pytest.mark.parametrize("n", [20, 200])
def test_point_6_the_speed_up_is_that_of_the_model(scheme, r, n):
    arrive, read, write = [0.0] * n, [float(r)] * n, [1.0] * n
    serial = finished(PLACES["interleaved"], arrive, read, write)[1][-1]
    assert serial == pytest.approx(sum(read) + sum(write))
    parallel = finished(PLACES[scheme], arrive, read, write)[1][-1]
    assert parallel == pytest.approx(
        read[0] + sum(max(a, b) for a, b in zip(read[1:], write, strict=False)) + write[-1]
    )
    assert serial / parallel == pytest.approx((r + 1) / max(r, 1), rel=0.05)


def test_point_6_pairs_wait_for_each_other_and_free_lanes_do_not():
    """Costs that change from unit to unit: a barrier a pair costs time, and counters of their own do not."""
    read, write = [1.0, 1.0, 1.0, 1.0] * 5, [4.0, 0.1, 0.1, 0.1] * 5
    ends = {scheme: finished(PLACES[scheme], [0.0] * 20, read, write) for scheme in SCHEMES}
    assert ends["decoupled"][0] == [*range(1, 21)] == ends["gap"][0]
    pairs = ends["overlapped"]
    assert all(pairs[0][u] - read[u] >= pairs[1][u - 2] - 1e-9 for u in range(2, 20)) and pairs[0][-1] > 20
    assert ends["decoupled"][1][-1] <= pairs[1][-1] <= ends["interleaved"][1][-1]


# -- pitfalls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pitfall_a_stream_of_one_unit(scheme):
    stream = script([4], [3], held=1)
    stream.play(stream.build(scheme))
    assert stream.off(stream.reference(scheme)) < 1e-10 and stream.off(stream.packed(scheme)) < 1e-10


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pitfall_units_may_be_of_any_length_and_short(scheme):
    stream = script([7, 1, 0, 12, 3], [1, 0, 6, 0, 2])
    stream.play(stream.build(scheme))
    assert stream.off(stream.reference(scheme)) < 1e-10 and stream.off(stream.packed(scheme)) < 1e-10


def test_pitfall_the_gap_is_there_in_training_and_in_the_stream():
    stream = script([4, 4], [2, 3])
    state = stream.build("gap")
    stream.play(state)
    packed = packed_positions(PLACES["gap"], [[4], [4]], [2, 3])[1]
    assert torch.equal(state.positions("target"), packed) and packed[:, 0].tolist() == [*range(10_001, 10_006)]


def test_pitfall_overlapped_is_more_than_a_mask():
    """Contiguous positions under the same mask, as the released variant has them, are something else."""
    stream = script([4, 4, 4], [3, 3, 3])
    stream.play(stream.build("overlapped"))
    assert stream.off(stream.packed("overlapped")) < 1e-10
    assert stream.off(stream.packed("interleaved")) > 1e-2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pitfall_lanes_run_at_once_in_two_threads(scheme):
    stream = script([5, 8, 3, 6, 4, 7], [3, 3, 3, 3, 3, 9], held=1)
    stream.play_threads(stream.build(scheme), (1,))
    assert stream.off(stream.packed(scheme)) < 1e-10
