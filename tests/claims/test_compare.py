"""The table of all memories: nobody is missing, nobody has more room than the others, and what it says was measured."""

import pytest

import evenflow as ef
from evenflow.claims import compare, compared, kinds
from evenflow.claims.result import Result

FEW = ("full", "longlive", "window")


def test_every_recipe_is_compared():
    assert sorted(compare.parameters()) == sorted(info.name for info in ef.recipes("memory"))
    assert sorted(compare.memories()) == sorted(info.name for info in ef.recipes("memory"))


def test_a_recipe_without_parameters_is_named(monkeypatch):
    monkeypatch.setattr(compare, "parameters", lambda stream, budget: {"full": {}})
    with pytest.raises(ValueError, match="window: say in claims"):
        compare.memories(["window"])
    with pytest.raises(ValueError, match="did you mean 'window'"):
        compare.memories(["windw"])


@pytest.mark.parametrize("name", sorted(set(compare.parameters()) - {"full"}))
def test_nobody_holds_more_than_the_budget(name):
    memory, stream = compare.memories([name])[name], compare.STREAM
    if memory.retrieves:
        pytest.skip("keeps everything off the device, and is asked")
    reading, budget = compare.built(memory, stream), compare.BUDGET * stream.frame
    cuts = compare.steps(name)
    for start, frames in cuts[: 3 * compare.BUDGET // cuts[1][1]]:
        reading.step(stream.step(start, frames))
    for layer in range(stream.layers):
        for head in range(stream.kv_heads):
            assert 0 < len(reading.state.held(layer, head=head)) <= budget


@pytest.fixture(scope="module")
def result():
    return compare.compare(FEW)


def test_what_is_measured(result):
    recall = {name: dict(zip(compare.ITEMS, result.figures[f"{name}|recall"], strict=True)) for name in FEW}
    assert all(share > 0.95 for share in recall["full"].values())
    assert recall["window"]["6"] > 0.95 and recall["longlive"]["first"] > 0.95
    for name, item in [("window", "first"), ("window", "48"), ("longlive", "24"), ("longlive", "watched")]:
        assert recall[name][item] < 0.3
    assert compared.value(result, "full", "error") == 0
    assert 0.3 < compared.value(result, "longlive", "error") < 1.5
    assert compared.value(result, "full", "larger") > 4 and compared.value(result, "window", "larger") == 1
    assert compared.value(result, "full", "nbytes") > 5 * compared.value(result, "window", "nbytes")
    assert [row.holds is None for row in result.rows] == [True, False, False]


def test_the_table_the_page_and_the_figure(result, tmp_path):
    page = compared.publish(result, tmp_path / "docs", "evenflow claims compare").read_text()
    assert (tmp_path / "docs" / "compare.png").read_bytes().startswith(b"\x89PNG")
    order = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert order[0] == "full" and set(order[:3]) == set(FEW)
    assert "window(window=384)" in page and "(compare.png)" in page
    assert compared.table(result).row_count == 3
    assert result.save(tmp_path) and Result.load(tmp_path / "compare.json") == result


def test_every_recipe_of_another_kind_is_compared_in_the_table_of_its_kind(capsys):
    said = []
    found = {section.kind: section for section in kinds.sections(say=said.append, quick=True)}
    assert {info.kind for info in ef.recipes()} == {*found, "memory"} and len(said) == len(found)
    for info in ef.recipes():
        if info.kind != "memory":
            assert any(row[0].startswith(info.name) for row in found[info.kind].rows), info.name
    for section in found.values():
        assert all(len(row) == len(section.head) for row in section.rows)
        assert compared.kind_table(section).row_count == len(section.rows)
        assert f"## {section.title}" in compared.kind_page(section)
    door = {row[0]: row[1:] for row in found["door"].rows}
    assert door["videollm-online"][:3] == ("100%", "0%", "100%")
    lane = {row[0].partition("=")[2].strip("')"): row[1:] for row in found["lanes"].rows}
    assert lane["gap"][1:3] == ("0 of 12", "0%") and lane["interleaved"][1] == "11 of 12"
    mixed = {row[0]: row[1:] for row in found["mixed"].rows}
    assert mixed["window alone"][:4] == ("1.00", "1.00", "·", "·") and mixed["everything (full)"][3] == "1.00"
    assert float(mixed["infinite-vl: Delta"][0]) > 0.8
    linked = {row[0]: row[1:] for row in found["linked"].rows}
    assert linked["omniforcing"][1] == "1.00" < linked["caches put together, masked"][1]
