"""The claim on doors and watching measures what it says, at sizes of seconds."""

from evenflow.claims import watching
from evenflow.claims.registry import Bench


def test_exact_rows_hold_and_costs_are_measured(monkeypatch):
    monkeypatch.setattr(watching, "HIDDEN", 48)
    model, bench = watching.network(layers=1), Bench(False, lambda text: None)
    watching.before_any(bench, model)
    watching.spoken(bench, model, 42, 20)
    exact = [row.holds for row in bench.rows]
    assert exact == [True] * 3 and "recompute" in bench.rows[0].note
    assert bench.rows[1].ours == "3; 0" and bench.rows[2].ours == "64"
    watching.speed(bench, model, 4)
    assert "81 % is dropped" in bench.rows[3].what and all(float(row.ours.strip("×% ")) > 0 for row in bench.rows[3:])
