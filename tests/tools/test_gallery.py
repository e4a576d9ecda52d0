"""The gallery shows what a real run holds, and no recipe is missing from it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import evenflow as ef

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("make_gallery", ROOT / "tools" / "make_gallery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_gallery"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_gallery"]


def text(gallery, rows):
    """A row of regions by frame, one letter each: the first token stands for its frame."""
    letters = "·SMWFB"
    return ["".join(letters[region] for region in row.regions[:: gallery.STREAM.frame]) for (row,) in rows]


def test_the_regions_of_a_frame_sink_and_window(gallery):
    assert text(gallery, gallery.run("longlive", 18)) == [
        "FFF···············",
        "SSSFFF············",
        "SSSWWWFFF·········",
        "SSSWWWWWWFFF······",
        "SSS···WWWWWWFFF···",
        "SSS······WWWWWWFFF",
    ]


def test_heads_that_differ_have_rows_of_their_own(gallery):
    rows = gallery.run("infinite-vggt", 18)
    assert [len(step) for step in rows] == [1, 1, 1, 2, 2, 2]
    one, other = rows[-1]
    assert one.regions != other.regions and gallery.MEMORY in one.regions and not one.folded


def test_folded_slots_stand_beside_the_stream(gallery):
    memory = ef.recipe("self-forcing", sink=1, window=3, frame=2)
    row = gallery.row([-1, 1, -1, -1, 4, 7, 8, 9], memory, now=10, m=2, length=10)
    nothing, sink, kept, window, fresh = range(5)
    assert row.folded == [sink, kept, kept]
    assert row.regions == [nothing, sink, nothing, nothing, kept, nothing, nothing, window, fresh, fresh]


def test_a_door_lets_in_what_is_new_and_speaks_where_much_is(gallery):
    kinds = gallery.gallery_kinds
    colours, spoken = kinds.admitted("timechat-online")
    inside = [[row[n] == kinds.WINDOW for row in colours] for n in range(kinds.FRAMES)]
    assert all(inside[0]) and not any(map(any, inside[1:12])) and all(inside[24])
    assert all(one == [False] * 2 + [True] * 2 + [False] * 4 for one in inside[25:36])
    assert {0, 24} <= {*spoken} and not {*spoken} & {*range(25, 48)}
    everything, nothing = kinds.admitted("videollm-online")
    assert {colour for row in everything for colour in row} == {kinds.WINDOW} and not nothing


def test_words_see_what_was_seen_up_to_their_unit(gallery):
    kinds = gallery.gallery_kinds
    rows, seen, said = kinds.looks(ef.recipe("speak-while-watching", scheme="gap"))
    letters = {kinds.WINDOW: "S", kinds.MEMORY: "w", kinds.FRESH: "F", kinds.NOTHING: "·"}
    assert ["".join(letters[one] for one in row) for row in rows[:4]] == [
        "SSSS············F···········",
        "SSSS············wF··········",
        "SSSS············wwF·········",
        "SSSSSSSS········wwwF········",
    ]
    assert seen == [*range(16)] and said == [*range(10_001, 10_013)]
    assert kinds.looks(ef.recipe("speak-while-watching", scheme="interleaved"))[1][4:8] == [7, 8, 9, 10]


def test_layers_and_blocks_hold_what_they_say(gallery):
    kinds = gallery.gallery_kinds
    rows, names = kinds.layers("spatial-ttt", steps=6)
    assert names == ["window + FastWeights", "everything"]
    near, far = rows[-2:]
    assert near[0] == kinds.MEMORY and far[0] == kinds.NOTHING and near[1:].count(kinds.NOTHING) == 24 - 16
    assert far[1:].count(kinds.WINDOW) == 20 and far[1:].count(kinds.FRESH) == 4
    held = [n for n, colour in enumerate(kinds.blocks("omniforcing", 9)[-1]) if colour != kinds.NOTHING]
    assert held == [0, 4, 5, 6, 7, 8]


def test_the_page_and_its_pictures(gallery, tmp_path):
    for folder in ("one", "two"):
        gallery.main([str(tmp_path / folder), "forcing-kv", "tays"])
    page, picture = tmp_path / "one" / "gallery.md", tmp_path / "one" / "gallery" / "forcing-kv.png"
    assert "(gallery/forcing-kv.png)" in page.read_text() and "[ sink 1 frame |" in page.read_text()
    assert "A row a word" in page.read_text() and (tmp_path / "one" / "gallery" / "tays.png").is_file()
    assert picture.read_bytes() == (tmp_path / "two" / "gallery" / "forcing-kv.png").read_bytes()


def test_every_recipe_is_in_the_gallery():
    names = [info.name for info in ef.recipes()]
    page = (ROOT / "docs" / "gallery.md").read_text()
    shown = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert shown == names, "docs/gallery.md is out of date; run `make docs`"
    assert sorted(path.stem for path in (ROOT / "docs" / "gallery").iterdir()) == names


def test_what_a_step_and_a_question_bring_back(gallery):
    rows = gallery.run("v-rex", 27)
    assert all(gallery.BROUGHT not in one.regions for step in rows[:5] for one in step)
    assert any(gallery.BROUGHT in one.regions for one in rows[8])
    for one in rows[-1]:
        found = [at // gallery.STREAM.frame for at, region in enumerate(one.regions) if region == gallery.BROUGHT]
        assert found and {*found} == {12} and gallery.WINDOW not in one.regions
