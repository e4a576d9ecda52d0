"""Claims are measured, kept and shown as they are, also when they do not hold."""

import json

import pytest

from evenflow import claims
from evenflow.claims import registry
from evenflow.claims.result import Result, Row


def test_every_recipe_points_to_claims_that_exist():
    import evenflow as ef

    for info in ef.recipes():
        assert set(info.claims) <= set(claims.names())
    for name in claims.names():
        assert claims.describe(name).endswith(".")


def test_the_definition_holds_here(tmp_path):
    said = []
    result = claims.run("streaming-llm", progress=said.append, folder=tmp_path)
    timed = [row for row in result.rows if "time of tokens" in row.what]
    exact = [row for row in result.rows if row not in timed and row.holds is not None]
    assert len(exact) >= 15 and all(row.holds for row in exact), exact
    assert len(timed) == 1 and float(timed[0].ours) < 1.5
    assert len(said) >= len(result.rows)
    assert Result.load(tmp_path / "streaming-llm.json") == result


@pytest.fixture
def failing(monkeypatch):
    def measure(bench):
        """One and one are three."""
        bench.row("1 + 1", "3", "2", False, "it is two")
        bench.row("figure", "–", "7")
        bench.figures |= {"height over time|x": [0.0, 1.0], "height over time|y": [1.0, 2.0]}

    monkeypatch.setitem(registry._claims, "sums", measure)
    return "sums"


def test_a_claim_that_does_not_hold_is_shown_as_such(failing, tmp_path):
    result = claims.run(failing, folder=tmp_path)
    assert not result.holds and result.title == "One and one are three."
    page = claims.report(tmp_path)
    text = page.read_text()
    assert "| 1 + 1 | 3 | 2 | NO | it is two |" in text and "report.png" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "sums.json").read_text())["rows"][0]["holds"] is False


def test_a_claim_without_promises_holds():
    assert Result("a", "b", (Row("c", "d", "e"),), 1.0, "here").holds


def test_wrong_names_and_empty_reports(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'streaming-llm-speed'"):
        claims.run("streaming-llm-sped", folder=tmp_path)
    with pytest.raises(ValueError, match="nothing was measured yet"):
        claims.report(tmp_path / "none")
