"""Claims about memories that choose what stays say what they measured, also where it is not what was promised."""

from evenflow.claims import choosing, registry


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return {row.what: row for row in bench.rows}, bench.figures


def named(rows, *words):
    """The one row with these words in it."""
    (row,) = [row for what, row in rows.items() if all(word in what for word in words)]
    return row


def test_the_profile_finds_the_heads_that_look_by_time():
    rows, _ = rows_of(choosing.profile, 1)
    assert named(rows, "static heads").ours == "(1, 4, 6)" and named(rows, "static heads").holds


def test_what_moved_is_known_for_longer_than_in_a_window_and_no_further():
    rows, figures = rows_of(choosing.backwards, 8)
    assert named(rows, "frames back").ours == "4, 3, 2"
    shares = figures["recall of what moved over frames before the chunk|y|forcing-kv"]
    assert min(shares[:4]) > 0.9 and max(shares[4:]) < 0.8
    assert min(figures["recall of what moved over frames before the chunk|y|21 frames"]) > 0.9


def test_dynamic_heads_lose_less_than_a_window_and_static_ones_nothing():
    got = choosing.errors(choosing.Video(), ("forcing-kv", "window", "another model's heads"), 8)
    assert got["forcing-kv"][0] < 0.05 and got["forcing-kv"][1] < 0.9 * got["window"][1]
    assert got["another model's heads"][1] > got["window"][1]


def test_heads_attend_a_quarter_of_21_frames():
    rows, _ = rows_of(choosing.sizes, 12)
    assert named(rows, "tokens attended").ours == "0.268" and all(row.holds for row in rows.values())
    assert named(rows_of(choosing.race, 12, 2)[0], "attention time").ours.startswith("×")


def test_scores_and_spread_share_a_budget():
    rows, figures = rows_of(choosing.spread)
    assert all(row.holds for row in rows.values())
    masses = figures["score mass kept over share chosen by score|y"]
    assert masses == sorted(masses) and abs(masses[-1] - 1) < 1e-6


def test_events_are_remembered_by_time_and_forgotten_by_index():
    rows, figures = rows_of(choosing.remembered, 16)
    assert named(rows, "something is held", ": by time").ours == "20"
    assert int(named(rows, "something is held", ": window").ours) < 10
    assert named(rows, "all frames look", ": live-vlm").holds and named(rows, "mean recall").holds
    recalled = figures["recall of an event over clips since|y|by time"]
    assert sum(share > 0.9 for share in recalled) >= 15  # an event of few tokens may be hidden in its pages
    assert max(figures["recall of an event over clips since|y|window"][5:]) < 0.5


def test_mean_keys_of_rotated_neighbours_find_nothing():
    rows, _ = rows_of(choosing.pages, 20)
    assert named(rows, "right one", "un-rotated").ours == "1.00"
    assert float(named(rows, "right one", ", rotated").ours) < 0.3


def test_a_question_reads_less_and_finds_more():
    assert named(rows_of(choosing.less, 8, (0.4, 1.0))[0], "0.4 read").holds
    rows, _ = rows_of(choosing.answer, 200, 10, 4)
    assert named(rows, "tokens that an answer").holds
