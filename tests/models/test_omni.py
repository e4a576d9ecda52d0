"""Thinkers of omni models, streamed: words, sound and film in turns are the model's own forward, then a plain loop."""

import copy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import evenflow as ef
from evenflow.memory.time_aligned import Film, InTurns, Marks, Picture, Piece, TimeAligned, TurnsState, Words
from evenflow.models import Stream, Unsupported
from evenflow.models.axes import Closed

from .. import oracles
from . import zoo
from .test_multi_axis import BOUNDED, defined

OMNI = ["qwen2.5-omni", "qwen3-omni"]
every_thinker = pytest.mark.parametrize("name", OMNI)
PER_SECOND, MELS = 5, 8  # places a second, so that turns are short
SOUND, IMAGE, VIDEO = 59, 60, 61
SPECIAL = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": SOUND, "vision_start_token_id": 62,
    "vision_end_token_id": 63, "audio_start_token_id": 57, "audio_end_token_id": 58,
    "position_id_per_seconds": PER_SECOND,
}  # fmt: skip
HEARS = {
    "num_mel_bins": MELS, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
    "output_dim": 32,
}  # fmt: skip


def config(name: str):
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    text = zoo.SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope}
    sees = {"depth": 1, "num_heads": 2, "patch_size": 4} | zoo.SEES
    if name == "qwen2.5-omni":
        sees |= {"window_size": 16, "fullatt_block_indexes": [0]}
        return transformers.Qwen2_5OmniThinkerConfig(
            text_config=text, vision_config=sees, audio_config=HEARS | {"n_window": 100}, **SPECIAL
        )
    rope["mrope_section"] = [4, 2, 2]
    text |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    sees |= {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
    hears = HEARS | {"downsample_hidden_size": 4, "n_window": 50}
    return transformers.Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=sees, audio_config=hears, **SPECIAL)


@cache
def thinker(name: str = "qwen2.5-omni") -> PreTrainedModel:
    """A small random thinker; do not change it."""
    torch.manual_seed(0)
    kind = "Qwen2_5Omni" if name == "qwen2.5-omni" else "Qwen3OmniMoe"
    model = getattr(transformers, f"{kind}ThinkerForConditionalGeneration")(config(name)).eval()
    if name == "qwen3-omni":
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@cache
def doubled(name: str = "qwen2.5-omni") -> PreTrainedModel:
    return copy.deepcopy(thinker(name)).double()


# -- scenes ------------------------------------------------------------------------------------------------------------


def clock_of(name: str) -> TimeAligned:
    """Turns of two seconds; Qwen3-Omni's are one place long: what is seen and heard comes as the time is."""
    return TimeAligned(PER_SECOND) if name == "qwen2.5-omni" else TimeAligned(PER_SECOND, 1 / PER_SECOND, exact=True)


def marks(name: str) -> Piece:
    return Marks(2) if name == "qwen2.5-omni" else Words(2)


