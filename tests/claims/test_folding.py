"""Claims about memories that fold, choose or move say what they measured, also where it is not what was promised."""

from evenflow.claims import folding, registry


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return {row.what: row for row in bench.rows}, bench.figures


def named(rows, *words):
    """The one row with these words in it."""
    (row,) = [row for what, row in rows.items() if all(word in what for word in words)]
    return row


def test_a_sink_that_is_averaged_follows_and_one_that_is_not_stays():
    rows, _ = rows_of(folding.drifting, 1000)
    assert named(rows, "cosine", ": reward-forcing").holds
    assert named(rows, "cosine", ": static sink").ours == "0.000 and 1.000"
    assert float(named(rows, "first scene", "plain window").ours) < 0.01
    assert float(named(rows, "first scene", ": static sink").ours) > float(named(rows, "first scene", ": reward").ours)


def test_the_half_life_is_counted_chunk_by_chunk():
    rows, figures = rows_of(folding.half_life)
    assert {row.ours for row in rows.values()} == {"693", "69", "7"} and all(row.holds for row in rows.values())
    shares = figures["share of the opening in the sink over chunks|y|alpha 0.9"]
    assert len(shares) == 8 and abs(shares[1] - 0.9) < 1e-9


def test_a_sink_in_bfloat16_stands_still_unless_rounding_is_carried():
    rows, _ = rows_of(folding.half_precision, 500)
    assert named(rows, "carried").holds
    assert float(named(rows, "lost").ours) == 0.25


def test_what_frames_look_at_is_kept_and_others_lose_it():
    rows, _ = rows_of(folding.participative, 14)
    assert named(rows, "less that of the best").holds and named(rows, "look at,", ": deep-forcing").holds
    assert all(float(named(rows, "look at,", name).ours) < 0.5 for name in ("random", "newest", "plain"))


def test_a_detail_is_chosen_seven_times_and_then_lost():
    rows, figures = rows_of(folding.released, 26)
    (row,) = rows.values()
    assert row.ours == "7" and "10 of 10" in row.note
    assert max(figures["recall of a watched detail over chunks|y|deep-forcing, re-use 7"][7:]) < 0.1
    assert all(row.holds for row in rows_of(folding.sizes)[0].values())
    assert len(rows_of(folding.price, 8)[0]) == 2


def test_an_anchor_that_moves_along_reads_the_same_for_ever():
    rows, _ = rows_of(folding.offset)
    assert named(rows, "a month", ": rolling-forcing").holds
    assert float(named(rows, "a month", "its own time").ours) > 1e-3


def test_a_window_sees_the_opening_and_a_clean_pass_does_not():
    rows, _ = rows_of(folding.anchored, 10)
    assert named(rows, "15 frames", ": rolling-forcing").holds and named(rows, "clean", ": rolling-forcing").holds
    assert float(named(rows, "15 frames", "plain window").ours) < 0.1
    assert named(rows_of(folding.flat, 20)[0], "bytes").holds
