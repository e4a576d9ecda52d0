"""Claims about memories of frames say what they measured, also where it is not what was promised."""

from evenflow.claims import registry, streams_of_frames


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return {row.what: row for row in bench.rows}, bench.figures


def test_unusual_keys_stay_where_recent_frames_lose_them():
    rows, _ = rows_of(streams_of_frames.unusual, 60, 10, 2)
    held = {what.rpartition(", ")[2]: row for what, row in rows.items() if "held" in what}
    assert held["infinite-vggt"].ours == "100.0%" and held["infinite-vggt"].holds
    assert float(held["first and last frames"].ours[:-1]) < 30 and held["first and last frames"].holds is None


def test_layers_that_see_nothing_new_get_less():
    rows, figures = rows_of(streams_of_frames.budgets, 30, 8)
    assert len(rows) == 2 and all(row.holds for row in rows.values())
    assert figures["share of a layer that sees nothing new over frames|y|near-equal keys"][-1] < 0.3


def test_a_window_of_frames_is_a_band():
    rows, figures = rows_of(streams_of_frames.banded, 20, 4)
    assert len(rows) == 10 and all(row.holds for row in rows.values())
    assert figures["what a change of frame 0 moves over frames|x"][-1] == 12


def test_words_outlive_pictures():
    rows, _ = rows_of(streams_of_frames.conversation, 100, 16)
    assert [row.holds for row in rows.values()] == [True, None, True, None]


def test_far_positions_are_compared_on_one_text():
    rows, figures = rows_of(streams_of_frames.far, 2, 64, 20, 64)
    assert [row.what.split()[0] for row in rows.values()] == ["contiguous", "native"]
    ratio = [float(row.ours[1:].split()[0]) for row in rows.values()]
    assert 0.8 < ratio[0] < 1.2 and ratio[1] > 0.8
    assert {key.rpartition("|")[2] for key in figures} == {"contiguous", "native"}