def frames_of(name: str, count: int) -> int:
    """Mel frames of so many tokens of sound."""
    return 4 * count if name == "qwen2.5-omni" else 100 * (count // 13) + 8 * (count % 13)


@dataclass(frozen=True, eq=False)
class Scene:
    """pieces as they arrive, with ids and rows of each; ids [1, T], rows [1, T, hidden] and places [T, 3], the model's own,
    in the order in which the model reads them."""

    pieces: list[tuple[Piece, Tensor, Tensor]]
    ids: Tensor
    rows: Tensor
    places: Tensor
    delta: int


def scene(name: str, kinds: str = "wfpsfw", seed: int = 0, model: PreTrainedModel | None = None) -> Scene:
    """w: words; p: a picture; s: sound alone; f: a film of some seconds, told second by second; b: a broad one of one."""
    model, made = model or doubled(name), torch.Generator().manual_seed(seed)
    told: list[tuple[Piece, list[int]]] = []
    images, videos, sounds, seconds = [], [], [], []

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=made))

    def words(count: int) -> None:
        told.append((Words(count), torch.randint(3, 57, (count,), generator=made).tolist()))

    words(2)
    for kind in kinds:
        height, width, count = (1, 3 * PER_SECOND, 1) if kind == "b" else (some(1, 3), some(1, 3), some(3, 6))
        if kind == "w":
            words(count)
        elif kind == "p":
            images.append([1, 2 * height, 2 * width])
            told += [(Words(1), [62]), (Picture(height, width), [IMAGE] * (height * width)), (Words(1), [63])]
        elif kind == "s":
            sounds.append(frames_of(name, count))
            told += [(Words(1), [57]), (Words(count), [SOUND] * count), (Words(1), [58])]
        else:
            videos.append([count, 2 * height, 2 * width])
            sounds.append(frames_of(name, PER_SECOND * count))
            seconds.append(1.0)
            second = [VIDEO] * (height * width) + [SOUND] * PER_SECOND
            told += [
                (marks(name), [62, 57]),
                *[(Film(1, height, width, 1.0, heard=PER_SECOND), second)] * count,
                (marks(name), [58, 63]),
            ]
    words(1)
    pieces = []
    for piece, ids in told:
        numbers = torch.tensor(ids)
        rows = model.get_input_embeddings()(numbers).detach()
        features = torch.randn(rows.shape, generator=made).to(rows) / 4
        heard_or_seen = ((numbers >= SOUND) & (numbers <= VIDEO))[:, None]
        pieces.append((piece, numbers, torch.where(heard_or_seen, features, rows)))
    clock = clock_of(name)
    _, order = clock.whole([piece for piece, _, _ in pieces])
    ids = torch.cat([numbers for _, numbers, _ in pieces])[order][None]
    rows = torch.cat([rows for _, _, rows in pieces])[order][None]

    def grid(values: list) -> Tensor | None:
        return torch.tensor(values) if values else None

    together = bool({"f", "b"} & set(kinds))
    places, delta = model.get_rope_index(
        ids, grid(images), grid(videos), torch.ones_like(ids), together, grid(sounds), grid(seconds)
    )
    assert torch.equal(places, places.long().to(places.dtype))
    return Scene(pieces, ids, rows, places[:, 0].T.long(), int(delta))


def own(model: PreTrainedModel, rows: Tensor, places: Tensor) -> Tensor:
    """Logits [1, T, V] of the model's own forward."""
    with torch.no_grad():
        return model(inputs_embeds=rows, position_ids=places.T[:, None]).logits


def fed(stream: Stream, rows: Tensor, places: Tensor, size: int) -> Tensor:
    parts = []
    for first in range(0, rows.shape[1], size):
        part = slice(first, first + size)
        parts.append(stream.feed(embeds=rows[:, part], tags={"coordinates": places[part]}))
    return torch.cat(parts, 1)


def played(stream: Stream, turns: InTurns, shown: Scene, first: int = 0, state=None):
    """Logits, and the clock's state, of a scene fed as it arrives: words as ids, all else as features."""
    state, parts = turns.reset() if state is None else state, []
    for piece, _, arrived in shown.pieces[first:]:
        (rows, places), state = turns.step([piece], arrived, state)
        if len(rows):
            parts.append(stream.feed(embeds=rows, tags={"coordinates": places}))
    return torch.cat(parts, 1), state


# -- what must hold ----------------------------------------------------------------------------------------------------


@every_thinker
@pytest.mark.parametrize("seed", range(2))
def test_before_the_first_eviction_it_is_the_models_own_forward_at_its_own_places(name, seed):
    """Fed as it arrives, second by second, or in any pieces."""
    model, shown = doubled(name), scene(name, seed=seed)
    with oracles.doubles():
        want = own(model, shown.rows, shown.places)
        plain = torch.arange(shown.ids.shape[1])[:, None].expand(-1, 3)
        assert oracles.relative_error(want, own(model, shown.rows, plain)) >= 1e-2
        for spec in ("full", "streaming-llm(sink=4, window=200)"):
            got, state = played(ef.open(model, spec), InTurns(clock_of(name)), shown)
            assert oracles.relative_error(got, want) <= 1e-10
            assert not len(state.rows) and state.clock.delta == shown.delta
        for size in (1, 7):
            assert oracles.relative_error(fed(ef.open(model, "full"), shown.rows, shown.places, size), want) <= 1e-10


@every_thinker
def test_after_eviction_it_is_the_definition_in_any_cut(name):
    model, shown = doubled(name), scene(name)
    with oracles.doubles():
        want = defined(model, shown.rows, shown.places, 4, 9)
        assert oracles.relative_error(want, own(model, shown.rows, shown.places)) >= 1e-2
        got, _ = played(ef.open(model, BOUNDED), InTurns(clock_of(name)), shown)
        assert oracles.relative_error(got, want) <= 1e-10
        for size in (1, 13):
            assert oracles.relative_error(fed(ef.open(model, BOUNDED), shown.rows, shown.places, size), want) <= 1e-10


