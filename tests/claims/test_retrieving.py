"""Claims about memories that bring things back say what they measured, also where nothing was promised."""

import evenflow as ef
from evenflow.claims import registry, retrieving


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return {row.what: row for row in bench.rows}, bench.figures


def named(rows, *words):
    """The one row with these words in it."""
    (row,) = [row for what, row in rows.items() if all(word in what for word in words)]
    return row


def test_a_detail_of_any_age_is_brought_back_where_a_window_has_lost_it():
    rows, figures = rows_of(retrieving.ages)
    assert named(rows, ": rekv").holds and named(rows, "device bytes").holds
    assert min(figures["recall of a detail over its age in frames|y|rekv"]) > 0.9
    assert max(figures["recall of a detail over its age in frames|y|window"][-2:]) < 0.1


def test_the_frame_asked_about_is_found_and_drawing_would_not_find_it():
    rows, _ = rows_of(retrieving.found, 60, 8)
    assert named(rows, "frame asked about").ours == "100.0%" and named(rows, "drawn").ours == "11.7%"


def test_the_device_is_flat_and_the_host_grows_by_the_formula():
    rows, figures = rows_of(retrieving.flat, 3)
    assert named(rows, "device bytes").ours == "1.00" and named(rows, "host bytes").ours == "65,536"
    assert float(named(rows, "time of a frame").ours) > 0
    host, device = (figures[f"MB over frames|y|{name}"] for name in ("host", "device"))
    assert host[-1] > host[1] > host[0] == 0 and device[-1] == device[20]


def test_an_answer_and_attention_to_everything_read_the_same_stream():
    rows, figures = rows_of(retrieving.cost, 1)
    assert len([what for what in rows if what.startswith("answer from 1 of")]) == 6
    ours, theirs = (figures[f"seconds of an answer over frames|y|{n}"] for n in ("rekv", "attention to every frame"))
    assert len(ours) == len(theirs) == 6 and min(ours + theirs) > 0
    q, k, v = retrieving.drawn(retrieving.torch.Generator().manual_seed(0), 9)
    full = ef.Memory().build(**retrieving.LAYER, rope=None)
    with full.step(9):
        exact = full.attend(0, q, k, v)
    got = retrieving.attended(q[:, :, -4:], k, v)
    assert float((got - exact[:, :, -4:]).abs().max()) < 1e-5


def test_what_is_read_late_is_counted_layer_by_layer():
    rows, _ = rows_of(retrieving.late, 1200, 3)
    assert len(rows) == 4 and all(row.holds is None for row in rows.values())
    assert len(named(rows, "later half", "by product").ours.split(", ")) == 4
