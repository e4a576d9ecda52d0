"""LiveAct's card: what must hold."""

from dataclasses import replace

import pytest
import torch

import evenflow as ef
from evenflow.memory import EMPTY, Contiguous
from evenflow.recipes.reference import Call, attention, rotated
from evenflow.recipes.reference.liveact import compressed, reference

from .drive import play, random_calls, worst

FRAME, ROPE = 2, ef.Rope.axial((4, 4, 4))
BLOCKS = [6 * FRAME] + [8 * FRAME] * 5


def build(**params):
    geometry = {k: params.pop(k) for k in ("kv_heads", "batch", "dtype") if k in params}
    memory = ef.recipe("liveact", frame=FRAME, **params)
    return memory.build(
        **{"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12, "rope": ROPE, "dtype": torch.float64} | geometry
    )


def blocks(sizes=BLOCKS, steps=3, seed=0, **shape):
    """Every block at every denoising step: the copy of that step, kept each time."""
    each = [size for size in sizes for _ in range(steps)]
    tags = [{"coordinates": torch.tensor([[0, 0], [0, 1]]).repeat(size // FRAME, 1)} for size in each]
    script = random_calls(each, seed=seed, tags=tags, **shape)
    return [[replace(c, row=n % steps) for n, c in enumerate(layer)] for layer in script]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("grouping", ["temporal", "raster"])
def test_any_blocks_equal_the_definition(kv_heads, grouping):
    script, weights = blocks(kv_heads=kv_heads), torch.rand(2, 5, dtype=torch.float64)
    for given in (None, weights):
        ours = play(build(kv_heads=kv_heads, grouping=grouping, weights=given), script)
        assert worst(ours, reference(script, ROPE, frame=FRAME, grouping=grouping, weights=given)) < 1e-10


def test_point_1_the_cache_has_one_shape_from_block_1_on_and_every_call_is_a_step():
    state, shapes = build(), []
    for block, size in enumerate([6 * FRAME] + [8 * FRAME] * 8):
        play(state, blocks([size], seed=block))
        shapes.append((state.nbytes, state.tables[0].index.shape))
    assert len(set(shapes[1:])) == 1
    assert shapes[-1][1][2] == 14 * FRAME


def test_point_2_a_step_reads_only_what_blocks_were_at_that_step():
    script = blocks()
    changed = [[replace(c, k=c.k + (c.row == 1)) for c in layer] for layer in script]  # another cache of step 1
    for ours, theirs in zip(play(build(), script), play(build(), changed), strict=True):
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(a, b) == (n % 3 != 1)


def test_point_3_two_blocks_equal_one_masked_forward():
    script = blocks([6 * FRAME, 8 * FRAME], steps=1)
    streamed = play(build(steps=1), script)
    whole = [[Call(*(torch.cat([getattr(c, n) for c in layer], 1) for n in "qkv"))] for layer in script]
    for layer, (call,) in enumerate(whole):
        m = call.q.shape[1]
        place = [[n // FRAME, 0, n % FRAME] for n in range(m)]
        block = (torch.arange(m) >= 6 * FRAME).long()
        bias = torch.zeros(m, m, dtype=torch.float64).masked_fill(block[None] > block[:, None], -torch.inf)
        expected = attention(rotated(call.q, place, ROPE), rotated(call.k, place, ROPE), call.v, bias)
        assert float((torch.cat(streamed[layer], 1) - expected).abs().max()) < 1e-10


def labelled(count, start):
    """Latents whose values are their numbers."""
    value = torch.arange(start, start + count, dtype=torch.float64).repeat_interleave(FRAME)
    v = value[None, :, None].expand(1, -1, 12)
    return Call(torch.zeros(1, count * FRAME, 12).double(), torch.zeros_like(v), v.clone(), row=0)


def slot_values(state, frame=FRAME):
    values = state.state_dict()["layers.0.values"][0, 0, :, 0]
    return [float(values[i * frame]) for i in range(len(values) // frame)]


def test_point_4_the_layout_after_each_block():
    state = ef.recipe("liveact", steps=1, frame=FRAME).build(
        layers=1, heads=1, head_dim=12, rope=None, dtype=torch.float64
    )
    play(state, [[labelled(6, 0)]])
    play(state, [[labelled(8, 6)]])
    index = state.state_dict()["tables.0.index"][0, 0].tolist()
    assert index == list(range(14 * FRAME))  # block 1: nothing is compressed yet
    play(state, [[labelled(8, 14)]])
    values = sorted(slot_values(state))
    assert slot_values(state)[:4] == pytest.approx([0, 1, (2 + 3 + 4 + 5 + 6) / 5, (7 + 8 + 9 + 10 + 11) / 5])
    assert values[-10:] == pytest.approx([12, 13, *range(14, 22)])
    play(state, [[labelled(8, 22)]])
    first, second = 4.0, 9.0
    assert slot_values(state)[2:4] == pytest.approx([(first + second + 12 + 13 + 14) / 5, (15 + 16 + 17 + 18 + 19) / 5])
    assert state.held(0)[: 4 * FRAME] == [0, 1, 2, 3] + [-1] * 2 * FRAME


def test_point_5_a_kernel_of_fifths_is_the_mean_and_groupings_differ_on_a_ramp():
    ramp = [torch.arange(4 * n, 4 * n + 4, dtype=torch.float64)[None, :, None] for n in range(5)]
    fifths = torch.full((5,), 0.2, dtype=torch.float64)
    assert compressed(ramp, fifths, "raster")[0, :, 0].tolist() == pytest.approx([2, 7, 12, 17])
    assert compressed(ramp, fifths, "temporal")[0, :, 0].tolist() == pytest.approx([8, 9, 10, 11])
    script = blocks()
    for grouping in ("temporal", "raster"):
        mean = play(build(grouping=grouping), script)
        assert worst(play(build(grouping=grouping, weights=torch.full((2, 5), 0.2)), script), mean) < 1e-6


def test_point_6_the_largest_place_is_13_and_age_does_not_matter(monkeypatch):
    largest, inner = [], Contiguous.positions

    def noted(self, view):
        places = inner(self, view)
        largest.append(max(int(places.keys[view.index != EMPTY].max()), int(places.queries.max())))
        return places

    monkeypatch.setattr(Contiguous, "positions", noted)
    state = build()
    play(state, blocks())
    assert largest == [5] * 3 + [13] * 15
    old = state.fork()
    old.seek(10**9 * FRAME)
    script = blocks([8 * FRAME] * 3, seed=4)
    assert worst(play(old, script), play(state, script)) == 0


def test_point_7_the_anchor_never_changes():
    state = build()
    play(state, blocks([6 * FRAME]))
    anchor = state.state_dict()["layers.1.keys"][:, :, : 2 * FRAME]
    play(state, blocks([8 * FRAME] * 6, seed=2))
    assert torch.equal(state.state_dict()["layers.1.keys"][:, :, : 2 * FRAME], anchor)


def test_point_8_an_impulse_decays_by_a_fifth_a_block():
    state = ef.recipe("liveact", steps=1, frame=1).build(layers=1, heads=1, head_dim=12, rope=None, dtype=torch.float64)

    def block(size, at=None):
        v = torch.zeros(1, size, 12, dtype=torch.float64)
        if at is not None:
            v[:, at] = 1
        return [[Call(v * 0, v * 0, v, row=0)]]

    play(state, block(6))
    play(state, block(8, at=3))
    for k in range(1, 7):
        play(state, block(8))
        held = state.state_dict()["layers.0.values"][0, 0, :, 0]
        assert 0 < float(held.sum()) <= (1 / 5) ** k + 1e-15


def test_pitfall_blocks_of_another_length_are_refused_and_change_nothing():
    state = build()
    play(state, blocks([6 * FRAME, 8 * FRAME]))
    before = state.state_dict()
    with pytest.raises(ValueError, match="steps bring 8 frames"):
        play(state, blocks([7 * FRAME, 7 * FRAME], seed=9))
    assert state.positions.tolist() == [21 * FRAME] * 3 and before["positions"].tolist() == [14 * FRAME] * 3


def test_pitfall_a_new_task_starts_from_nothing():
    state = build()
    play(state, blocks(seed=1))
    state.reset()
    script = blocks(seed=2)
    assert worst(play(state, script), play(build(), script)) == 0


def test_rows_of_a_batch_of_different_age_fold_for_themselves():
    """The second row sits out the first six latents and the two blocks behind them, then it begins with six."""
    sizes, late = [6, 8, 8, 6, 8, 8], [6, 8, 8]
    first, second = blocks([n * FRAME for n in sizes], 1), blocks([n * FRAME for n in late], 1, seed=5)
    alone, state = play(build(steps=1), second), build(steps=1, batch=2)
    for n, size in enumerate(sizes):
        m = size * FRAME
        mask = torch.ones(2, m, dtype=torch.bool)
        mask[0], mask[1] = n != 3, n >= 3  # the first row sits out while the second begins
        with state.step(m, mask=mask, tags=first[0][n].tags):
            for layer in range(2):
                other = second[layer][n - 3] if n >= 3 else first[layer][n]
                given = (torch.stack([getattr(first[layer][n], x), getattr(other, x)]) for x in "qkv")
                out = state.attend(layer, *given)
                if n >= 3:
                    assert float((out[1] - alone[layer][n - 3]).abs().max()) < 1e-10


def test_wrong_parameters_are_refused():
    for wrong in ({"memory": 0}, {"short": 0}, {"sink": -1}, {"grouping": "other"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ef.recipe("liveact", **wrong)