@given(
    kinds=st.text("wfps", min_size=1, max_size=4).filter(lambda kinds: set(kinds) & set("fp")),
    sink=st.integers(0, 5), window=st.integers(1, 14), cut=st.integers(1, 15), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_any_scene_any_window_any_cut(kinds, sink, window, cut, seed):
    model, shown = doubled(), scene("qwen2.5-omni", kinds, seed)
    rows, places = shown.rows[:, :40], shown.places[:40]
    with oracles.doubles():
        want = defined(model, rows, places, sink, window)
        got = fed(ef.open(model, f"streaming-llm(sink={sink}, window={window})"), rows, places, cut)
        assert oracles.relative_error(got, want) <= 1e-10


def test_saved_resumed_and_forked_within_a_film_it_goes_on_bit_for_bit(tmp_path):
    model, turns = thinker(), InTurns(clock_of("qwen2.5-omni"))
    shown = scene("qwen2.5-omni", "wfw", seed=3, model=model)
    middle = next(n for n, (piece, _, _) in enumerate(shown.pieces) if isinstance(piece, Film)) + 3
    before = replace(shown, pieces=shown.pieces[:middle])
    stream = ef.open(model, BOUNDED)
    _, state = played(stream, turns, before)
    assert len(state.rows)  # sound waits
    stream.save(tmp_path / "a")
    torch.save(state.state_dict(), tmp_path / "clock.pt")
    forked, resumed = stream.fork(), ef.resume(model, tmp_path / "a")
    loaded = TurnsState.load(torch.load(tmp_path / "clock.pt"))
    want, end = played(stream, turns, shown, middle, state)
    for again, at in ((forked, state), (resumed, loaded)):
        got, there = played(again, turns, shown, middle, at)
        assert torch.equal(got, want) and torch.equal(again.next_place, stream.next_place)
        assert (there.clock.delta, there.position) == (end.clock.delta, end.position)


@every_thinker
def test_words_after_a_film_go_on_at_the_right_place_and_so_does_the_next_film(name):
    """Words as ids, without coordinates; the clock of the next film begins where the stream has come to."""
    model, turns = doubled(name), InTurns(clock_of(name))
    shown = scene(name, "wfwfw", seed=1)
    with oracles.doubles():
        want = own(model, shown.rows, shown.places)
        stream, state, parts = ef.open(model, "full"), turns.reset(), []
        for piece, ids, arrived in shown.pieces:
            if isinstance(piece, Words) and ids[0] != 62 and ids[0] != 58:
                assert not len(state.rows)
                parts.append(stream.feed(ids))
                state = turns.reset(int(stream.next_place), stream.position)
                continue
            (rows, places), state = turns.step([piece], arrived, state)
            if len(rows):
                parts.append(stream.feed(embeds=rows, tags={"coordinates": places}))
        assert int(stream.next_place) == stream.position + shown.delta == int(shown.places.max()) + 1
        assert oracles.relative_error(torch.cat(parts, 1), want) <= 1e-10


def test_words_behind_a_film_broader_than_it_is_long_stand_where_the_prompt_has_them_or_where_writing_goes_on():
    """The model's prompt goes on behind a film's last turn, its `generate` behind the largest number: what `next_place` is."""
    model, shown = doubled(), scene("qwen2.5-omni", "wbw")
    with oracles.doubles():
        stream = ef.open(model, "full")
        got, state = played(stream, InTurns(clock_of("qwen2.5-omni")), shown)
        assert oracles.relative_error(got, own(model, shown.rows, shown.places)) <= 1e-10
    assert int(stream.next_place) == stream.position + shown.delta > state.clock.following


def test_pixels_and_sound_as_they_come_are_the_whole_models_forward():
    """Its towers read two seconds of sound, and one grid of the film, at a time; it reads all of both at once."""
    model = doubled()
    made = torch.Generator().manual_seed(0)
    grids, frames = 10, 200  # a chunk of mel frames is 50 tokens of sound
    vision = model.config.vision_config
    pixels = torch.randn(grids * 16, 3 * vision.temporal_patch_size * 16, dtype=torch.float64, generator=made)
    mel = torch.randn(1, MELS, frames + 40, dtype=torch.float64, generator=made)
    heard = torch.ones(1, frames + 40, dtype=torch.long)
    with oracles.doubles(), torch.no_grad():
        seen = torch.cat([
            model.get_video_features(some, torch.tensor([[1, 4, 4]])).pooler_output[0] for some in pixels.split(16)
        ])  # fmt: skip
        sound = torch.cat([
            model.get_audio_features(some, torch.ones(1, some.shape[2], dtype=torch.long)).last_hidden_state
            for some in mel.split(frames, 2)
        ])  # fmt: skip
        embed, turns = model.get_input_embeddings(), InTurns(clock_of("qwen2.5-omni"))
        words, ends = zoo.tokens(3)[0].clamp_max(50), torch.tensor([[62, 57], [58, 63]])
        stream, state, parts = ef.open(model, "full"), turns.reset(), []
        steps = [(Words(3), embed(words), words), (Marks(), embed(ends[0]), ends[0])]
        for n in range(grids):
            features = seen[4 * n : 4 * n + 4], sound[6 * n : 6 * n + 6]
            numbers = torch.tensor([VIDEO] * 4 + [SOUND] * 6)
            steps.append((Film(1, 2, 2, 1.0, heard=6), torch.cat(features), numbers))
        steps += [(Marks(), embed(ends[1]), ends[1]), (Words(3), embed(words), words)]
        for piece, rows, _ in steps:
            (rows, places), state = turns.step([piece], rows, state)
            if len(rows):
                parts.append(stream.feed(embeds=rows, tags={"coordinates": places}))
        _, order = turns.clock.whole([piece for piece, _, _ in steps])
        ids = torch.cat([numbers for _, _, numbers in steps])[order][None]
        whole = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=pixels, video_grid_thw=torch.tensor([[grids, 4, 4]]),
            video_second_per_grid=torch.tensor([1.0]), input_features=mel, feature_attention_mask=heard,
            use_audio_in_video=True,
        ).logits  # fmt: skip
    assert oracles.relative_error(torch.cat(parts, 1), whole) <= 1e-10


