"""Which memory goes with which schedule, and what streams do with the memories of MotionStream, LongLive, Anchor Forcing."""

import numpy as np
import pytest
import torch

import evenflow as ef
from evenflow.generate import VideoStream, compatible, parse_schedule
from evenflow.generate.composing import plain
from evenflow.generate.guidance import joint
from evenflow.generate.tracks import Track, drawn, masked, number, pixel_frames
from evenflow.models.video.tracks import named

from .small import picture, small
from .test_stream import open_, slow, take

FRAMES = [info.name for info in ef.recipes("memory") if ef.recipe(info.name).inside == "both"]
SPECS = {
    "chunks": "chunks",
    "knots": "knots",
    "rolling": "rolling(levels=3)",
    "batch": "batch",
    "buffer": "buffer(0,2,2,1)",
}
# What a memory needs to be told for a picture of 2 × 2 tokens.
PARAMS = {
    "forcing-kv": {"segments": 2},
    "longlive": {"window": 15},
    "motionstream": {"window": 2},
    "dvgt2": {"window": 12},
}


def memory_of(name):
    return ef.recipe(name, **PARAMS.get(name, {}))


GOES = {
    "chunks": set(FRAMES) - {"knot-forcing", "streamdiffusion-v2", "liveact", "infinite-vggt"},
    "knots": {"self-forcing", "longlive", "motionstream", "dvgt2", "knot-forcing"},
    "rolling": {"self-forcing", "longlive", "motionstream", "dvgt2", "rolling-forcing"},
    "batch": {"streamdiffusion-v2"},
    "buffer": set(),
}


@pytest.mark.parametrize("schedule", SPECS)
@pytest.mark.parametrize("name", FRAMES)
def test_every_memory_of_frames_streams_or_is_refused_with_the_reason(schedule, name):
    memory, made = memory_of(name), parse_schedule(SPECS[schedule])
    reason = compatible(made, memory)
    assert (reason is None) == (name in GOES[schedule]), reason
    if reason is not None:
        assert len(reason) > 30
        with pytest.raises(ValueError, match=schedule):
            open_(memory=memory, schedule=made)
        return
    stream = open_(memory=memory, schedule=made)
    if name == "knot-forcing":
        stream.show(picture())
    video = take(stream, 5)
    assert np.isfinite(video).all() and len(stream.held()) >= 3
    stream.ask("a blue cube")
    assert stream._asked[0].how in ("recache", "anchored", "keep")
    twin = stream.fork()
    assert np.array_equal(take(stream, 2), take(twin, 2))


def test_memories_of_tokens_and_none_are_refused():
    chunks, batch = parse_schedule("chunks"), parse_schedule("batch")
    assert "tokens one by one" in compatible(chunks, ef.recipe("streaming-llm"))
    assert compatible(batch, None) is None and "remembered" in compatible(chunks, None)
    assert "as many copies" in compatible(batch, ef.recipe("streamdiffusion-v2", steps=3))
    assert plain(ef.recipe("longlive")) and not plain(ef.recipe("reward-forcing"))


# -- MotionStream --------------------------------------------------------------------------------------------------------


def test_motionstream_1_it_holds_sink_and_window_and_no_more():
    stream, sizes = open_(memory="motionstream", schedule="chunks(levels=3)"), []
    for n in range(1, 40):
        assert stream.step().calls == 4
        sizes.append(stream.nbytes)
        if n > 1:
            end = 3 * n
            expected = [(f, "sink") for f in range(3)] + [(f, "window") for f in range(end - 3, end)]
            assert stream.held() == expected
    assert len(set(sizes[3:])) == 1


def test_motionstream_2_the_number_of_a_chunk_does_not_matter():
    near = open_(memory="motionstream")
    take(near, 5)
    far, fixed = near.fork(), open_(memory="longlive(window=9)")
    take(fixed, 5)
    moved = fixed.fork()
    for stream in (far, moved):
        memory = stream._engine.memory
        memory.seek(memory.position + 10**6 * 4)
    assert np.array_equal(take(far, 1), take(near, 1))
    assert not np.array_equal(take(moved, 1), take(fixed, 1))  # absolute sinks are now a million frames away


def test_motionstream_3_with_room_for_all_it_is_full_attention():
    ours = take(open_(memory="motionstream(sink=0, window=9)"), 5)
    assert np.abs(ours.astype(int) - slow("a red ball", 5).astype(int)).max() <= 1


