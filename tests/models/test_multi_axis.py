"""Vision models' text towers on three axes: the model's own forward until something leaves, a plain loop afterwards."""

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import evenflow as ef
from evenflow.models import grid_places

from .. import oracles
from . import zoo

every_tower = pytest.mark.parametrize("name", zoo.TOWERS)
LENGTH = 36
BOUNDED = "streaming-llm(sink=4, window=9)"


@cache
def doubled(name: str) -> PreTrainedModel:
    return copy.deepcopy(zoo.shared(name)).double()


def scene(rows: int = 1, seed: int = 0) -> Tensor:
    """Coordinates int64 [rows, LENGTH, 3]: words, a picture, words, a film of two frames, words."""
    made = []
    for row in range(rows):
        words = 5 + (row + seed) % 3
        parts = [torch.arange(words)[:, None].expand(-1, 3)]
        for grid, interval, count in (((1, 4, 6), 1, 4), ((2, 4, 4), 3, LENGTH)):
            parts.append(grid_places(int(torch.cat(parts).max()) + 1, grid, interval=interval))
            parts.append((torch.arange(count) + int(torch.cat(parts).max()) + 1)[:, None].expand(-1, 3))
        made.append(torch.cat(parts)[:LENGTH])
    return torch.stack(made)


def fed(stream, ids: Tensor, places: Tensor | None, size: int) -> Tensor:
    parts = []
    for first in range(0, ids.shape[1], size):
        part = slice(first, first + size)
        parts.append(stream.feed(ids[:, part], tags=None if places is None else {"coordinates": places[:, part]}))
    return torch.cat(parts, 1)


def own(model: PreTrainedModel, ids: Tensor, places: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, position_ids=None if places is None else places.permute(2, 0, 1)).logits


@every_tower
@pytest.mark.parametrize("spec", ["full", "streaming-llm(sink=4, window=36)", "streaming-vlm"])
def test_words_alone_are_the_models_own_forward(name, spec):
    model, ids = doubled(name), zoo.tokens(LENGTH, 2)
    with oracles.doubles():
        want = own(model, ids)
        for size in (5, LENGTH):
            assert oracles.relative_error(fed(ef.open(model, spec, batch=2), ids, None, size), want) <= 1e-10


@every_tower
@pytest.mark.parametrize("spec", ["full", "streaming-llm(sink=4, window=36)", "live-vlm(frame=4, positions='stream')"])
def test_before_the_first_eviction_pictures_are_the_models_own_forward(name, spec):
    model, ids, places = doubled(name), zoo.tokens(LENGTH, 2), scene(2)
    with oracles.doubles():
        want = own(model, ids, places)
        assert oracles.relative_error(want, own(model, ids)) >= 1e-2
        for size in (5, LENGTH):
            assert oracles.relative_error(fed(ef.open(model, spec, batch=2), ids, places, size), want) <= 1e-10
    narrow = zoo.shared(name)
    got = fed(ef.open(narrow, spec, batch=2), ids, places, 7)
    assert oracles.relative_error(got, own(narrow, ids, places)) <= 2e-5


@every_tower
def test_sections_of_channels_are_those_of_the_config(name):
    """Sections follow each other in Qwen2-VL and Qwen2.5-VL; in Qwen3-VL they take turns."""
    axes = ef.open(zoo.shared(name), "full").state.geometry.rope[0].axes
    assert axes == ((1, 2, 3, 1, 2, 3, 1, 1) if name == "qwen3-vl" else (1, 1, 2, 2, 2, 3, 3, 3))


