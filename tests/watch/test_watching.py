"""Frames through a door into a model: what is read is what got in, where it stood, and silence costs nothing."""

import copy
import itertools
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

import evenflow as ef
from evenflow.memory.admission import ClipEnd, Curvature, Door, OneToken, TokenDrop
from evenflow.models import unfit
from evenflow.watch import Watching

from .. import oracles
from ..models import zoo
from ..recipes.cases import CASES

TOKENS, HIDDEN = 4, 32
# Those that re-compute read ids again, and cannot read features; the shipped kinds of softmax want a model of their own.
READERS = [
    info.name for info in ef.recipes("memory")
    if unfit(ef.recipe(info.name)) is None and info.name not in ("recompute", "learned-sink", "zero-sink")
]  # fmt: skip
DOOR = Door(lets=TokenDrop(0.9, reference="last_kept"), speaks=OneToken(silent=5, threshold=0.02))


@cache
def tower() -> PreTrainedModel:
    return copy.deepcopy(zoo.shared("qwen2.5-vl")).double()


def film(count=12, tokens=TOKENS, seed=0, dtype=torch.float32):
    """A scene of which some tokens change, then another one."""
    made = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, tokens, HIDDEN, generator=made)
    frames = scenes[(torch.arange(count) > 7).long()].clone()
    change = torch.rand(count, tokens, generator=made) < 0.3
    frames[change] = torch.randn(int(change.sum()), HIDDEN, generator=made)
    frames[3] = frames[2]
    return frames.to(dtype)


def opened(memory="streaming-llm(sink=4, window=60)"):
    stream = ef.open(zoo.shared("llama"), memory, batch=1)
    stream.feed([3, 4, 5])
    return stream


def usual(frames):
    """The token that the model writes most often after a frame."""
    stream = opened("full")
    said = [int(stream.feed(embeds=frame)[0, -1].argmax()) for frame in frames]
    return max(said, key=said.count)


@pytest.mark.parametrize("name", READERS)
def test_through_any_recipe_what_is_read_is_what_got_in(name):
    memory, frames = ef.recipe(name, **CASES[name].params), film()
    watching, plain, way = Watching(opened(memory), DOOR), opened(memory), DOOR.build()
    needs = watching._needs
    for n, seen in enumerate(watching.see(frames, times=[0.5 * n for n in range(len(frames))])):
        verdict = way.enter(frames[n : n + 1])
        chosen = frames[n][verdict.keep[0]]
        logits = torch.zeros(0, zoo.VOCABULARY)
        if len(chosen):
            known = {"modality": 1, "time": 0.5 * n, "frame": n}
            tags = {tag: torch.full((len(chosen),), known[tag]) for tag in needs}
            logits = plain.feed(embeds=chosen, tags=tags or None)[0, -1:]
        speak = bool(way.emit(logits=logits))
        assert (seen.number, seen.kept, seen.speak, seen.time) == (n, len(chosen), speak, 0.5 * n)
        assert seen.novelty == len(chosen) / TOKENS
    assert torch.equal(watching.stream.last_logits, plain.last_logits)
    assert watching.position == 12 and watching.stream.position == plain.position < 3 + 12 * TOKENS
    assert watching.nbytes > plain.nbytes


def test_survivors_and_words_stand_where_they_would_among_all():
    """The model's own forward over what got in, with the numbers that all tokens would have had."""
    model, grid = tower(), (2, 3)
    frames = film(9, 6, dtype=torch.float64)
    frames[6:] = frames[5]  # the last three are dropped whole
    words, after = [3, 4, 5, 6], [7, 8]
    watching = Watching(ef.open(model, "full"), Door(lets=DOOR.lets))
    with oracles.doubles():
        watching.tell(words)
        kept = [seen.kept for seen in watching.see(frames, grid=grid, tick=2)]
        got = watching.tell(after)
        assert 0 < sum(kept) < 54 and kept[6:] == [0, 0, 0] and kept[0] == 6
        rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
        places = [torch.stack([torch.full((6,), 2 * n), rows.flatten(), columns.flatten()], 1) + 4 for n in range(9)]
        way, keeps = DOOR.lets.step(frames, DOOR.lets.start())[0], []
        keeps = way.keep.flatten()
        end = 4 + 2 * 8 + 1
        everywhere = torch.cat(
            [
                torch.arange(4)[:, None].expand(-1, 3),
                torch.cat(places)[keeps],
                torch.arange(end, end + 2)[:, None].expand(-1, 3),
            ]
        )
        table = model.get_input_embeddings()
        embeds = torch.cat([table(torch.tensor(words)), frames.flatten(0, 1)[keeps], table(torch.tensor(after))])
        with torch.no_grad():
            want = model(inputs_embeds=embeds[None], position_ids=everywhere.T[:, None]).logits[0, -2:]
        assert oracles.relative_error(got, want) <= 1e-10


