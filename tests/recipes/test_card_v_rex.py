"""What must hold for V-Rex (arXiv 2512.12284): clusters of alike keys, and as many of them as hold the attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import evenflow as ef
from evenflow.cli import app
from evenflow.memory.hashing import hamming, hash_bits, hyperplanes
from evenflow.memory.mass import until_mass
from evenflow.recipes.reference import v_rex

from .drive import play, random_calls, worst

ROPE = ef.Rope()
DIM = 12
DOUBLE = torch.zeros(1, dtype=torch.float64)


def build(*, layers=2, kv_heads=2, dtype=torch.float64, rope=ROPE, head_dim=DIM, batch=1, **params):
    memory = ef.recipe("v-rex", **{"window": 5, "n_hp": 8, "th_hd": 3, "page": 3, **params})
    return memory.build(
        layers=layers, heads=4, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, rope=rope, batch=batch
    )  # fmt: skip


def theirs(calls, *, window=5, n_hp=8, th_hd=3, th_r=0.3, per_head=False, seed=0, **options):
    """What the reference gives for the same, outputs and clusters."""
    dim = DIM * (1 if per_head else len(calls[0][0].k))
    planes = hyperplanes(dim, n_hp, seed=seed, like=DOUBLE)
    return v_rex.run(calls, ROPE, window=window, planes=planes, th_hd=th_hd, th_r=th_r, per_head=per_head, **options)


def clusters_of(state, layer=0, row=0, group=0):
    """Members of each cluster of one row, by where they are: in the window, loose, or in pages."""
    state.store.settle()
    mine, table, drawer = state.mine[layer]["fold"], state.tables[state.table(layer)], state.store.drawers[layer]
    index, label = table.index[min(row, len(table.index) - 1), 0].tolist(), mine["label"][row, group].tolist()
    found = [(cluster, at) for cluster, at in zip(label, index, strict=True) if at >= 0]
    owner = int(mine["shelf"][row]) * state.store.groups + group
    for key, members in (
        (drawer.loose.key, drawer.loose.members), (drawer.full.key, drawer.full.members),
        (drawer.far_key, drawer.far_members),
    ):  # fmt: skip
        for one, run in zip(key.tolist(), members.tolist(), strict=True):
            if one >= 0 and one // 2**32 == owner:
                found += [(one % 2**32, at) for at in run]
    clusters = {}
    for cluster, at in sorted(found):
        clusters.setdefault(cluster, []).append(at)
    return [clusters[n] for n in range(len(clusters))]


def scenes(count, *, frame=6, spread=0.05, kv_heads=2, head_dim=DIM, every=10**9, seed=0):
    """Calls of one layer: frames of the same tokens and some noise, with new ones `every` so many frames; keys are apart."""
    calls, made = [], torch.Generator().manual_seed(seed)
    shown = None
    for t in range(count):
        if t % every == 0:
            shown = 2 * torch.randn(kv_heads, frame, head_dim, generator=made, dtype=torch.float64)
        noise = spread * torch.randn(kv_heads, frame, head_dim, generator=made, dtype=torch.float64)
        q, v = (torch.randn(h, frame, head_dim, generator=made, dtype=torch.float64) for h in (4, kv_heads))
        calls.append(v_rex.Call(q, shown + noise, v))
    return [calls]


def cut(calls, sizes):
    """One call of each layer, as calls of so many tokens."""
    return [
        [v_rex.Call(q, k, v) for q, k, v in zip(*(x.split(sizes, 1) for x in (one.q, one.k, one.v)), strict=True)]
        for (one,) in calls
    ]  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("per_head", [False, True])
def test_any_cut_equals_the_reference(kv_heads, per_head):
    whole = random_calls([24], layers=1, kv_heads=kv_heads)
    expected = theirs(whole, per_head=per_head)[0][0][0]
    for sizes in ([1] * 24, [4] * 6, [7, 1, 13, 2, 1], [24]):
        (ours,) = play(build(layers=1, kv_heads=kv_heads, per_head=per_head), cut(whole, sizes))
        assert float((torch.cat(ours, 1) - expected).abs().max()) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"union": True}, {"union": True, "per_head": True, "weights": "shifted"}, {"weights": "shifted"},
        {"unrotated": True}, {"unrotated": True, "union": True}, {"th_r": 0.9}, {"th_r": 1.0}, {"th_r": 1e-6},
        {"th_hd": 0}, {"th_hd": 9}, {"n_hp": 1, "th_hd": 1}, {"window": 1}, {"window": 40}, {"seed": 3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tentative", [0, 1])
def test_calls_of_any_kind_equal_the_reference(options, tentative):
    calls = random_calls([5, 1, 8, 1, 9], layers=1, tentative=tentative, seed=2)
    assert worst(play(build(layers=1, **options), calls), theirs(calls, **options)[0]) < 1e-10


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 6), st.integers(1, 8),
    st.sampled_from([0.05, 0.3, 0.8]), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_any_sizes_equal_the_reference(sizes, window, th_hd, page, th_r, union, seed):
    calls = random_calls(sizes, layers=1, seed=seed)
    options = {"window": window, "th_hd": th_hd, "th_r": th_r, "union": union}
    assert worst(play(build(layers=1, page=page, **options), calls), theirs(calls, **options)[0]) < 1e-10


# -- point 1: exactness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [[1] * 20, [7] * 4])
def test_point_1_all_of_the_mass_is_full_attention(dtype, tolerance, sizes):
    calls = random_calls(sizes)
    full = ef.recipe("full").build(layers=2, heads=4, kv_heads=2, head_dim=DIM, rope=ROPE, dtype=dtype)
    assert worst(play(build(th_r=1.0, dtype=dtype), calls), play(full, calls)) < tolerance


def test_point_1_no_near_bits_is_token_by_token_to_the_bit():
    calls = random_calls([5] * 8, layers=1)
    state = build(layers=1, th_hd=0)
    play(state, calls)
    mine = state.mine[0]["fold"]
    keys = v_rex.rotated(torch.cat([call.k for call in calls[0]], 1), range(40), ROPE)
    used = mine["count"][0, 0] > 0
    assert mine["count"][0, 0][used].tolist() == [1] * 40
    assert torch.equal(mine["mean"][0, 0][used], turned_keys(state, calls[0]).transpose(0, 1).flatten(1))
    torch.testing.assert_close(mine["mean"][0, 0][used], keys.transpose(0, 1).flatten(1), rtol=0, atol=1e-12)
    assert clusters_of(state) == [[n] for n in range(40)]


def turned_keys(state, calls):
    """Keys as the memory rotates them, [H_kv, n, D]."""
    rotary, keys = state.rotaries[ROPE], torch.cat([call.k for call in calls], 1)
    return rotary.rotate(keys, *rotary.at(torch.arange(keys.shape[1])))


# -- point 2: partition --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("th_hd", [2, 3, 5])
def test_point_2_every_token_is_in_one_cluster_whose_mean_is_theirs(per_head, th_hd):
    calls = random_calls([6, 1, 4, 9, 13, 2, 20], seed=1)
    state = build(per_head=per_head, th_hd=th_hd)
    play(state, calls)
    expected = theirs(calls, per_head=per_head, th_hd=th_hd)[1]
    for layer in range(2):
        keys, mine = turned_keys(state, calls[layer]), state.mine[layer]["fold"]
        for group in range(2 if per_head else 1):
            members = clusters_of(state, layer, group=group)
            assert members == [cluster.members for cluster in expected[layer][group]]
            assert sorted(at for cluster in members for at in cluster) == [*range(55)]
            count = mine["count"][0, group]
            assert count[count > 0].tolist() == [len(cluster) for cluster in members]
            own = keys[group] if per_head else keys.transpose(0, 1).flatten(1)
            means = torch.stack([own[cluster].mean(0) for cluster in members])
            torch.testing.assert_close(mine["mean"][0, group, : len(members)], means, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_point_2_keys_and_values_off_the_device_are_never_changed(dtype):
    calls = random_calls([4] * 20, layers=1)
    state = build(layers=1, dtype=dtype)
    play(state, calls)
    everything = torch.ones(1, 2, state.mine[0]["fold"]["count"].shape[-1], dtype=torch.bool)
    keys = turned_keys(state, [v_rex.Call(c.q, c.k.to(dtype), c.v) for c in calls[0]])
    values = torch.cat([call.v for call in calls[0]], 1).to(dtype)
    seen = set()
    for tokens in state.store.fetch(0, everything, torch.zeros(1, dtype=torch.int64)):
        for piece, head in enumerate(tokens.head.tolist()):
            for n, at in enumerate(tokens.index[piece].tolist()):
                if at >= 0:
                    seen.add((head, at))
                    assert torch.equal(tokens.keys[piece, n], keys[head, at])
                    assert torch.equal(tokens.values[piece, n], values[head, at])
    assert seen == {(head, at) for head in range(2) for at in range(71)}


# -- point 3: mass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("th_r", [0.1, 0.3, 0.7, 0.95])
def test_point_3_token_by_token_what_is_taken_holds_the_share_of_the_true_mass(th_r):
    """Of all tokens before it, by each query; and no more than are needed, but for the one that reaches the share."""
    calls = random_calls([1] * 60, layers=1)
    keys = v_rex.rotated(torch.cat([call.k for call in calls[0]], 1), range(60), ROPE)
    for t in (1, 20, 59):
        query = v_rex.rotated(calls[0][t].q, [t], ROPE)[:, 0]
        scores = torch.einsum("hd,hnd->hn", query, keys[:, :t].repeat_interleave(2, 0)) / DIM**0.5
        taken = until_mass(scores, torch.ones(t), th_r)
        mass = scores.softmax(-1)
        held = (mass * taken).sum(-1)
        assert (held >= th_r - 1e-9).all()
        least = torch.where(taken, mass, torch.inf).amin(-1)
        assert (held - least < th_r).all()


# -- point 4: adaptivity -------------------------------------------------------------------------------------------


def test_point_4_a_peaked_row_takes_few_and_a_flat_one_many():
    peaked = torch.zeros(500, dtype=torch.float64)
    peaked[[3, 77, 200, 301, 499]] = 8.0
    flat = 0.1 * torch.randn(200, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = torch.full((500,), 7)
    for th_r, few, many in ((0.3, 2, 134), (0.9, 5, 441)):
        assert int(until_mass(peaked, count, th_r).sum()) == few
        assert abs(float(until_mass(flat, count, th_r).sum(-1).double().mean()) - many) < 3


# -- point 5: redundancy -------------------------------------------------------------------------------------------


def tokens_per_cluster(spread, count=20):
    state = build(layers=1, n_hp=32, th_hd=7, rope=None, head_dim=32)
    play(state, scenes(count, spread=spread, head_dim=32))
    return 6 * count / int((state.mine[0]["fold"]["count"] > 0).sum())


def test_point_5_a_static_stream_has_as_many_clusters_as_patches():
    state = build(layers=1, n_hp=32, th_hd=7, rope=None)
    calls = scenes(24)
    for t in range(24):
        play(state, [calls[0][t : t + 1]])
        assert int((state.mine[0]["fold"]["count"] > 0).sum()) == 6
    other = scenes(24, every=8)
    state.reset()
    for t in range(24):
        play(state, [other[0][t : t + 1]])
        assert int((state.mine[0]["fold"]["count"] > 0).sum()) <= 6 * (t // 8 + 1)


def test_point_5_tokens_per_cluster_rise_with_similarity_and_noise_has_one_each():
    rising = [tokens_per_cluster(spread) for spread in (20.0, 1.5, 0.8, 0.05)]
    assert rising == sorted(rising) and rising[0] < 1.4 and rising[-1] == 20


def test_point_5_a_static_stream_is_flat_on_the_device():
    state, sizes = build(layers=1, n_hp=32, th_hd=7, rope=None), []
    calls = scenes(50)
    for t in range(50):
        play(state, [calls[0][t : t + 1]])
        sizes.append(state.nbytes)
    assert sizes[-1] == sizes[5] and state.position == 300


# -- point 6: distances ---------------------------------------------------------------------------------------------


def test_point_6_a_product_of_signs_is_xor_and_popcount():
    made = torch.Generator().manual_seed(0)
    for bits in (1, 7, 32, 64, 200):
        a, b = (torch.rand(n, bits, generator=made) < 0.5 for n in (30, 50))
        words = [[sum(int(bit) << n for n, bit in enumerate(row)) for row in x.tolist()] for x in (a, b)]
        expected = [[(x ^ y).bit_count() for y in words[1]] for x in words[0]]
        assert hamming(a, b).tolist() == expected


def test_point_6_bits_below_and_on_a_plane_are_0():
    planes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert hash_bits(torch.tensor([[1.0, -1.0], [0.0, 2.0]]), planes).tolist() == [[True, False], [False, True]]


# -- point 7: early exit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weights", ["exp", "shifted"])
def test_point_7_early_exit_takes_what_a_full_sort_takes(ties, weights):
    made = torch.Generator().manual_seed(1)
    scores = 2 * torch.randn(1000, 60, generator=made, dtype=torch.float64)
    scores = scores.round() if ties else scores
    counts = torch.randint(1, 40, (60,), generator=made)
    for th_r in (0.3, 0.9):
        taken = until_mass(scores, counts, th_r, weights)
        for row in range(1000):
            assert taken[row].nonzero()[:, 0].tolist() == v_rex.wicsum(scores[row], counts, th_r, weights)


def test_point_7_of_equals_the_oldest_cluster_comes_first():
    assert until_mass(torch.zeros(8), torch.ones(8), 0.5).tolist() == [True] * 4 + [False] * 4


# -- point 8: size of the index --------------------------------------------------------------------------------------


def test_point_8_the_table_is_as_large_as_the_paper_says():
    """8 key heads of 128, 32 tokens to a cluster, numbers of 16 bits."""
    heads, dim, each, clusters = 8, 128, 32, 20
    made = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, 1, heads * dim, generator=made)
    keys = (centres + 0.05 * torch.randn(clusters, each, heads * dim, generator=made)).flatten(0, 1)
    keys = keys[torch.randperm(len(keys), generator=made)].bfloat16()
    state = ef.recipe("v-rex", window=16).build(
        layers=1, heads=8, kv_heads=heads, head_dim=dim, rope=None, dtype=torch.bfloat16
    )
    for part in keys.split(16):
        x = part.unflatten(1, (heads, dim)).transpose(0, 1)[None]
        with state.step(16):
            state.attend(0, x, x, x)
    mine = state.mine[0]["fold"]
    assert int((mine["count"] > 0).sum()) == clusters
    table = sum(mine[name][0, 0, :clusters].nbytes for name in ("bits", "mean", "count"))
    whole, d = len(keys) * heads * 2 * dim * 2, heads * dim
    paper = (2 * d + 4 + 4 + 4 * each) / (each * 4 * d)
    assert abs(paper - 0.0167) < 1e-4
    # Ours has a byte for a bit and 8 for a count; the members' numbers are not on the device.
    assert abs(table / whole - (2 * d + 32 + 8) / (each * 4 * d)) < 1e-9 and table / whole < paper
    assert mine["mean"].dtype is torch.bfloat16


# -- point 9: cost ---------------------------------------------------------------------------------------------------


def test_point_9_scoring_costs_clusters_and_not_tokens(monkeypatch):
    """Products of queries and means, counted, while a static stream grows eightfold."""
    from evenflow.memory import clustered

    inner, counted = clustered._products, []

    def counting(query, keys):
        counted[-1] += keys.shape[2]
        return inner(query, keys)

    monkeypatch.setattr(clustered, "_products", counting)
    state, calls = build(layers=1, n_hp=32, th_hd=7, rope=None), scenes(40, frame=6)
    for t in range(40):
        counted.append(0)
        play(state, [calls[0][t : t + 1]])
    assert counted[4] == counted[39] == 6 + 6  # means of six clusters, and the frame itself


def test_point_9_fewer_tokens_than_a_fixed_number_of_clusters_at_equal_error():
    """Three queries of four look at one cluster of 60, one at all of them."""
    made = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(60, 32, generator=made, dtype=torch.float64), dim=-1)
    keys = (centres[:, None] + 0.02 * torch.randn(60, 20, 32, generator=made, dtype=torch.float64)).flatten(0, 1)
    values = torch.randn(1200, 32, generator=made, dtype=torch.float64)
    queries = torch.cat([12 * centres * 32**0.5, 0.5 * torch.randn(20, 32, generator=made, dtype=torch.float64)])
    scores, by_cluster = queries @ keys.T / 32**0.5, queries @ keys.unflatten(0, (60, 20)).mean(1).T / 32**0.5
    exact = scores.softmax(-1) @ values

    def error(taken):
        seen = taken.repeat_interleave(20, 1)
        return float((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values - exact).norm() / exact.norm())

    ours = until_mass(by_cluster, torch.full((60,), 20), 0.9)
    best = by_cluster.argsort(-1, descending=True)
    for k in range(1, 61):
        top = torch.zeros_like(ours).scatter(-1, best[:, :k], True)
        if error(top) <= error(ours):
            break
    assert error(ours) < 0.1 and k > 2 * float(ours.sum(-1).double().mean())


# -- point 10: causality and determinism -----------------------------------------------------------------------------


def test_point_10_the_same_seed_makes_the_same_clusters_and_another_seed_others():
    calls = random_calls([6] * 8)
    one, same, other = build(), build(), build(seed=1)
    for state in (one, same, other):
        play(state, calls)
    assert clusters_of(one, 1) == clusters_of(same, 1) != clusters_of(other, 1)
    one.reset()
    assert clusters_of_nothing(one) and worst(play(one, calls), play(build(), calls)) == 0


def clusters_of_nothing(state):
    return all(mine["fold"]["count"].sum() == 0 for mine in state.mine) and state.position == 0


def test_point_10_what_comes_later_changes_nothing_before():
    calls, other = random_calls([6] * 8), random_calls([6] * 8)
    for layer in other:
        for call in layer[5:]:
            call.k[:], call.v[:] = -call.k, call.v + 1
    ours, theirs_ = play(build(), calls), play(build(), other)
    for a, b in zip(ours, theirs_, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True)) and not torch.equal(a[6], b[6])


def test_point_10_a_query_counts_only_what_came_before_it():
    """Six alike tokens in one step: for each, the cluster holds those before it, of which all but one have left."""
    one = scenes(1, frame=1, kv_heads=1)[0][0]
    alike = v_rex.Call(*(x.repeat(1, 6, 1) for x in (one.q, one.k)), torch.eye(6, DIM, dtype=torch.float64)[None])
    state = build(layers=1, kv_heads=1, window=1, rope=None)
    ((out,),) = play(state, [[alike]])
    even = torch.ones(6, 6, dtype=torch.float64).tril() / torch.arange(1, 7)[:, None]
    assert torch.allclose(out[..., :6], even.expand(4, 6, 6), rtol=0, atol=1e-12)
    assert clusters_of(state) == [[*range(6)]]


# -- what else a recipe promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"th_r": 0.0}, "th_r is 0.0"), ({"weights": "raw"}, "weights 'raw'"), ({"n_hp": 0}, "n_hp is 0"),
        ({"th_hd": 10}, "th_hd 10"), ({"page": 0}, "page is 0"), ({"window": 0}, "window is 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(params, reason):
    with pytest.raises(ValueError, match=f"^v-rex: .*{reason}"):
        build(**params)


def test_a_question_about_a_scene_brings_back_that_scene():
    """A question about one of six scenes brings back nothing else."""
    state = build(layers=1, n_hp=32, th_hd=7, rope=None, th_r=0.6)
    calls = scenes(60, every=10)
    play(state, calls)
    asked = 3 * calls[0][35].k[:1, :1].repeat(4, 1, 1)
    step = state.step(1, commit=False)
    with step:
        state.attend(0, asked[None], *(torch.zeros(1, 2, 1, DIM, dtype=torch.float64) for _ in "kv"))
    index = torch.cat([tokens.index[tokens.head == 0].flatten() for tokens in step.shared[ef.memory.UntilMass, 0]])
    frames = (index[index >= 0] // 6).tolist()
    assert len(frames) >= 10 and {*frames} <= {*range(30, 40)}


# -- on text ---------------------------------------------------------------------------------------------------------

TEXT = "The committee met again on the second day, and the chairman read the report of the first. " * 6


def test_a_model_reads_text_the_same_in_any_pieces_and_with_all_of_the_mass_as_by_full_attention():
    spec = "v-rex(window=16, th_r={})"
    whole, pieces = (ef.open("tiny", spec.format(0.5)) for _ in range(2))
    ids = torch.tensor(whole.tokenizer.encode(TEXT, add_special_tokens=False))
    at_once = whole.feed(ids)
    apart = torch.cat([pieces.feed(part) for part in ids.split([1, 30, 7, 2, len(ids) - 40])], 1)
    torch.testing.assert_close(apart, at_once, rtol=0, atol=1e-3)
    exact = ef.open("tiny", "full").feed(ids)
    torch.testing.assert_close(ef.open("tiny", spec.format(1.0)).feed(ids), exact, rtol=0, atol=1e-3)
    window = ef.open("tiny", "window(window=16)").feed(ids)
    assert (at_once - exact).square().mean() < (window - exact).square().mean()


def test_the_command_reads_a_text_with_it(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    result = CliRunner().invoke(app, ["read", str(path), "--memory", "v-rex(window=16, th_r=0.5)"])
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
