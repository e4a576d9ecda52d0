"""The claim about clusters says what it measured, also where nothing was promised."""

import torch

from evenflow.claims import clustering, registry
from evenflow.recipes import recipe

SMALL = clustering.Looks(heads=4, kv_heads=2, head_dim=16, patches=5)


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return {row.what: row for row in bench.rows}, bench.figures


def named(rows, *words):
    """The one row with these words in it."""
    (row,) = [row for what, row in rows.items() if all(word in what for word in words)]
    return row


def test_old_details_are_found_where_a_window_of_as_many_bytes_has_lost_them():
    rows, _ = rows_of(clustering.ages)
    assert named(rows, ": v-rex").holds
    assert max(float(share) for share in named(rows, "plain window").ours.split(", ")) < 0.1
    ours, plain = (int(row.note.split(" ")[0].replace(",", "")) for row in rows.values())
    assert plain >= ours


def test_token_by_token_the_mass_is_enough_and_in_clusters_that_is_told():
    rows, _ = rows_of(clustering.mass, 5)
    assert named(rows, "token by token").holds
    assert named(rows, "in clusters").holds is None and "% of queries are below" in named(rows, "in clusters").note


def test_a_stream_looks_as_it_says():
    scene = SMALL.scene(3)
    for frame in (96, 100):
        keys, values = SMALL.frames(frame, 1)
        assert torch.equal(keys, SMALL.frames(frame, 1)[0]) and values.shape == (1, 2, 5, 16)
        assert torch.nn.functional.cosine_similarity(keys[0], scene, dim=-1).min() > 0.9
    assert not torch.allclose(SMALL.scene(4), scene)
    scores = SMALL.queries(40, 5)[0, 0] @ SMALL.scene(0)[0].T / 4
    assert scores.argmax(-1).tolist() == [0, 1, 2, 3, 4] and SMALL.queries(40, 1).shape == (1, 4, 1, 16)


def test_a_fixed_number_of_clusters_is_that_many_and_all_of_the_mass_is_everything():
    memory = recipe("v-rex", window=20)
    state = clustering.filled(SMALL, memory, 400)
    clusters, full = clustering.used(state), clustering.exact(state, memory, SMALL, 5)
    for k, expected in ((clusters, True), (1, False)):
        twin = clustering.like(state, clustering.replace(memory, recall=clustering.BestClusters(0.3, k=k)), SMALL)
        out, shares = clustering.looked(twin, SMALL, 5)
        assert torch.allclose(out, full, atol=1e-5) == expected
    assert max(shares) < 0.6
    everything = clustering.looked(clustering.like(state, recipe("v-rex", window=20, th_r=1.0), SMALL), SMALL, 1)[1]
    # All but the window, and what is just leaving it.
    assert all(share == (400 - 20 - 5) / 400 for share in everything)


def test_fewer_tokens_at_equal_error():
    rows, figures = rows_of(clustering.adaptive)
    for what in ("in every head", "together"):
        assert named(rows, what, "Th_r 0.3").holds
    assert float(named(rows, "generation").ours.split("%")[0]) < float(named(rows, "frames").ours.split("%")[0])
    assert len(figures["error over share of tokens fetched|x|by mass"]) >= 3


def test_clusters_by_similarity_and_the_size_of_their_table():
    rows, _ = rows_of(clustering.similar, 20)
    assert all(row.holds for row in rows.values()) and len(rows) == 6
    (row,) = rows_of(clustering.table)[0].values()
    assert row.ours == "1.59%" and row.holds


def test_steps_of_both_kinds_are_timed_beside_full_attention():
    rows, figures = rows_of(clustering.steps, (1100, 1200), 1, SMALL)
    assert len(rows) == 6 and len(figures) == 8
    for row in list(rows.values())[:4]:
        assert all(float(ratio[1:]) > 0 for ratio in row.ours.split(", ")) and "choosing" in row.note