class Definition:
    """A cache of raw keys: all that is held is turned anew for each query, gaps closed by a loop over blocks."""

    is_compileable = False

    def __init__(self, places: Tensor, sink: int, window: int, frequencies: Tensor, axes: list[int]) -> None:
        self.places, self.sink, self.window = places, sink, window
        self.frequencies, self.axes = frequencies.double(), axes
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.held: dict[int, list[int]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        held = self.held.get(layer, [])
        held = [*held, held[-1] + 1 if held else 0]
        if layer in self.keys:
            key, value = torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2)
        numbers = self.closed(held)
        angle = (numbers - numbers[-1])[:, self.axes].double() * self.frequencies
        first, second = key.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        keep = range(len(held))
        if len(held) > self.sink + self.window:
            keep = [*range(self.sink), *range(len(held) - self.window, len(held))]
        self.keys[layer], self.values[layer] = key[:, :, list(keep)], value[:, :, list(keep)]
        self.held[layer] = [held[n] for n in keep]
        return turned, value

    def closed(self, held: list[int]) -> Tensor:
        """Numbers [n, 3] of what is held."""
        blocks = [[held[0]]]
        for before, now in pairwise(held):
            blocks.append([now]) if now != before + 1 else blocks[-1].append(now)
        numbers, free = [], 0
        for block in blocks:
            there = self.places[block]
            there = there - there.min() + free
            numbers.append(there)
            free = int(there.max()) + 1
        return torch.cat(numbers)

    def get_seq_length(self, layer: int = 0) -> int:
        return len(self.held.get(layer, []))

    def get_query_offset(self, layer: int = 0) -> int:
        return self.get_seq_length(layer)

    def get_mask_sizes(self, query_length: int, layer: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer) + query_length, 0


def defined(model: PreTrainedModel, ids: Tensor, places: Tensor, sink: int, window: int) -> Tensor:
    """Logits [1, T, V] of ids or features: token by token over `Definition`, the model's own rotation switched off by
    zero positions."""
    rotary = model.model.language_model.rotary_emb
    axes = [0, 1, 2, 0, 1, 2, 0, 0] if "Qwen3" in type(model).__name__ else [0, 0, 1, 1, 1, 2, 2, 2]
    kept = Definition(places, sink, window, rotary.inv_freq, axes)
    zero, read = torch.zeros(3, 1, 1, dtype=torch.long), "inputs_embeds" if ids.is_floating_point() else "input_ids"
    with torch.no_grad():
        steps = [
            model(**{read: token}, position_ids=zero, cache=kept, use_cache=True).logits for token in ids.split(1, 1)
        ]
    return torch.cat(steps, 1)


@every_tower
def test_after_eviction_it_is_the_definition_in_any_cut(name):
    model, ids, places = doubled(name), zoo.tokens(LENGTH), scene()
    with oracles.doubles():
        want = defined(model, ids, places[0], 4, 9)
        assert oracles.relative_error(want, own(model, ids, places)) >= 1e-2
        for size in (1, 13, LENGTH):
            assert oracles.relative_error(fed(ef.open(model, BOUNDED), ids, places, size), want) <= 1e-10


