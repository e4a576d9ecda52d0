"""Claims about windows of frames say what they measured, also where it is not what was promised."""

from evenflow.claims import registry, windows


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return {row.what: row for row in bench.rows}, bench.figures


def named(rows, *words):
    """The one row with these words in it."""
    (row,) = [row for what, row in rows.items() if all(word in what for word in words)]
    return row


def test_the_cache_is_the_dense_pass_and_passes_leave_nothing():
    rows, _ = rows_of(windows.dense, 3)
    assert len(rows) == 2 and all(row.holds for row in rows.values())
    assert named(rows_of(windows.noisy, 5)[0], "noisy").ours == "nothing"


def test_a_window_is_flat_and_a_whole_cache_grows():
    rows, figures = rows_of(windows.endless, 20)
    assert named(rows, "bytes", "of 12").ours == "×1.00" and named(rows, "bytes", "no window").holds
    assert len(figures["MB held over chunks|y|no window"]) == 20


def test_a_window_knows_what_is_in_it():
    assert named(rows_of(windows.reach, 16)[0], "within").holds


def test_the_opening_stays_where_a_window_loses_it():
    rows, figures = rows_of(windows.opening, 12)
    assert named(rows, "opening", "longlive, infinity").holds
    assert named(rows, "opening", ", window").holds is None
    assert figures["recall of the opening over chunks|y|window"][-1] < 0.1


def test_a_window_computed_anew_forgets_the_prompt_and_not_the_frames():
    rows, _ = rows_of(windows.switch, 3, 2)
    assert named(rows, "old prompt", "sinks too").ours == "0%"
    assert named(rows, "12 frames before", "sinks too").holds
    assert named(rows, "12 frames before", "clear").ours == "0%"
    assert not [row for row in rows.values() if row.holds is False]
    assert named(rows_of(windows.price)[0], "recache").ours.endswith("%")


def test_a_junction_is_recalled_where_all_others_have_lost_it():
    rows, _ = rows_of(windows.junctions, 1)
    assert named(rows, ", anchor-forcing").holds
    assert all(float(row.ours) < 0.5 for what, row in rows.items() if "anchor-forcing" not in what)
    assert named(rows_of(windows.bounded)[0], "three regions").ours == "0"


def test_motionstream_does_not_know_how_old_it_is():
    rows, _ = rows_of(windows.origin, 4)
    assert named(rows, "un-rotated").holds and named(rows, "stored rotated").holds
    assert named(rows, "largest position").ours == "8"
    assert all(row.holds for row in rows_of(windows.kept, 8)[0].values())
    assert named(rows_of(windows.cost, 16)[0], "attention time").ours


def test_the_reference_runs_ahead_and_the_knot_is_not_kept():
    for measure, size in ((windows.ahead, (100,)), (windows.identity, (10,)), (windows.borders, ())):
        rows, _ = rows_of(measure, *size)
        assert rows and all(row.holds for row in rows.values())