def test_the_event_loop_of_one_decision_a_frame():
    """Restated: a forward of the silent token and the frame's tokens, and a threshold that makes silence harder."""
    frames, theta = film(), 0.1
    silent = usual(frames)
    watching = Watching(opened("full"), f"videollm-online(silent={silent}, threshold={theta})", between=[silent])
    plain, quiet, spoken = opened("full"), False, []
    for seen in watching.see(frames):
        if quiet:
            plain.feed([silent])
        logits = plain.feed(embeds=frames[seen.number])[0, -1]
        share = logits.softmax(-1)
        if share[silent] < theta:
            share[silent] = 0
        quiet = int(share.argmax()) == silent
        assert seen.speak == (not quiet) and seen.kept == TOKENS
        if seen.speak:
            answer = [*watching.reply(prefix=[9, 10], max_tokens=3)]
            plain.feed([9, 10])
            assert answer == [*plain.generate(max_tokens=3)]
            spoken.append(seen.number)
    assert torch.equal(watching.stream.last_logits, plain.last_logits) and 0 < len(spoken) < len(frames)


def test_low_resolution_is_read_where_the_door_says_so():
    frames, made = film(20), torch.Generator().manual_seed(1)
    features = torch.randn(20, 6, generator=made).cumsum(0)
    low = frames[:, :1] / 2
    watching = Watching(opened("full"), Door(lets=Curvature()))
    sizes = {0: 0, 1: 1, 2: TOKENS}
    expected = [sizes[r] for r in Curvature().step(features, Curvature().start())[0].resolution.tolist()]
    assert [seen.kept for seen in watching.see(features, frames, low=low)] == expected and {*expected} == {0, 1, TOKENS}
    on_axes = Watching(ef.open(tower(), "full"), Door(lets=Curvature()))
    assert [s.kept for s in on_axes.see(features, frames.double(), low=low.double(), grid=(2, 2))] == expected


def test_what_is_taken_back_never_came_and_a_copy_or_a_saved_one_goes_on(tmp_path):
    frames, path = film(), tmp_path / "watched"
    watching = Watching(opened("streaming-llm(sink=4, window=200)"), DOOR, between=[5], undo=4)
    [*watching.see(frames[:5])]
    twin = watching.fork()
    for _ in itertools.islice(watching.see(frames[5:8]), 2):
        watching.tell([7, 8])
    watching.truncate(2)
    assert watching.position == 5 and watching.stream.position == twin.stream.position
    watching.save(path)
    resumed = Watching.resumed(ef.resume(zoo.shared("llama"), path), DOOR)
    outs = [[*one.see(frames[5:])] for one in (watching, twin, resumed)]
    assert outs[0] == outs[1] == outs[2] and not watching.stream.notes and not resumed.stream.notes
    assert torch.equal(watching.stream.last_logits, resumed.stream.last_logits)
    with pytest.raises(ValueError, match="the last 4 of 12"):
        watching.truncate(5)
    with pytest.raises(ValueError, match="was saved behind"):
        Watching.resumed(ef.resume(zoo.shared("llama"), path), Door())
    with pytest.raises(ValueError, match=r"not saved by `Watching\.save`"):
        Watching.resumed(opened(), DOOR)


def test_what_is_refused_leaves_it_as_it_was():
    frames = film()
    for door, message in (
        ("window", "is no door; take one of curve-stream"),
        ("videollm", "did you mean 'videollm-online'"),
    ):
        with pytest.raises(ValueError, match=message):
            Watching(opened(), door)
    with pytest.raises(ValueError, match="2 rows"):
        Watching(ef.open(zoo.shared("llama"), batch=2), DOOR)
    watching = Watching(opened(), Door(speaks=ClipEnd(2)), between=[5])
    with pytest.raises(ValueError, match=r"expected \[12, tokens, hidden\]"):
        watching.see(frames, frames[:3])
    with pytest.raises(ValueError, match="grid is"):
        watching.see(frames, grid=(3, 3))
    with pytest.raises(ValueError, match="3 times for 12"):
        watching.see(frames, times=[1, 2, 3])
    [*watching.see(frames[:1])]
    before = watching._state
    broken = frames.clone()
    broken[1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        next(watching.see(broken[1:], frames[1:]))
    with pytest.raises(ValueError, match="NaN"):  # after the silent token was read
        next(watching.see(frames[1:], broken[1:]))
    assert watching._state is before and watching.stream.position == 3 + TOKENS
    with pytest.raises(ValueError, match="give `grid`"):
        next(Watching(ef.open(tower(), "full"), DOOR).see(frames.double()))