@given(
    sink=st.integers(0, 7), window=st.integers(1, 12), cuts=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    seed=st.integers(0, 2), wild=st.booleans(),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_any_sink_any_window_any_cut_any_coordinates(sink, window, cuts, seed, wild):
    model, ids, places = doubled("qwen2.5-vl"), zoo.tokens(24, 1, seed), scene(1, seed)[:, :24]
    if wild:
        places = torch.randint(0, 60, places.shape, generator=torch.Generator().manual_seed(seed))
    with oracles.doubles():
        want = defined(model, ids, places[0], sink, window)
        stream, parts, first = ef.open(model, f"streaming-llm(sink={sink}, window={window})"), [], 0
        for number in range(24):
            part = slice(first, first + cuts[number % len(cuts)])
            if first < 24:
                parts.append(stream.feed(ids[:, part], tags={"coordinates": places[:, part]}))
            first = part.stop
    assert oracles.relative_error(torch.cat(parts, 1), want) <= 1e-10


@every_tower
def test_words_behind_pictures_go_on_behind_the_largest_number(name):
    """And after undoing, resuming, forking: where words go on is part of what is held."""
    model, ids, places = doubled(name), zoo.tokens(LENGTH), scene()
    with oracles.doubles():
        want = own(model, ids, places)
        stream = ef.open(model, "full")
        stream.feed(ids[:, :-4], tags={"coordinates": places[:, :-4]})
        assert stream.next_place.tolist() == [int(places[0, -4, 0])] and stream.position == LENGTH - 4
        assert oracles.relative_error(stream.feed(ids[:, -4:]), want[:, -4:]) <= 1e-10
        stream.truncate(4)
        for again in (stream.fork(), stream):
            assert oracles.relative_error(again.feed(ids[:, -4:]), want[:, -4:]) <= 1e-10


@pytest.mark.parametrize("name", ["qwen3-vl"])
def test_saved_and_resumed_it_goes_on_bit_for_bit(name, tmp_path):
    model, ids, places = zoo.shared(name), zoo.tokens(LENGTH), scene()
    stream = ef.open(model, BOUNDED)
    stream.feed(ids[:, :30], tags={"coordinates": places[:, :30]})
    stream.save(tmp_path / "a")
    resumed = ef.resume(model, tmp_path / "a")
    assert torch.equal(resumed.next_place, stream.next_place)
    assert torch.equal(resumed.feed(ids[:, 30:]), stream.feed(ids[:, 30:]))


@every_tower
def test_pictures_come_as_what_the_vision_tower_made_of_them(name):
    """Features at the model's own positions, in words: equal to the whole model's forward over pixels."""
    model = doubled(name)
    grid, vision = torch.tensor([[1, 4, 4]]), model.config.vision_config
    pixels = torch.randn(
        16, 3 * vision.temporal_patch_size * 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    ids = torch.cat([zoo.tokens(3), torch.tensor([[62, 60, 60, 60, 60, 63]]), zoo.tokens(5)], 1)
    kinds = (ids == 60).int()
    with oracles.doubles(), torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds).logits
        positions, _ = model.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=kinds)
        picture = torch.cat(model.model.get_image_features(pixels, grid, return_dict=True).pooler_output)
        stream = ef.open(model, "full")
        got = [stream.feed(ids[:, :4])]
        tags = {"coordinates": grid_places(int(stream.next_place), (1, 4, 4)), "modality": torch.ones(4)}
        assert torch.equal(tags["coordinates"], positions[:, 0, 4:8].T)
        got += [stream.feed(embeds=picture, tags=tags), stream.feed(ids[:, 8:])]
    assert oracles.relative_error(torch.cat(got, 1), whole) <= 1e-10


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize(
    "spec",
    [
        "streaming-vlm(window=2, text_round=2, text_sink=4, text_window=6)",
        "live-vlm(cache_size=12, recent_frames=1, clip_frames=2, frame=4, prompt=2, page=2, observe=4)",
    ],
)
def test_memories_of_vision_models_stay_bounded_over_frames_and_answer(name, spec):
    model, ids = zoo.shared(name), zoo.tokens(7)
    stream, bytes_held = ef.open(model, spec), []
    for second in range(11):
        places = torch.cat([grid_places(int(stream.next_place), (1, 4, 4)), torch.zeros(3, 3, dtype=torch.int64)])
        places[4:] = places[:4].max() + 1 + torch.arange(3)[:, None]
        tags = {
            "coordinates": places, "modality": torch.tensor([1, 1, 1, 1, 2, 2, 0]), "segment": torch.full((7,), second + 1),
        }  # fmt: skip
        assert bool(stream.feed(ids, tags=tags).isfinite().all())
        bytes_held.append(stream.nbytes)
    assert max(bytes_held[6:]) == max(bytes_held)
    assert len(stream.state.held(0)) < 40 < 77 == stream.position
    before = stream.fork()
    assert stream.question(ids[0, :3]).feed(ids[:, :3]).shape == (1, 3, zoo.VOCABULARY)
    assert torch.equal(stream.feed(ids), before.feed(ids))


