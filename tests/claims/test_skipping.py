"""Claims about memories that attend a part, or hold many as one, say what they measured, promised or not."""

from evenflow.claims import registry, skipping


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return {row.what: row for row in bench.rows}, bench.figures


def named(rows, *words):
    """The one row with these words in it."""
    (row,) = [row for what, row in rows.items() if all(word in what for word in words)]
    return row


def test_blocks_are_chosen_nearly_as_well_as_can_be():
    rows, figures = rows_of(skipping.blocks, 192)
    assert named(rows, "query blocks").ours == "74 and 44 of 220" and named(rows, "three quarters").holds
    ours, drawn = (
        figures[f"error of a fifth of the blocks over share that neighbours have in common|y|{name}"]
        for name in ("best by mean keys", "at random")
    )
    assert ours[0] > 0.5 and ours[-1] < drawn[-1] / 4


def test_what_has_left_is_in_the_state_and_not_in_the_window():
    rows, figures = rows_of(skipping.trace, 12)
    assert named(rows, "even look").holds
    shares = figures["share of one chunk in an even look over chunks since|y|hybrid-forcing"]
    assert all(share > 0 for share in shares)
    assert figures["share of one chunk in an even look over chunks since|y|window"][-1] == 0
    assert all(row.holds for row in rows_of(skipping.constant, 8)[0].values())


def test_details_that_have_left_are_recalled_by_the_state_alone(monkeypatch):
    monkeypatch.setattr(skipping, "TOGETHER", 24)
    rows, _ = rows_of(skipping.left, 1)
    assert abs(float(named(rows, "recall", "window alone").ours)) < 0.05
    assert named(rows, "recall", "projection 1").holds and named(rows, "recall", "fitted").holds
    assert named(rows, "own outputs").holds in (True, False)


def test_blocks_and_buckets_are_timed_beside_dense_attention():
    rows, figures = rows_of(skipping.cheaper, (16, 32))
    assert len(rows) == 4 and figures["speed of block-sparse attention, dense 1, over keys|x"] == [144, 288]
    rows, figures = rows_of(skipping.buckets, 64)
    assert named(rows, "shares a bucket").holds
    assert len([row for what, row in rows.items() if "hashed attention time" in what]) == 3


def test_the_cache_grows_with_what_is_new():
    rows, _ = rows_of(skipping.merged, 6, (0.1,), (0.1, 0.5))
    assert named(rows, "10% of a frame").ours == "25.0%" and named(rows, "overlap").holds
    assert named(rows, "half as large").holds
    rows, _ = rows_of(skipping.beside_window, 10)
    assert named(rows, "over the window's").holds and named(rows, "gone", ": temp-cache").holds
    assert float(named(rows, "gone", ": window").ours) < 0.6


def test_equal_keys_are_one_without_loss():
    assert named(rows_of(skipping.exact, 6)[0], "equal keys").holds
    assert named(rows_of(skipping.representatives)[0], "turn slowly").holds


def test_a_long_stream_of_the_same_things_is_flat():
    rows, figures = rows_of(skipping.flat, 60)
    assert named(rows, "frames over those after 20", ": temp-cache").ours.startswith("×1.00")
    sizes = figures["MB held over frames of the same things|y|whole cache"]
    assert sizes[-1] > 5 * figures["MB held over frames of the same things|y|temp-cache"][-1]


def test_a_frame_needs_a_part_of_the_prompt():
    rows, figures = rows_of(skipping.prompts)
    assert named(rows, "prompt tokens").holds
    kept = figures["share of the prompt kept over topics of 32 in the frame|y"]
    assert kept == sorted(kept) and kept[0] < 0.3 and kept[-1] > 0.9
