"""Claims are measured, kept and shown as they are, also when they do not hold."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evenflow as ef
from evenflow import claims
from evenflow.claims import registry
from evenflow.claims.result import Result, Row
from evenflow.claims.texts import book_text, recomputed_nats, tokens_of
from evenflow.learn import backcopy, toys


def test_every_recipe_points_to_claims_that_exist():
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


def rows_of(measure, *sizes):
    bench = registry.Bench(False, lambda text: None)
    measure(bench, *sizes)
    return bench


def test_a_long_reading_is_measured_at_its_ends():
    bench = rows_of(claims.endless.read, 12_000, 4096, 20)
    rows = {row.what: row for row in bench.rows}
    assert rows["stream"].ours == "12,000 tokens"
    exact = [row for what, row in rows.items() if "bytes held" in what or "1,000,000,000" in what]
    assert len(exact) == 2 and all(row.holds for row in exact)
    against = [row for what, row in rows.items() if "re-computation" in what]
    assert len(against) == 2 and all(0.8 < float(row.ours[1:].split()[0]) < 1.2 for row in against)
    assert bench.figures["perplexity over stream position|x"] == [4096.0, 8192.0, 12_000.0]


def test_memories_are_compared_on_one_text():
    bench = rows_of(claims.quality.compare, 2600, 20)
    whats = [row.what for row in bench.rows]
    assert sum("sinks +" in what for what in whats) == 5 and sum("cache of" in what for what in whats) == 4
    assert set(bench.figures) >= {f"perplexity over tokens read|y|{name}" for name in ("full", "window")}


def test_speed_is_a_race_of_one_model_with_itself():
    bench = rows_of(claims.speed.race, 1, 64, {32: 0.0, 128: 1e9})
    ratios = bench.figures["speed-up over cache|y"]
    assert len(ratios) == 2 and min(ratios) > 0
    assert [row.holds for row in bench.rows[1:3]] == [None, False]


def test_a_sample_of_places_is_what_recomputation_says_there():
    stream = ef.open("tiny", "full")
    ids = torch.randint(0, 4096, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    places = [20, 33, 59]
    for sink in (0, 1):
        expected = ef.open(stream.model, f"recompute(window=16, sink={sink})").surprisal(ids)[0, places]
        sampled = recomputed_nats(stream, ids, places, 16, sink)
        assert torch.allclose(sampled.float(), expected, atol=1e-4)


def test_without_books_the_text_is_the_one_that_python_has(monkeypatch):
    monkeypatch.delenv("EVENFLOW_DATA", raising=False)
    text, kind = book_text()
    assert "Python" in kind and len(text) > 100_000
    stream = ef.open("tiny", "full")
    ids = tokens_of(stream, "one line\nand another\n", 100)
    assert len(ids) == 100 and ids[0] == stream.tokenizer.bos_token_id
    again = ids[1:].index(ids[1], 1)
    assert ids[1 : 1 + again] == ids[1 + again : 1 + 2 * again] and "another" in stream.tokenizer.decode(
        ids[1 : 1 + again]
    )


def test_a_random_model_has_no_sink():
    task = backcopy.BackCopy()
    bench = rows_of(claims.trained.sinks, small(task.vocabulary), task, 80)
    assert bench.rows[0].holds is False and any("window alone over one sink" in row.what for row in bench.rows)


def test_untrained_models_show_no_effect_and_say_so():
    task = toys.Repeat(sink=True)
    model = small(task.vocabulary)
    bench = rows_of(claims.repeats.after_eviction, {True: (model, task), False: (model, toys.Repeat(sink=False))}, 2)
    verdicts = {row.what: row.holds for row in bench.rows}
    assert verdicts["8. dropping a dedicated sink"] is False
    bench = rows_of(claims.repeats.forgetting, model, task, 4)
    assert [row.holds for row in bench.rows if "window 36" in row.what] == [False]


def small(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()
