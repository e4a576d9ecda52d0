"""A door is asked before an item is read and after; whatever is behind it, it decides the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenflow as ef
from evenflow.memory.admission import (
    ClipEnd,
    Curvature,
    Door,
    Novelty,
    NoveltyPeak,
    OneToken,
    Salient,
    SimilarFrames,
    SkipUnit,
    TokenDrop,
    Whole,
)
from evenflow.memory.features import Star
from evenflow.models.hybrid import PRESETS, Hybrid, HybridSession

DOORS = {
    "drop": Door(lets=TokenDrop(0.9, reference="last_kept"), speaks=Novelty(0.3)),
    "curve": Door(lets=Curvature(), speaks=NoveltyPeak()),
    "similar": Door(lets=SimilarFrames(0.5), speaks=ClipEnd(3)),
    "salient": Door(lets=Salient(), speaks=OneToken(silent=1, threshold=0.3)),
    "whole": Door(speaks=SkipUnit(skip=4)),
}
every_door = pytest.mark.parametrize("name", DOORS)


def items(name, count, seed=0):
    made = torch.Generator().manual_seed(seed)
    shape = (count, 6) if name in ("curve", "similar") else (count, 5, 6)
    return torch.randn(shape, generator=made).cumsum(0)


def said(verdict, seed):
    """What a model would say of the items that got in: logits and tokens that depend on the item alone."""
    inside = verdict.keep if verdict.keep.ndim == 1 else verdict.keep.any(1)
    logits = torch.stack(
        [torch.randn(7, generator=torch.Generator().manual_seed(seed + n)) for n in range(len(inside))]
    )
    logits = logits[inside]
    return {"logits": logits, "tokens": logits.argmax(-1)}


def passed(way, given, sizes):
    """Verdicts and speech, item by item."""
    keeps, speaks, at = [], [], 0
    for size in sizes:
        verdict = way.enter(given[at : at + size])
        keeps.append(verdict.keep)
        speaks.append(way.emit(**said(verdict, at)))
        at += size
    return torch.cat(keeps), torch.cat(speaks)


@every_door
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), at=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_any_cut_gives_the_same_and_a_saved_or_forked_door_goes_on(name, sizes, at):
    given_, door = items(name, sum(sizes)), DOORS[name]
    whole = passed(door.build(), given_, [sum(sizes)])
    way, cut = door.build(), min(at, len(sizes) - 1)
    first = sum(sizes[:cut])
    before = passed(way, given_[:first], sizes[:cut]) if cut else None
    twin, loaded = way.fork(), door.build()
    loaded.load_state_dict(way.state_dict())
    for one in (way, twin, loaded):
        verdict = one.enter(given_[first:])
        keep, speak = verdict.keep, one.emit(**said(verdict, first))
        keep, speak = (
            torch.cat([b, x]) if before else x for b, x in zip(before or (None, None), (keep, speak), strict=True)
        )
        assert torch.equal(keep, whole[0]) and torch.equal(speak, whole[1]) and one.position == sum(sizes)
    assert way.nbytes == loaded.nbytes == sum(x.nbytes for x in way.state_dict().values())


def test_a_gate_that_asks_the_model_is_not_asked_where_nothing_was_read():
    way = Door(lets=TokenDrop(0.9), speaks=OneToken(silent=0, threshold=2.0)).build()  # speaks always, once it is asked
    still = torch.randn(1, 4, 8).expand(3, -1, -1)
    way.enter(still)
    assert way.emit(logits=torch.randn(1, 5)).tolist() == [True, False, False]
    way.enter(still)
    assert not way.emit(logits=torch.zeros(0, 5)).any()


def test_what_is_refused_changes_nothing():
    way = DOORS["whole"].build()
    with pytest.raises(RuntimeError, match="no item has entered"):
        way.emit(tokens=torch.tensor([1]))
    way.enter(torch.randn(2, 3))
    state = way.state
    with pytest.raises(RuntimeError, match="2 items are inside already"):
        way.enter(torch.randn(1, 3))
    with pytest.raises(ValueError, match="asks for tokens, one of each of 2 items that got in; got none"):
        way.emit(logits=torch.randn(2, 5))
    with pytest.raises(ValueError, match="got 1"):
        way.emit(tokens=torch.tensor([1]))
    assert way.state is state
    assert way.emit(tokens=torch.tensor([4, 5])).tolist() == [False, True]
    with pytest.raises(ValueError, match="NaN"):
        way.enter(torch.full((1, 3), torch.nan))
    assert way.position == 2
    with pytest.raises(RuntimeError, match="or this door has none"):
        Door().build().emit()
    with pytest.raises(ValueError, match=r"knows nothing of admission\.path"):
        way.load_state_dict({**way.state_dict(), "admission.path": torch.zeros(1)})
    with pytest.raises(ValueError, match="number is missing"):
        way.load_state_dict({})
    assert way.position == 2 and not way.enter(torch.randn(0, 3)).keep.numel()


def test_whole_lets_everything_in():
    verdict, state = Whole().step(torch.randn(3, 2, 2), None)
    assert verdict.keep.tolist() == [True] * 3 and verdict.novelty.tolist() == [1] * 3 and state is None


HIDDEN = 32


def memories():
    """What reads features [tokens, HIDDEN], and how much it has read, one of every kind."""
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(1)
    k = torch.randn(3, HIDDEN, 16, generator=made) / HIDDEN**0.5

    def qkv(x):
        return [torch.einsum("nd,dc->nc", x, one)[None, None] for one in k]

    window = ef.recipe("streaming-llm", sink=2, window=30).build(layers=1, heads=1, head_dim=16)
    lanes = ef.recipe("speak-while-watching").build(layers=1, heads=1, head_dim=16)
    mixed = ef.recipe("infinite-vl", window=30, ratio=1, kernel=1).build(layers=2, heads=1, head_dim=16)
    hybrid = HybridSession(Hybrid(PRESETS["toy"]).eval())
    star = Star(temporal=2, abstract=2, retrieved=1, fine=2, coarse=2, bank=4).build(dim=HIDDEN)

    def read_window(x):
        with window.step(len(x)):
            window.attend(0, *qkv(x))

    def read_lanes(x):
        with lanes.read(len(x), 0) as step:
            step.attend(0, *qkv(x))

    def read_mixed(x):
        with mixed.step(len(x)) as step:
            step.attend(0, *qkv(x))
            ones = torch.ones(1, 1, len(x))
            step.fold(1, *qkv(x), beta=ones / 2, g=-ones)

    def read_hybrid(x):
        hybrid.feed(x.repeat(1, PRESETS["toy"].dim // HIDDEN))

    return {
        "memory": (read_window, lambda: window.position),
        "lanes": (read_lanes, lambda: lanes.position.source),
        "mixed": (read_mixed, lambda: mixed.position),
        "hybrid": (read_hybrid, lambda: hybrid.position),
        "features": (lambda x: star.feed(x.view(1, 2, 2, HIDDEN)), lambda: 4 * star.position),
    }


@pytest.mark.parametrize("kind", memories())
def test_before_every_kind_of_memory_a_scene_at_rest_is_read_once_and_a_cut_at_once(kind):
    read, position = memories()[kind]
    scene, other = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
    way = ef.recipe("timechat-online", threshold=0.9, reference="last_kept").build()
    spoke = []
    for n, frame in enumerate([scene] * 6 + [other] * 3):
        verdict = way.enter(frame[None])
        if bool(verdict.keep.any()):
            read(frame[verdict.keep[0]])
        spoke += [n] if bool(way.emit()) else []
        assert position() == (4 if n < 6 else 8)
    assert spoke == [0, 6]