def test_streaming_vlm_reads_rows_and_columns_out_of_three_numbers():
    """(t, h, w) as the model numbers them, or (row, column) within the picture, are the same to it."""
    model, ids = doubled("qwen2.5-vl"), zoo.tokens(8)
    kinds, turn = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]), torch.ones(8, dtype=torch.int64)
    places = torch.cat(
        [torch.arange(2)[:, None].expand(-1, 3), grid_places(2, (1, 4, 4)), torch.tensor([[4] * 3, [5] * 3])]
    )
    within = torch.cat([torch.zeros(2, 2), grid_places(0, (1, 4, 4))[:, 1:], torch.zeros(2, 2)]).long()
    with oracles.doubles():
        one, other = (
            ef.open(model, "streaming-vlm").feed(ids, tags={"coordinates": c, "modality": kinds, "segment": turn})
            for c in (places, within)
        )
        assert oracles.relative_error(one, own(model, ids, places[None])) <= 1e-10
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="begins in its middle"):
        ef.open(model, "streaming-vlm").feed(
            ids[:, 3:], tags={"coordinates": places[3:], "modality": kinds[3:], "segment": turn[3:]}
        )


def test_rekv_reads_and_answers_on_one_axis_and_refuses_coordinates():
    model, ids = doubled("qwen2-vl"), zoo.tokens(40)
    with oracles.doubles():
        stream = ef.open(model, "rekv(n_init=2, n_local=64, retrieve_size=2, frame=4)")
        want = own(model, ids)
        assert oracles.relative_error(fed(stream, ids, None, 7), want) <= 1e-10
        assert stream.question(ids[0, :3]).feed(ids[:, :3]).shape == (1, 3, zoo.VOCABULARY)
    with pytest.raises(ValueError, match="numbers tokens on one axis"):
        stream.feed(ids[:, :3], tags={"coordinates": torch.zeros(3, 3, dtype=torch.int64)})
    assert stream.position == 40


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model, ids = zoo.shared("qwen2.5-vl"), zoo.tokens(4)
    stream = ef.open(model, BOUNDED)
    stream.feed(ids)
    wrong = [
        ({"tags": {"coordinates": torch.zeros(4, 2, dtype=torch.int64)}}, r"expected \(t, h, w\)"),
        ({"tags": {"coordinates": torch.full((4, 3), -1)}}, "whole numbers from 0"),
        ({"tags": {"coordinates": torch.zeros(4, 3)}}, "whole numbers from 0"),
        ({"tags": {"coordinates": torch.zeros(3, 3, dtype=torch.int64)}}, "one for each"),
        ({"tags": {"colour": torch.zeros(4)}}, "unknown tag"),
        ({"embeds": torch.zeros(4, 32)}, "either ids or embeds"),
    ]
    for options, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            stream.feed(ids, **options)
    for embeds, reason in (
        (torch.zeros(4, 31), "expected torch.float32"), (torch.zeros(4, 32).double(), "expected torch.float32"),
        (torch.full((2, 32), torch.nan), "NaN"), (torch.zeros(2, 4, 32), "have shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            stream.feed(embeds=embeds)
    with pytest.raises(ValueError, match="feed without coordinates"):
        ef.open(zoo.shared("llama"), BOUNDED).feed(ids, tags={"coordinates": torch.zeros(4, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="expected a token at least"):
        grid_places(0, (1, 1, 2))
    assert stream.position == 4


def test_a_feed_that_is_not_committed_leaves_no_trace():
    model, ids, places = zoo.shared("qwen3-vl"), zoo.tokens(LENGTH), scene()
    stream, other = ef.open(model, BOUNDED), ef.open(model, BOUNDED)
    for one in (stream, other):
        one.feed(ids[:, :20], tags={"coordinates": places[:, :20]})
    asked = stream.feed(ids[:, 20:26], tags={"coordinates": places[:, 20:26]}, commit=False)
    assert torch.equal(asked, other.feed(ids[:, 20:26], tags={"coordinates": places[:, 20:26]}))
    assert stream.position == 20 and stream.next_place.tolist() != other.next_place.tolist()


def test_a_vision_model_opens_from_a_folder(tmp_path):
    zoo.shared("qwen2.5-vl").save_pretrained(tmp_path)
    ids = zoo.tokens(9)
    assert torch.equal(ef.open(tmp_path, BOUNDED).feed(ids), ef.open(zoo.shared("qwen2.5-vl"), BOUNDED).feed(ids))