def test_motionstream_4_the_sink_is_frozen_and_what_has_left_is_not_read():
    stream = open_(memory="motionstream")
    take(stream, 2)

    def sinks(one):
        state = one._engine.memory.state_dict()
        return torch.cat(
            [state[f"layers.{n}.{what}"][0, :, :12].flatten() for n in range(2) for what in ("keys", "values")]
        )

    first = sinks(stream)
    take(stream, 10)
    assert torch.equal(sinks(stream), first)


def test_motionstream_7_a_canvas_has_one_cell_a_track_and_comes_in_pieces():
    tracks = [
        Track(0, ((0.0, 1.0, 1.0), (2.0, 14.0, 9.0))),
        Track(5, ((0.5, 8.0, 15.0),)),
        Track(7, ((0.0, 99.0, 2.0),)),
    ]
    how = {"grid": (4, 4), "stride": (4, 4, 4), "fps": 16, "seed": 3}
    whole = drawn(tracks, range(12), **how)
    assert whole.shape == (12, 32, 4, 4)
    pieces = torch.cat([drawn(tracks, range(at, at + 3), **how) for at in range(0, 12, 3)])
    assert torch.equal(whole, pieces)
    cells = whole.unflatten(1, (4, 8)).abs().sum(2) > 0  # [F, 4, h, w]
    for frame in range(12):
        for i, pixel in enumerate(pixel_frames(frame)):
            at, expected = pixel / 16, np.zeros((4, 4), dtype=bool)
            if at <= 2:
                expected[int((1 + 4 * at) // 4), int((1 + 6.5 * at) // 4)] = True
            if at >= 0.5:
                expected[3, 2] = True
            assert np.array_equal(cells[frame, i].numpy(), expected)
    alone = drawn(tracks[:1], [0], **how)
    assert torch.equal(alone[0, :8, 0, 0], named(torch.tensor([number(3, 0)]))[0])
    other = drawn(tracks, range(12), **{**how, "seed": 4})
    assert not torch.equal(other, whole) and torch.equal((other != 0).any(1), (whole != 0).any(1))
    hidden = masked(whole, torch.tensor([False] * 5 + [True] * 7))
    assert torch.equal(hidden[:5], whole[:5]) and not hidden[5:].any()
    assert pixel_frames(0) == [0, 0, 0, 0] and pixel_frames(3) == [9, 10, 11, 12]


def test_motionstream_8_joint_guidance():
    both, text, motion = torch.randn(3, 5).unbind(0)
    assert torch.allclose(joint(both, text, motion, 0.0, 1.5), text + 1.5 * (both - text))
    assert torch.allclose(joint(both, both, both), both)
    slow_ = (2 / 3) * motion + (1 / 3) * text + 3 * (both - motion) + 1.5 * (both - text)
    assert torch.allclose(joint(both, text, motion), slow_, atol=1e-6)


# -- Anchor Forcing ------------------------------------------------------------------------------------------------------


def test_anchor_forcing_3_a_junction_is_seen_once_its_chunk_has_left_the_window():
    """Switches asked for at 40 and 80 take effect at 42 and 81, whose chunks are junctions, out of the window 9 later."""
    stream = VideoStream(small(), "a red ball", "anchor-forcing")
    stream.ask("a blue ball", at=40)
    stream.ask("a blue cube", at=80)
    while stream.position < 105:
        start = stream.position
        stream.step()
        held = stream.held()
        sinks, memory, window = ([f for f, region in held if region == what] for what in ("sink", "memory", "window"))
        assert sinks == [0, 1, 2] and window == list(range(max(3, start + 3 - 9), start + 3))
        junctions = [first for first in (42, 81) if start >= first]
        assert memory == [f for first in junctions for f in range(first, first + 3)]
    assert stream._engine.segment == 2


def test_anchor_forcing_is_how_it_is_asked_and_longlive_is_recached():
    assert open_(memory="anchor-forcing")._how(None) == "anchored" and open_()._how(None) == "recache"
    assert open_(schedule="batch")._how(None) == "keep"
    with pytest.raises(ValueError, match="has none: take 'keep'"):
        open_(schedule="buffer(0, 2, 2, 1)")._how("clear")
    with pytest.raises(ValueError, match="computed anew"):
        open_(schedule="batch")._how("recache")
