"""Search over candidates for each chunk: their noise, their isolation, what is chosen, shown and sent where."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.generate import (
    Beam,
    Chunk,
    Chunks,
    Engine,
    Flow,
    Given,
    Search,
    SearchedStream,
    VideoStream,
    replay,
    resume_stream,
)
from evenflow.generate.flow import noise
from evenflow.generate.searching import settled
from evenflow.memory.routing import APPEND, DROP, MERGE, route

from .small import small

ROUTED = "stream-t1(window=6, sink=3, max_sink=6)"
KVPO = "kvpo(window=9, physical=15, nearest=4, blocks=2, branches=3)"


def opened(prompt="a red ball", **options):
    return VideoStream(small(), prompt, **{"memory": ROUTED, **options})


def bright(frames, prompt=""):
    return float(frames.mean()) / 8


def smooth(frames, prompt=""):
    return -float(np.abs(np.diff(frames.astype(float), axis=0)).mean()) / 8


def searched(stream=None, **options):
    return SearchedStream(stream or opened(), bright, smooth, Search(**options))


def state_of(stream):
    kept = {f"memory.{name}": x.clone() for name, x in stream._engine.memory.state_dict().items()}
    return kept | {f"entered.{frame}": x for frame, x in stream._engine.entered.items()}


def entered(turns, shape=(16, 64, 64), chunk=3):
    """The first noise of every frame, of turns that are given (seed, follow) each."""
    engine = Engine(lambda x, t, text, attend: torch.zeros_like(x), Flow((1.0, 0.5)), shape, seed=5)
    schedule, found = Chunks(2, chunk), []
    for n, (seed, follow) in enumerate(turns):
        told = Given(seed=seed, follow=follow)
        engine.turn(schedule.turn(n), schedule.turn(n + 1), told, lambda latents: latents)
        found.append(torch.stack([engine.entered[n * chunk + i] for i in range(chunk)]) if told.varied else None)
    return found


def corr(a, b):
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


# -- the noise of a candidate ------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.none() | st.integers(0, 9), st.sampled_from([0.0, -0.1, 0.7, 1.0])), min_size=1, max_size=5)
)
def test_the_first_noise_is_that_of_the_definition(turns):
    parent = None
    for n, ((seed, follow), ours) in enumerate(zip(turns, entered(turns, (2, 2, 2)), strict=True)):
        own = [
            noise(5, (3 * n + i, 0), (2, 2, 2)) if seed is None else noise(seed, (i, 0), (2, 2, 2)) for i in range(3)
        ]
        own = torch.stack(own)
        parent = own if parent is None or not follow else follow * parent + (1 - follow**2) ** 0.5 * own
        assert ours is None or torch.allclose(ours, parent, atol=1e-6)


def test_point_3_the_noise_along_a_beam_is_autoregressive_of_unit_variance():
    for sigma in (-0.1, 0.7):
        a, b, c = entered([(1, 0.0), (2, sigma), (3, sigma)])
        assert all(abs(float(x.std()) - 1) < 0.005 for x in (a, b, c))
        assert abs(corr(a, b) - sigma) < 0.01 and abs(corr(b, c) - sigma) < 0.01 and abs(corr(a, c) - sigma**2) < 0.01


def test_point_3_a_seed_that_is_used_again_deviates_as_the_official_one():
    _, again = entered([(7, 0.0), (7, -0.1)])
    assert abs(float(again.std()) - 0.895) < 0.005


# -- a chunk that is told something ------------------------------------------------------------------------------------


def test_what_is_told_is_noted_and_replayed_saved_and_forked(tmp_path):
    stream = opened()
    made = [
        stream.step(seed=3), stream.step(follow=0.5, route=lambda frames: APPEND), stream.step(),
        stream.step(seed=4, follow=-0.3, route=MERGE),
    ]  # fmt: skip
    assert [(e["frame"], e["seed"], e["follow"], e["route"]) for e in stream.history[1:]] == [
        (0, 3, 0.0, None), (3, None, 0.5, APPEND), (9, 4, -0.3, MERGE),
    ]  # fmt: skip
    again = list(replay(opened(), stream.history))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(made, again, strict=True))
    stream.save(tmp_path / "s.safetensors")
    twin, loaded = stream.fork(), resume_stream(small(), tmp_path / "s.safetensors")
    after = [s.step(follow=0.9).frames for s in (stream, twin, loaded)]
    assert np.array_equal(after[0], after[1]) and np.array_equal(after[0], after[2])


def test_a_route_is_told_before_the_memory_keeps_the_chunk():
    stream, seen = opened(), []

    def told(frames):
        seen.append((frames.shape, frames.dtype, stream._engine.memory.position))
        return APPEND

    chunk = stream.step(route=told)
    assert seen == [(chunk.frames.shape, np.dtype("uint8"), 0)]
    stream.step()
    table = stream._engine.memory.tables[0]
    told_of = dict(zip(table.index[0, 0].tolist(), table.tags["route"][0, 0].tolist(), strict=True))
    assert [told_of[token] for token in range(24)] == [APPEND] * 12 + [DROP] * 12


def test_a_branch_of_a_stream_sees_another_past_and_leaves_it_as_it_is():
    stream = opened(memory=KVPO)
    for _ in range(6):
        stream.step()
    before, recall = state_of(stream), stream.memory.recall
    anchor, plain, *twins = (stream.fork() for _ in range(5))
    frames = [
        np.concatenate([s.step(route=None if where is None else recall.route(where, n)).frames for n in range(2)])
        for s, where in ((anchor, None), (plain, None), (twins[0], 0), (twins[1], 0), (twins[2], 1))
    ]
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[2], frames[3])
    assert not np.array_equal(frames[0], frames[2]) and not np.array_equal(frames[2], frames[4])
    after = state_of(stream)
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize(
    ("open_", "told", "match"),
    [
        ({}, {"seed": 1.5}, "seed"),
        ({}, {"follow": 1.1}, "follow"),
        ({}, {"route": "append"}, "route"),
        ({"memory": "longlive"}, {"route": 1}, "no routes"),
        ({"schedule": "rolling", "memory": "rolling-forcing"}, {"seed": 1}, "rolling"),
        ({}, {"route": lambda frames: 1 / 0}, "zero"),
        ({}, {"route": lambda frames: 0.5}, "float"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_and_changes_nothing(open_, told, match):
    stream, other = opened(**open_), opened(**open_)
    with pytest.raises((ValueError, TypeError, ZeroDivisionError), match=match):
        stream.step(**told)
    assert np.array_equal(stream.step().frames, other.step().frames) and len(stream.history) == 1


# -- the search --------------------------------------------------------------------------------------------------------


def test_point_1_one_candidate_is_the_plain_stream_with_the_same_noise():
    search, plain = searched(keep=1, tries=1, sigma=0.0, reuse="fresh"), opened()
    for n in range(4):
        frames, short, long = search.step().frames, search.best.short, search.best.long
        sent = search.best.route
        assert np.array_equal(frames, plain.step(seed=42 + 1000 * n, route=sent).frames)
        assert len(short) == len(long) == n + 1


def test_point_2_a_candidate_changes_no_parent_and_few_live_at_a_time(monkeypatch):
    stream = opened()
    stream.step()
    before, most = state_of(stream), 0
    alive, fork = weakref.WeakSet(), VideoStream.fork

    def forked(self):
        alive.add(twin := fork(self))
        return twin

    def counted(frames, prompt):
        nonlocal most
        most = max(most, len(alive))
        return bright(frames)

    monkeypatch.setattr(VideoStream, "fork", forked)
    search = SearchedStream(stream, counted, smooth, Search(keep=2, tries=3))
    for _ in range(2):
        kept = [(beam.stream, state_of(beam.stream)) for beam in search.beams]
        search._chunk, (search.beams, chosen) = search._chunk + 1, (search._round(), search.beams)
        for beam, (parent, was) in zip(chosen, kept, strict=True):
            assert beam.stream is parent and all(torch.equal(x, state_of(parent)[n]) for n, x in was.items())
        del kept, chosen, beam, parent, was
    assert most == 2 * 2 + 1
    assert all(torch.equal(x, state_of(stream)[name]) for name, x in before.items())


def test_the_chosen_are_the_best_of_all_candidates_and_shown_as_they_were_made():
    """The search again, by its definition: streams that replay what they were told."""
    ours, k, b = searched(keep=2, tries=2, sigma=-0.1, lag=10), 2, 2
    parents, history = [((), (), (), ())], opened().history
    for c in range(3):
        ours.beams, ours._chunk = ours._round(), ours._chunk + 1
        made = []
        for p, (seeds, short, long, sent) in enumerate(parents):
            for i in range(b if c else k * b):
                seed = 42 + i if not c else seeds[-1] if i == 0 else 42 + 1000 * c + 100 * p + i
                told = [*zip((*seeds, seed), (*sent, None), strict=True)]
                stream = opened()
                frames = [
                    stream.step(seed=s, follow=-0.1 if n else 0.0, route=r).frames for n, (s, r) in enumerate(told)
                ]
                x, y = bright(frames[-1]), smooth(np.concatenate(frames))
                where = route((*short, x), (*long, y))
                alpha = min(3 * c / 18, 0.4)
                made.append((alpha * x + (1 - alpha) * y, (*seeds, seed), (*short, x), (*long, y), (*sent, where)))
        made.sort(key=lambda one: -one[0])
        parents = [one[1:] for one in made[:k]]
        assert [beam.score for beam in ours.beams] == pytest.approx([one[0] for one in made[:k]])
        for beam, (seeds, _, _, sent) in zip(ours.beams, parents, strict=True):
            assert (beam.seeds, beam.route) == (seeds, sent[-1])
    assert history[1:] == []
    best = ours.best
    shown = ours.finish()
    again = list(replay(opened(), best.stream.history))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(shown, again, strict=True))


def test_point_4_scripted_rewards_send_chunks_where_they_belong():
    short, long = [0.0, 1.0, 2.0, 0.0, 3.0, 3.5, -1.0, 5.0, 0.0], [0.0, 0.5, 0.2, 0.1, 0.1, 0.9, 0.9, 0.1, 0.1]
    expected = [DROP, MERGE, APPEND, DROP, MERGE, MERGE, DROP, APPEND, DROP]
    turn = [0]

    def scripted(values):
        return lambda frames, prompt: values[turn[0]]

    search = SearchedStream(opened(), scripted(short), scripted(long), Search(keep=1, tries=1))
    for n, where in enumerate(expected):
        turn[0] = n
        search.step()
        assert search.best.route == where
    sinks = {frame for frame, region in search.best.stream.held() if region == "memory"}
    assert sinks == {6, 7, 8}  # the chunk that was appended; the one after it is still in the window or gone


def test_point_5_and_6_scores_and_what_is_shown():
    search = Search()
    assert [search.alpha(n) for n in (0, 3, 6, 9, 300)] == pytest.approx([0, 1 / 6, 1 / 3, 0.4, 0.4])
    plain, moved = searched(keep=2, tries=2), searched(keep=2, tries=2)
    moved.short, moved.long = (lambda f, p: bright(f) + 5), (lambda f, p: smooth(f) - 3)
    for _ in range(2):
        a, b = plain.step(), moved.step()
        assert np.array_equal(a.frames, b.frames)
    greedy = searched(keep=1, tries=3)
    for n in range(3):
        greedy.step()
        assert greedy.position == 3 * (n + 1)  # nothing waits


def beam(*names, score=0.0):
    return Beam(None, open=tuple(CHUNKS[name] for name in names), score=score)


CHUNKS = {name: Chunk(np.zeros((1, 1, 1, 3), np.uint8), 0, name, 0, 0.0) for name in "abcdefg"}


@pytest.mark.parametrize(
    ("beams", "lag", "shown", "left"),
    [
        ([beam("a", "b"), beam("a", "c")], 2, "a", ["b", "c"]),
        ([beam("a"), beam("b")], 2, "", ["a", "b"]),
        ([beam("a", "b", "c"), beam("d", "e", "f")], 2, "abc", [""]),  # the best alone is left, and agrees with itself
        ([beam("a", "b", "c"), beam("d", "e", "f"), beam("a", "b", "g")], 2, "ab", ["c", "g"]),
        ([beam("a"), beam("b")], 0, "a", [""]),
        ([beam("a", "b", "c")], 2, "abc", [""]),
    ],
)
def test_a_chunk_is_shown_when_all_agree_or_the_best_decides(beams, lag, shown, left):
    ready, kept = settled(tuple(beams), lag)
    assert "".join(chunk.prompt for chunk in ready) == shown
    assert ["".join(chunk.prompt for chunk in one.open) for one in kept] == left


def test_asking_forking_and_going_on_after_an_error():
    search = searched(keep=2, tries=2, lag=1, span=3)
    search.step()
    search.ask("a blue cube")
    twin = search.fork()
    failing = [0]

    def fails(frames, prompt):
        failing[0] += 1
        if failing[0] == 3:
            raise RuntimeError("no reward")
        return bright(frames)

    search.short = fails
    with pytest.raises(RuntimeError, match="no reward"):
        for _ in range(3):
            search.step()
    search.short = bright
    ours, theirs = ([s.step() for _ in range(4)] for s in (search, twin))
    shown = {chunk.first: chunk for chunk in theirs}
    assert all(np.array_equal(c.frames, shown[c.first].frames) for c in ours if c.first in shown)
    assert theirs[-1].prompt == "a blue cube" and search.best.stream.prompt == "a blue cube"
    sizes = []
    for _ in range(8):
        twin.step()
        sizes.append(twin.nbytes // len(twin.beams))
    assert max(sizes[4:]) <= 1.1 * max(sizes[:4])


@pytest.mark.parametrize(
    ("options", "match"),
    [({"keep": 0}, "keep"), ({"sigma": 2}, "sigma"), ({"reuse": "never"}, "reuse"), ({"span": 1}, "span")],
)
def test_a_search_without_sense_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Search(**options)


def test_a_search_needs_chunks_and_rewards_that_are_numbers():
    with pytest.raises(ValueError, match="chunks"):
        searched(opened(memory="rolling-forcing", schedule="rolling"))
    broken = SearchedStream(opened(), lambda f, p: float("nan"), smooth)
    with pytest.raises(ValueError, match="numbers"):
        broken.step()


def test_a_saved_search_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Within a lead of open chunks too, which beams share."""
    search = searched(keep=2, tries=2, lag=3)
    for _ in range(3):
        search.step()
    search.save(tmp_path / "search")
    search.save(tmp_path / "search")  # over the one before
    again = SearchedStream.resumed(search.best.stream.model, tmp_path / "search", bright, smooth)
    assert [beam.score for beam in again.beams] == [beam.score for beam in search.beams]
    assert again.search == search.search and again.position == search.position
    assert len({id(c) for b in again.beams for c in b.open}) == len({id(c) for b in search.beams for c in b.open})
    for _ in range(3):
        ours, theirs = search.step(), again.step()
        assert np.array_equal(ours.frames, theirs.frames) and ours.first == theirs.first
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds no search"):
        search.save(tmp_path / "other")
    before, rename = sorted(tmp_path.glob("search/*")), Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.save(tmp_path / "search")
    monkeypatch.undo()
    assert sorted(tmp_path.glob("search/*")) == before, "the one before is back in its place"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    damaged = tmp_path / "search" / "beam0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged|cut|checksum|changed|cannot"):
        SearchedStream.resumed(search.best.stream.model, tmp_path / "search", bright, smooth)
