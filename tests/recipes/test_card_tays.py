"""What must hold for TaYS (arXiv 2603.02872): a thought a frame group, in a lane of its own."""

import pytest
import torch

from evenflow.claims.lanes import finished
from evenflow.memory.lane_masks import packed_loss, packed_mask, packed_positions
from evenflow.memory.lane_places import Decoupled, Interleaved

from ..memory.lanes_drive import AXES, PLACES, Tiny, grid, script

PRE, G, SUF, PREAM = 5, 2, 3, 3  # system, question and <vision_start>; tokens a grid; what ends the message; the header


def card_mask(n, units):
    """The table, row by row, and the shift."""
    source = PRE + n * G + SUF
    total = source + PREAM + sum(units)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for row in range(source):
        mask[row, : row + 1] = True

    def visible(i):
        columns = torch.zeros(source, dtype=torch.bool)
        columns[: PRE + (i + 1) * G] = True
        if i == n - 1:
            columns[PRE + n * G :] = True
        return columns

    for row in range(source, source + PREAM):
        mask[row, : PRE + G] = True
        mask[row, source : row + 1] = True
    row = first = source + PREAM
    for i, length in enumerate(units):
        for _ in range(length):
            mask[row, :source] = visible(i)
            mask[row, source : row + 1] = True
            row += 1
    before = mask.clone()
    for row in range(first, total - 1):
        mask[row, :source] = before[row + 1, :source]
    return mask


def card_units(n, units):
    """Which unit each token is of. Of a single grid the header sees the grid only: what ends the message is one more."""
    last = max(n - 1, 1)
    source = [0] * PRE + [i for i in range(n) for _ in range(G)] + [last] * SUF
    said = [last if n == 1 else i for i, length in enumerate(units) for _ in range(length)]
    unit = torch.tensor(source + [0] * PREAM + said)
    return torch.arange(len(unit)) >= len(source), unit


@pytest.mark.parametrize(("n", "units"), [(1, [3]), (2, [2, 3]), (3, [1, 4, 2]), (3, [2, 1, 1])])
def test_point_1_the_mask_equals_the_table(n, units):
    expected, (target, unit) = card_mask(n, units), card_units(n, units)
    mask = packed_mask(target, unit, shift=True)
    if n == 1:  # its header's last token is not shifted in the table, which begins with the answer's first token
        row = PRE + G + SUF + PREAM - 1
        assert mask[row, PRE + G : PRE + G + SUF].all() and not expected[row, PRE + G : PRE + G + SUF].any()
        mask[row] = expected[row]
    assert torch.equal(mask, expected)
    assert mask.diagonal().all()
    source, row = PRE + n * G + SUF, PRE + n * G + SUF + PREAM
    for i, length in enumerate(units[:-1]):
        grid_after = slice(PRE + (i + 1) * G, PRE + (i + 2) * G)
        assert not mask[row : row + length - 1, grid_after].any()
        assert mask[row + length - 1, grid_after].all()
        row += length
    assert not mask[:source, source:].any()


def test_point_1_the_worked_example():
    target, unit = card_units(2, [2, 3])
    mask = packed_mask(target, unit, shift=True)
    first = PRE + 2 * G + SUF + PREAM
    columns = {
        "F0": slice(PRE, PRE + G),
        "F1": slice(PRE + G, PRE + 2 * G),
        "suf": slice(PRE + 2 * G, PRE + 2 * G + SUF),
    }
    assert mask[first, columns["F0"]].all()
    assert not mask[first, columns["F1"]].any() and not mask[first, columns["suf"]].any()
    for row in range(first + 1, first + 5):
        assert all(mask[row, there].all() for there in columns.values())


def clip(n=3, counts=(4, 3, 5), seed=0):
    """Ids of each unit of both lanes: the question comes with the first grid, what ends it with the last."""
    made = torch.Generator().manual_seed(seed)
    sizes = [G] * n
    sizes[0] += PRE
    sizes[-1] += SUF
    return [
        [torch.randint(29, (m,), generator=made) for m in lane] for lane in (sizes, (counts[0] + PREAM, *counts[1:]))
    ]