def test_a_film_without_end_is_held_in_even_bytes_and_small_numbers_where_it_begins_anew(monkeypatch):
    """Rows and columns count from a film's start, so numbers within the window grow with a film, until it begins anew."""
    model, turns = thinker(), InTurns(clock_of("qwen2.5-omni"))
    rows, closed = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), Closed._closed
    largest = {}
    for every in (1000, 10):
        stream, state, held, numbers = ef.open(model, "streaming-llm(sink=4, window=60)"), turns.reset(), [], []

        def noted(view, told, numbers=numbers):
            out = closed(view, told)
            numbers.append(int(out.max()))
            return out

        monkeypatch.setattr(Closed, "_closed", staticmethod(noted))
        for second in range(60):
            marks = [] if second % every else [Marks()]
            arrived = torch.cat([rows[: 2 * len(marks)], rows])
            (out, places), state = turns.step([*marks, Film(1, 2, 2, 1.0, heard=5)], arrived, state)
            if len(out):
                assert bool(stream.feed(embeds=out, tags={"coordinates": places}).isfinite().all())
            held.append(stream.nbytes + state.nbytes)
        assert stream.position > 500 and max(held[20:]) == max(held[20:30])
        largest[every] = max(numbers)
    assert largest[10] < 4 + 60 + 10 * PER_SECOND + 2 < 60 * PER_SECOND - 20 < largest[1000]


def test_the_folder_of_an_omni_model_gives_its_thinker_and_a_whole_one_says_where_it_is(tmp_path):
    whole = transformers.Qwen2_5OmniConfig(thinker_config=config("qwen2.5-omni").to_dict())
    whole.enable_audio_output = False  # words only
    model = transformers.Qwen2_5OmniForConditionalGeneration(whole).eval()
    with pytest.raises(Unsupported, match=r"open the part that has: model.thinker"):
        ef.open(model)
    model.save_pretrained(tmp_path)
    ids = zoo.tokens(9)
    got = ef.open(tmp_path, "full").feed(ids)
    assert torch.equal(got, ef.open(model.thinker, "full").feed(ids))
