"""Clusters off the device, and the share of the attention that a query takes, as answers in compositions of one's own."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenflow as ef
from evenflow.memory import (
    Absolute,
    Clustered,
    Contiguous,
    Evict,
    LastByModality,
    LeastDiverse,
    Memory,
    Oldest,
    Spilled,
    Timeless,
    UntilMass,
)
from evenflow.memory.attention import softmax_attention
from evenflow.memory.hashing import hyperplanes
from evenflow.memory.parts import Part, attention_of_parts
from evenflow.memory.store import StoreWarning
from evenflow.recipes.reference import v_rex

from .drive import feed, random_inputs, run

ROPE = ef.Rope()
SLOPES = torch.tensor([0.5, 0.1, 0.03, 0.0], dtype=torch.float64)
GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64, "rope": ROPE}


def made(*, near=2, bits=6, share=0.4, page=3, window=6, per_head=False, union=False, more=None, **options):
    """A memory of clusters; `options` are those of `Memory`, `more` those of the fold."""
    fold = Clustered(near, bits, per_head=per_head, page=page, **(more or {}))
    return Memory(window=window, fold=fold, recall=UntilMass(share, union=union), place=Absolute(), **options)


def oracle(
    inputs, *, window, sink=0, near=2, bits=6, share=0.4, frame=1, reach=None, alibi=None, softcap=None, rope=ROPE
):
    """What each query reads, one after the other: [H_q, n, D] of one layer and row; frames are causal inside."""
    q, k, v = (x[0] for x in inputs)
    heads, n, dim = q.shape
    kv_heads, groups = len(k), heads // len(k)
    places = [t // frame for t in range(n)]
    query, keys = v_rex.rotated(q, places, rope), v_rex.rotated(k, places, rope)
    planes = hyperplanes(kv_heads * dim, bits, like=torch.zeros(1, dtype=torch.float64))
    table, out = [], torch.zeros_like(q)
    for t in range(n):
        for h in range(heads):
            kv = h // groups
            score = torch.tensor([float(query[h, t] @ c.mean[kv * dim : kv * dim + dim]) * dim**-0.5 for c in table])
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            counts = torch.tensor([len(c.members) for c in table])
            taken = {at for c in v_rex.wicsum(score.double(), counts, share) for at in table[c].members}
            first = max(0, t - window)
            seen = sorted(taken | {*range(min(sink, t))} | {*range(first, t + 1)})
            if reach is not None:
                seen = [at for at in seen if places[t] - places[at] < reach]
            logits = keys[kv, seen] @ query[h, t] * dim**-0.5
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if alibi is not None:
                logits = logits - alibi[h] * (places[t] - torch.tensor([places[at] for at in seen]))
            out[h, t] = logits.softmax(-1) @ v[kv, seen]
        table = v_rex.clustered(table, keys[:, t].reshape(1, -1), [t], planes, near)
    return out


def close(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, {}), ({"sink": 3}, {}), ({"sink": 2, "window": 1}, {}), ({}, {"reach": 9}), ({}, {"reach": 4}),
        ({}, {"rope": None, "alibi": SLOPES}), ({"sink": 2}, {"softcap": 1.5}), ({"share": 1.0}, {}),
        ({"window": 4, "share": 0.7}, {"reach": 20}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cuts", [[1], [5], [3, 11, 1]])
def test_sinks_and_what_models_do_to_scores_equal_the_definition(options, model, cuts):
    state = made(**options).build(**{**GEOMETRY, "layers": 1, **model})
    inputs = random_inputs(state, 20)
    close([run(state, inputs, cuts)[0][0]], [oracle(inputs[0], **{"window": 6, **options, **model})])


@pytest.mark.parametrize("per_head", [False, True])
def test_frames_that_see_each_other_both_ways(per_head):
    """With all of the mass, every query sees everything up to the end of its step."""
    state = made(window=2, frame=3, inside="both", share=1.0, per_head=per_head).build(**GEOMETRY)
    inputs = random_inputs(state, 30)
    got = run(state, inputs, [3])
    for (q, k, v), out in zip(inputs, got, strict=True):
        places = torch.arange(30) // 3
        query, keys = v_rex.rotated(q, places, ROPE), v_rex.rotated(k, places, ROPE)
        seen = places[:, None] >= places
        bias = torch.zeros(30, 30, dtype=torch.float64).masked_fill(~seen, -torch.inf)
        close([out], [softmax_attention(query, keys, v, bias[None, None], 8**-0.5, None)])


def test_tokens_of_one_modality_may_leave_before_older_ones_of_another():
    """Whatever leaves goes to its cluster: all of the mass is still full attention."""
    memory = Memory(
        evict=LastByModality({0: 2, 1: 5}), fold=Clustered(2, 6, page=2), recall=UntilMass(1.0), place=Absolute()
    )
    state, full = memory.build(**GEOMETRY), ef.recipe("full").build(**GEOMETRY)
    inputs, at = random_inputs(state, 40), 0
    kinds = torch.arange(40) % 3 // 2
    for m in (1, 5, 4, 10, 1, 1, 13, 5):
        got = feed(state, inputs, at, at + m, tags={"modality": kinds[at : at + m]})
        close(got, feed(full, inputs, at, at + m))
        at += m
    assert len(state.held(0)) <= 7 + 13


@pytest.mark.parametrize("place", [Absolute(), Timeless()])
def test_places_that_do_not_move(place):
    memory = Memory(window=4, fold=Clustered(2, 6), recall=UntilMass(1.0), place=place)
    state, all_held = memory.build(**GEOMETRY), Memory(place=place).build(**GEOMETRY)
    inputs = random_inputs(state, 30)
    close(run(state, inputs, [4, 1, 9]), run(all_held, inputs, [30]))


def test_without_the_recall_clusters_are_an_index_and_the_window_is_attended():
    memory = Memory(window=5, fold=Clustered(2, 6), place=Absolute())
    state, plain = memory.build(**GEOMETRY), Memory(window=5, place=Absolute()).build(**GEOMETRY)
    inputs = random_inputs(state, 30)
    close(run(state, inputs, [4]), run(plain, inputs, [4]))
    assert int(state.mine[1]["fold"]["count"].sum()) == 30


# -- what a session does ---------------------------------------------------------------------------------------------

every_kind = pytest.mark.parametrize(
    "options", [{}, {"per_head": True}, {"union": True}, {"sink": 2}, {"page": 1}], ids=str
)


@every_kind
@pytest.mark.parametrize("length", [4, 25])
def test_saved_and_forked_go_on_bit_for_bit_and_apart(options, length):
    state = made(**options).build(**GEOMETRY)
    run(state, random_inputs(state, length), [3, 1])
    twin, loaded, witness = state.fork(), made(**options).build(**GEOMETRY), state.fork()
    loaded.load_state_dict(state.state_dict())
    inputs, other = random_inputs(state, 12, seed=1), random_inputs(state, 12, seed=2)
    run(witness, other, [4])  # must not be seen by the others
    expected = run(state, inputs, [5, 3, 1])
    for copy in (twin, loaded):
        assert all(torch.equal(a, b) for a, b in zip(run(copy, inputs, [5, 3, 1]), expected, strict=True))
    run(twin, other, [4])
    assert all(torch.equal(a, b) for a, b in zip(run(state, other, [7]), run(loaded, other, [7]), strict=True))


@pytest.mark.parametrize("page", [2, 3])
def test_forks_at_any_time_never_see_what_the_others_do(page):
    """Pages fill and empty slots of loose tokens, which forks share as long as nobody needs them."""
    state = made(page=page, window=2, near=5).build(**{**GEOMETRY, "layers": 1})
    inputs, forks = random_inputs(state, 40), []
    for at in range(40):
        forks.append((at, state.fork()))
        feed(state, inputs, at, at + 1)
    question = random_inputs(state, 1, seed=9)
    alone = made(page=page, window=2, near=5).build(**{**GEOMETRY, "layers": 1})  # of which no fork was ever made
    for at, fork in forks:
        close(feed(fork, question, 0, 1, commit=False), feed(alone, question, 0, 1, commit=False))
        feed(alone, inputs, at, at + 1)


@every_kind
def test_calls_that_are_not_kept_and_steps_that_fail_leave_everything_as_it_was(options):
    state = made(**options).build(**GEOMETRY)
    run(state, random_inputs(state, 27), [12, 3])  # slots for the longest step below
    before, inputs = state.state_dict(), random_inputs(state, 12, seed=3)

    def unchanged():
        after = state.state_dict()
        return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    for m in (1, 12):
        first = feed(state, inputs, 0, m, commit=False)
        assert all(torch.equal(a, b) for a, b in zip(first, feed(state, inputs, 0, m, commit=False), strict=True))
    spoilt = [inputs[0], (inputs[1][0], inputs[1][1] * torch.nan, inputs[1][2])]
    with pytest.raises(ValueError, match="NaN"):
        feed(state, spoilt, 0, 5)
    with pytest.raises(ZeroDivisionError), state.step(5):
        state.attend(0, *(x[:, :, :5] for x in inputs[0]))
        _ = 1 / 0
    assert unchanged()


class Failing(Oldest):
    """Fails when a step has arrived, if told to."""

    now = False

    def arrive(self, view):
        if Failing.now:
            raise RuntimeError("at the very end")


def test_a_step_that_fails_at_its_very_end_leaves_nothing_off_the_device():
    memory = made(evict=Failing())
    state, witness = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    inputs = random_inputs(state, 40)
    for each in (state, witness):
        run(each, [tuple(x[:, :, :30] for x in layer) for layer in inputs], [4])
    before = state.state_dict()
    Failing.now = True
    try:
        with pytest.raises(RuntimeError, match="at the very end"):
            feed(state, inputs, 30, 34)
    finally:
        Failing.now = False
    after = state.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for at in (30, 35):
        assert all(
            torch.equal(a, b)
            for a, b in zip(feed(state, inputs, at, at + 5), feed(witness, inputs, at, at + 5), strict=True)
        )


@pytest.mark.parametrize(
    ("options", "kv_heads"), [({}, 1), ({}, 2), ({}, 4), ({"per_head": True}, 2), ({"union": True}, 2)], ids=str
)
def test_rows_of_different_age_are_streams_of_their_own(options, kv_heads):
    model = {**GEOMETRY, "kv_heads": kv_heads}
    memory = made(**options)
    together, alone = memory.build(**model, batch=3), [memory.build(**model) for _ in range(3)]
    inputs = random_inputs(together, 60)
    for step, m in enumerate([4, 1, 7, 3, 9, 1, 5]):
        at, takes = 6 * step, [True, step % 2 == 0, step % 3 != 1]
        real = torch.tensor(takes)[:, None] & (torch.arange(m) % 5 != 3)  # and some padding inside
        with together.step(m, mask=real):
            got = [together.attend(n, *(x[:, :, at : at + m] for x in layer)) for n, layer in enumerate(inputs)]
        for row in (row for row in range(3) if takes[row]):
            columns = at + real[row].nonzero()[:, 0]
            with alone[row].step(len(columns)):
                own = [
                    alone[row].attend(n, *(x[row : row + 1, :, columns] for x in layer))
                    for n, layer in enumerate(inputs)
                ]
            close([out[row : row + 1, :, columns - at] for out in got], own, 1e-11)
    assert together.positions.tolist() == [one.position for one in alone]


def test_rows_change_places():
    together = made().build(**GEOMETRY, batch=3)
    inputs = random_inputs(together, 60)
    run(together, [tuple(x[:, :, :40] for x in layer) for layer in inputs], [4])
    order = torch.tensor([2, 0, 1])
    moved = together.fork()
    moved.reorder(order)
    expected = feed(together, inputs, 40, 52)
    got = feed(moved, [tuple(x[order] for x in layer) for layer in inputs], 40, 52)
    close(got, [x[order] for x in expected], 1e-12)
    close(
        feed(moved, [tuple(x[order] for x in layer) for layer in inputs], 52, 60),
        [x[order] for x in feed(together, inputs, 52, 60)],
    )


def test_sinks_that_stay_after_a_reset_are_in_no_cluster_and_always_seen():
    state = made(sink=3, share=1.0).build(**GEOMETRY)
    inputs = random_inputs(state, 60)
    run(state, [tuple(x[:, :, :30] for x in layer) for layer in inputs], [4])
    state.reset(keep_sink=True)
    assert state.position == 3 and state.held(0) == [0, 1, 2]
    fresh = ef.recipe("full").build(**GEOMETRY)
    whole = [tuple(torch.cat([x[:, :, :3], x[:, :, 30:]], 2) for x in layer) for layer in inputs]
    feed(fresh, whole, 0, 3)
    for at in (3, 10, 17, 24):
        close(feed(state, whole, at, at + 7), feed(fresh, whole, at, at + 7))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 10**6))
def test_any_cut_gives_the_same(cuts, page, seed):
    memory = made(page=page, window=4)
    one, other = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    inputs = random_inputs(one, 20, seed)
    close(run(one, inputs, cuts), run(other, inputs, [1]))


def test_inference_mode_may_come_and_go():
    memory = made()
    state, plain = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    inputs = random_inputs(state, 48)
    for at in range(0, 48, 6):
        with torch.inference_mode(at % 12 == 0):
            got = feed(state, inputs, at, at + 6)
        assert all(torch.equal(a, b) for a, b in zip(got, feed(plain, inputs, at, at + 6), strict=True))


# -- where tokens are ------------------------------------------------------------------------------------------------


def near_duplicates(state, steps, seed=0):
    """Steps of the same 6 tokens and a little noise."""
    g, source = state.geometry, torch.Generator().manual_seed(seed)
    base = [torch.randn(g.batch, h, 6, g.head_dim, generator=source, dtype=g.dtype) for h in (4, 2, 2)] * g.layers
    for _ in range(steps):
        noisy = [x + 0.01 * torch.randn(x.shape, generator=source, dtype=g.dtype) for x in base]
        yield [tuple(noisy[3 * n : 3 * n + 3]) for n in range(g.layers)]


@pytest.mark.parametrize("per_head", [False, True])
def test_a_stream_of_near_duplicates_is_flat_on_the_device(per_head):
    """And in the work of a step: as many clusters are scored; in RAM it is whole."""
    state, sizes = made(near=7, bits=32, per_head=per_head, window=12).build(**{**GEOMETRY, "rope": None}), []
    for layers in near_duplicates(state, 30):
        feed(state, layers, 0, 6)
        sizes.append(state.nbytes)
    assert sizes[-1] == sizes[6]
    assert int((state.mine[0]["fold"]["count"][0, 0] > 0).sum()) <= 6
    assert int(state.mine[0]["fold"]["count"][0, 0].sum()) == 180


@pytest.mark.parametrize("per_head", [False, True])
def test_what_ram_does_not_hold_is_on_disk_and_comes_back_alike(tmp_path, per_head):
    page = 3 * 2 * 2 * 8 * 8  # bytes of a page of both key heads
    limits = {"ram_bytes": 8 * page, "disk": str(tmp_path), "device_bytes": 2 * page}
    small, large = (made(per_head=per_head, more=more).build(**GEOMETRY) for more in (limits, {}))
    inputs = random_inputs(small, 90)
    first = [tuple(x[:, :, :60] for x in layer) for layer in inputs]
    assert all(torch.equal(a, b) for a, b in zip(run(small, first, [4, 1]), run(large, first, [4, 1]), strict=True))
    drawers = small.store.drawers
    assert all(len(drawer.far_key) for drawer in drawers) and small.store.blocks.levels.disk
    loaded = made(per_head=per_head, more=limits).build(**GEOMETRY)
    loaded.load_state_dict(small.state_dict())
    twin, expected = small.fork(), feed(large, inputs, 60, 90)
    for state in (small, loaded, twin):
        assert all(torch.equal(a, b) for a, b in zip(feed(state, inputs, 60, 90), expected, strict=True))


def test_without_a_disk_least_used_pages_are_lost_and_the_stream_goes_on():
    page = 3 * 2 * 2 * 8 * 8
    state = made(share=1.0, more={"ram_bytes": 6 * page}).build(**GEOMETRY)
    inputs = random_inputs(state, 80)
    with pytest.warns(StoreWarning, match="used up, and the store has no disk"):
        outs = run(state, inputs, [4])
    assert all(out.isfinite().all() for out in outs) and state.store.blocks.lost
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(state, random_inputs(state, 1, seed=1), 0, 1, commit=False)


def test_a_page_that_is_wanted_stays_longest(tmp_path):
    """Queries look at one of four kinds of tokens all the time: its pages are in RAM, others on disk."""
    page = 4 * 2 * 2 * 8 * 8
    memory = made(near=4, bits=16, share=0.5, page=4, window=4, more={"ram_bytes": 8 * page, "disk": str(tmp_path)})
    state = memory.build(**{**GEOMETRY, "layers": 1, "rope": None})
    made_up = torch.Generator().manual_seed(0)
    kinds = 3 * torch.nn.functional.normalize(torch.randn(4, 2, 8, generator=made_up, dtype=torch.float64), dim=-1)
    for t in range(64):
        k = kinds[t % 4][None, :, None]
        q = 4 * kinds[0].repeat_interleave(2, 0)[None, :, None]
        with state.step(1):
            state.attend(0, q, k, k)
    state.store.settle()
    drawer, looked_at = state.store.drawers[0], int(state.store.drawers[0].far_key.min())
    assert len(drawer.far_key) >= 4 and looked_at > 0  # cluster 0 is of the first kind
    assert (drawer.full.key == 0).sum() >= 3


def test_what_left_in_a_step_is_taken_in_by_the_next():
    state = made(window=2).build(**GEOMETRY)
    inputs = random_inputs(state, 20)
    feed(state, inputs, 0, 5)
    assert not state.store.waiting
    feed(state, inputs, 5, 10)
    assert len(state.store.waiting) == 2  # one for each layer: tokens 0 to 2
    before = int((state.store.drawers[0].loose.key >= 0).sum())
    feed(state, inputs, 10, 11, commit=False)
    assert not before and int((state.store.drawers[0].loose.key >= 0).sum()) == 3


# -- one softmax over parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 5])
def test_parts_and_pieces_give_what_all_of_it_gives(dtype, m):
    made_up = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=made_up, dtype=torch.float64).to(dtype)

    query, near_k, near_v = draw(2, 6, m, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 4)
    far_k, far_v = draw(2, 3, 12, 8), draw(2, 3, 12, 4)
    seen = torch.rand(2, 3, 2, m, 12, generator=made_up) < 0.5
    seen[0, 0, 0] = False  # a query that sees nothing of a part
    seen = seen.unflatten(-1, (6, 2)).all(-1).repeat_interleave(2, -1)
    cost = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    bias = torch.cat([torch.zeros(2, 6, m, 7, dtype=dtype), cost.flatten(1, 2)], 3)
    null, keys, values = draw(1, 6, 1, 1), torch.cat([near_k, far_k], 2), torch.cat([near_v, far_v], 2)
    expected = softmax_attention(query, keys, values, bias, 0.3, 5.0, null)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    near = Part(near_k, near_v)
    pieces = Part(
        far_k.unflatten(2, (3, 4)).flatten(0, 2), far_v.unflatten(2, (3, 4)).flatten(0, 2),
        cost.unflatten(-1, (3, 4)).movedim(4, 2).flatten(0, 2)[..., ::2], torch.arange(6).repeat_interleave(3),
    )  # fmt: skip
    for far in (Part(far_k, far_v, cost), Part(far_k, far_v, cost[..., ::2]), pieces):
        got = attention_of_parts(query, [near, far], 0.3, 5.0, null)
        assert got.dtype is dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"fold": Clustered(), "window": 4}, "Contiguous moves what is held"),
        ({"fold": Clustered(), "place": Absolute(), "evict": LeastDiverse(9)}, "lose different tokens; take Oldest"),
        ({"recall": UntilMass(0.3), "place": Absolute()}, "Dropped makes none"),
        ({"recall": UntilMass(0.3), "fold": Spilled(3, 10**6), "window": 4}, "Spilled makes none"),
    ],
)
def test_what_does_not_go_together_is_refused(parts, reason):
    with pytest.raises(ValueError, match=reason):
        Memory(**parts)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Clustered(0, 0), "bits is 0"), (lambda: Clustered(10, 8), "near 10"),
        (lambda: Clustered(-1), "near -1"), (lambda: Clustered(page=0), "page is 0"),
        (lambda: UntilMass(0.0), "share is 0.0"), (lambda: UntilMass(0.5, "raw"), "weights is 'raw'"),
    ],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_by_itself_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_what_a_cluster_cannot_take_back_is_refused():
    state = made().build(**GEOMETRY)
    inputs = random_inputs(state, 20)
    run(state, inputs, [4])
    with pytest.raises(ValueError, match="recache"), state.recache(4):
        state.attend(0, *(x[:, :, :4] for x in inputs[0]))
    with pytest.raises(ValueError, match="undo"):
        state.truncate(1)
    with pytest.raises(ValueError, match="seek"):
        state.seek(100)
    with pytest.raises(ValueError, match="not of pages like these"):
        made(page=5).build(**GEOMETRY).load_state_dict(state.state_dict())
    assert state.position == 20 and isinstance(state.memory.evict, Evict) and not isinstance(Absolute(), Contiguous)