def packed_of(source, target):
    unit = torch.cat([torch.full((len(ids),), u) for lane in (source, target) for u, ids in enumerate(lane)])
    lane = torch.arange(len(unit)) >= sum(map(len, source))
    runs = [[len(ids)] for ids in source]
    where = torch.cat(packed_positions(Decoupled(), runs, [len(ids) for ids in target]))[:, 0]
    return lane, packed_mask(lane, unit, shift=True), where


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("ahead", "sizes"), [(0, (100,)), (0, (1,)), (1, (2,)), (2, (3, 1))])
def test_point_2_training_equals_the_stream(kv_heads, ahead, sizes):
    tiny, (source, target) = Tiny(kv_heads=kv_heads), clip()
    lane, mask, where = packed_of(source, target)
    expected = tiny.packed(torch.cat(source + target), mask, where)[lane]
    got = tiny.stream(tiny.build(), source, target, ahead=ahead, sizes=sizes)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_point_3_what_is_seen_is_the_same_to_the_bit_whatever_is_said_and_whenever():
    tiny, (source, target) = Tiny(), clip()
    other = clip(counts=(1, 9, 2), seed=5)[1]
    held = []
    for said, ahead in ((target, 0), (target, 2), (other, 0), (other, 1)):
        state = tiny.build()
        tiny.stream(state, source, said, ahead=ahead)
        held.append({name: x for name, x in state.state_dict().items() if name.startswith("source.")})
    assert all(torch.equal(held[0][name], other[name]) for other in held for name in held[0])


def test_point_4_what_is_said_of_a_group_does_not_know_the_next():
    tiny, (source, target) = Tiny(), clip()
    base = tiny.stream(tiny.build(), source, target, ahead=2)
    ends = torch.tensor([len(ids) for ids in target]).cumsum(0).tolist()
    for unit in (1, 2):
        changed = [ids if u != unit else (ids + 1) % 29 for u, ids in enumerate(source)]
        differs = (tiny.stream(tiny.build(), changed, target, ahead=2) != base).any(-1)
        last = ends[unit - 1] - 1  # the token that ends the unit before predicts this one's first
        assert not differs[:last].any() and differs[last:].all()


def test_point_5_nothing_is_renumbered():
    counts, more = [2, 3, 2], [5, 3, 2]
    for name, place in PLACES.items():
        seen, said = packed_positions(place, [[4]] * 3, counts)
        longer = packed_positions(place, [[4]] * 5, [*counts, 4, 1])  # frames that come later
        assert torch.equal(longer[0][:12], seen) and torch.equal(longer[1][:7], said)
        moved = not torch.equal(packed_positions(place, [[4]] * 3, more)[0], seen)  # words that come earlier
        assert moved == (name in ("interleaved", "overlapped"))
        wider = packed_positions(place, [[6], [4], [4]], counts)[1]  # frames of more tokens
        assert torch.equal(wider, said) == (name in ("decoupled", "gap"))


def test_point_5_a_grid_s_time_is_two_further_than_the_last():
    """The whole video is one run: (t, h, w) with t two a grid, rows and columns anew, words after it behind the largest."""
    units = [[3, grid(1, 2, 2)], [grid(1, 2, 2, first=2)], [grid(1, 2, 2, first=4), 2]]
    stream = script(units, [2, 2, 2], rope=AXES, held=1)
    state = stream.build(origin="video")
    stream.play(state)
    assert state.positions("source").tolist()[:3] == [[n] * 3 for n in range(3)]
    expected = [[3 + t, 3 + h, 3 + w] for t in (0, 2, 4) for h in (0, 1) for w in (0, 1)]
    assert state.positions("source").tolist()[3:15] == expected
    assert state.positions("source").tolist()[15:] == [[8] * 3, [9] * 3]
    assert state.positions("target").tolist() == [[n] * 3 for n in range(6)]
    assert stream.off(stream.packed(origin="video")) < 1e-10


@pytest.mark.parametrize("period", [0.2, 0.25, 0.3])
def test_point_6_the_delay_of_one_sequence_grows_with_frames_and_that_of_two_lanes_does_not(period):
    e, d, late = 0.15, 0.19, {"interleaved": [], "decoupled": []}
    for n in (10, 20, 40, 80):
        arrive = [period * (k + 1) for k in range(n)]
        for place, name in ((Interleaved(), "interleaved"), (Decoupled(), "decoupled")):
            late[name].append(finished(place, arrive, [e] * n, [d] * n)[1][-1] - arrive[-1])
    assert late["decoupled"] == pytest.approx([e + d] * 4)
    grown = [n * (e + d - period) + period for n in (10, 20, 40, 80)]
    assert late["interleaved"] == pytest.approx(grown)
    assert late["interleaved"][-1] / late["decoupled"][-1] > late["interleaved"][0] / late["decoupled"][0] > 1


def test_point_7_the_loss_of_a_skip_counts_half():
    made = torch.Generator().manual_seed(0)
    skip, weights = 3, torch.ones(6, dtype=torch.float64)
    weights[skip] = 0.5
    logits = torch.randn(1, 7, 6, generator=made, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2, skip, 4, skip, 5]])
    target = torch.tensor([[False, False, True, True, True, True, True]])
    above = below = 0.0
    for n in range(3, 7):
        p = torch.softmax(logits[0, n - 1], 0)[ids[0, n]]
        w = 0.5 if ids[0, n] == skip else 1.0
        above, below = above - w * float(p.log()), below + w
    loss = packed_loss(logits, ids, target, target, weights=weights)
    assert float(loss) == pytest.approx(above / below, abs=1e-12)
    assert float(loss) != pytest.approx(float(packed_loss(logits, ids, target, target)), abs=1e-4)


# -- pitfalls --------------------------------------------------------------------------------------------------------


def test_pitfall_without_the_shift_a_unit_opens_blind():
    """A delimiter that is fed too early does not see the frame whose thought it opens."""
    tiny, (source, target) = Tiny(), clip()
    right = tiny.stream(tiny.build(), source, target)
    early = tiny.stream(tiny.build(), source, target, held=0)
    last = len(target[0]) - 1
    assert torch.equal(right[:last], early[:last]) or (right[:last] - early[:last]).abs().max() < 1e-12
    assert (right[last] - early[last]).abs().max() > 1e-3


def test_pitfall_a_mask_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="expected bool and whole numbers"):
        packed_mask(torch.zeros(4, dtype=torch.bool), torch.zeros(5, dtype=torch.int64))


def test_pitfall_grids_of_any_number_of_tokens():
    units = [[2, grid(1, 3, 2)], [grid(1, 1, 1)], [grid(1, 2, 5), 3]]
    stream = script(units, [3, 2, 4], rope=AXES, held=1)
    stream.play(stream.build(), sizes=(4, 1))
    assert stream.off(stream.packed()) < 1e-10 and stream.off(stream.reference()) < 1e-10


def test_pitfall_padded_rows_of_a_batch_are_masked():
    rows = [card_units(2, [2, 3]), card_units(3, [1, 4, 2])]
    longest = max(len(unit) for _, unit in rows)
    target = torch.stack([torch.cat([t, t.new_zeros(longest - len(t))]) for t, _ in rows])
    unit = torch.stack([torch.cat([u, u.new_full((longest - len(u),), -1)]) for _, u in rows])
    masks = packed_mask(target, unit, shift=True)
    for mask, (n, units) in zip(masks, ((2, [2, 3]), (3, [1, 4, 2])), strict=True):
        expected = card_mask(n, units)
        assert torch.equal(mask[: len(expected), : len(expected)], expected)
        assert not mask[: len(expected), len(expected) :].any()


def test_pitfall_only_the_last_unit_sees_what_ends_the_message():
    """In a stream it comes with the last grid, so nobody else can."""
    tiny, (source, target) = Tiny(), clip()
    base = tiny.stream(tiny.build(), source, target)
    ended = [*source[:-1], torch.cat([source[-1][:G], (source[-1][G:] + 1) % 29])]
    differs = (tiny.stream(tiny.build(), ended, target) != base).any(-1)
    last = len(target[0]) + len(target[1]) - 1
    assert not differs[:last].any() and differs[last:].all()
