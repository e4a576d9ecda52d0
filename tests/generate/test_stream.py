"""Endless video through a small random network: what is asked, what is kept, and that every path gives the same bytes."""

import json
import time

import numpy as np
import pytest
import torch

from evenflow.generate import VideoStream, parse_schedule, replay, resume_stream
from evenflow.generate.flow import noise, warped
from evenflow.generate.pixels import from_pixels, to_pixels
from evenflow.models.video.dense import Dense, chunk_causal

from .small import CONFIG, picture, small

SCHEDULES = ["chunks", "chunks(chunk=1)", "chunks(first=1)", "chunks(levels=3)", "rolling", "rolling(levels=3, chunk=1)",
             "buffer(0, 4, 2, 1)", "buffer(2, 3, 1, 2)", "rain(0, 2, 2, 1)", "batch", "batch(levels=3, first=0, slots=True)",
             "knots", "knots(chunk=2, knot=2)"]  # fmt: skip
every = pytest.mark.parametrize("schedule", SCHEDULES)


def open_(prompt="a red ball", **options):
    return VideoStream(small(), prompt, **options)


def take(stream, count):
    return np.concatenate([stream.step().frames for _ in range(count)])


@torch.no_grad()
def slow(prompt, chunks, memory_frames=None, chunk=3, seed=0, sink=0):
    """Self-Forcing by its definition: every pass sees the clean frames before it, recomputed densely."""
    model = small()
    network, text = model.transformer, model.transformer.read(model.encode_text([prompt]))
    sigmas, done = warped(CONFIG.steps, CONFIG.shift), []
    size = CONFIG.latent_size()
    for c in range(chunks):
        frames = range(c * chunk, (c + 1) * chunk)
        x = torch.stack([noise(seed, (f, 0), (16, *size)) for f in frames])
        for level, sigma in enumerate(sigmas):
            latents = torch.cat([*done, x])
            t = torch.tensor([[0.0] * (c * chunk) + [1000 * sigma] * chunk])
            # A window changes what later chunks see of clean frames' keys, not the keys: those are computed causally.
            mask = chunk_causal(len(latents), chunk, sink, memory_frames)
            attend = Dense(network.rope, CONFIG.head_dim, torch.arange(len(latents)), 2, 2, mask)
            padded = torch.cat([latents, latents.new_zeros(len(latents), 32, *size)], 1)
            v = network(padded[None], t, text, attend)[0, -chunk:]
            clean = x.double() - sigma * v.double()
            if level + 1 < len(sigmas):
                drawn = torch.stack([noise(seed, (f, level + 1), (16, *size)) for f in frames]).double()
                x = ((1 - sigmas[level + 1]) * clean + sigmas[level + 1] * drawn).float()
        done.append(clean.float())
    return to_pixels(model.codec.decode(torch.cat(done)[None])[0])


@pytest.mark.parametrize(("memory", "frames", "sink"), [
    ("self-forcing(window=21)", 21, 0), ("longlive(window=12, sink=3)", 9, 3), ("self-forcing(window=6)", 6, 0)
])  # fmt: skip
def test_it_equals_self_forcing_by_its_definition(memory, frames, sink):
    ours = take(open_(memory=memory), 7)
    theirs = slow("a red ball", 7, frames, sink=sink)
    assert ours.shape == theirs.shape == (81, 16, 16, 3)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1  # rounding of float32


@every
def test_chunks_follow_one_another(schedule):
    stream, at = open_(schedule=schedule), 0
    for n, chunk in zip(range(4), stream, strict=False):
        assert chunk.frames.dtype == np.uint8 and chunk.frames.shape[1:] == (16, 16, 3)
        assert chunk.first == at and chunk.prompt == "a red ball" and chunk.calls >= 1 and chunk.seconds > 0
        at += len(chunk.frames)
        assert stream.frames == at and (at - 1) % 4 == 0 and stream.position == (at - 1) // 4 + 1
        assert len(chunk.frames) == (4 * stream.schedule.emits if n else 4 * stream.schedule.first_emits - 3)


@every
def test_the_same_seed_gives_the_same_bytes_and_forks_and_saved_streams_go_on_alike(schedule, tmp_path):
    stream = open_(schedule=schedule)
    first = take(stream, 2)
    assert np.array_equal(first, take(open_(schedule=schedule), 2))
    assert not np.array_equal(first, take(open_(schedule=schedule, seed=1), 2))
    stream.ask("a blue cube", over=1.0)
    stream.draw([(0.5, 2, 2), (3, 12, 12)])
    stream.save(tmp_path / "a.evenflow")
    twin, told = stream.fork(), json.loads(json.dumps(stream.history))
    rest = take(stream, 3)
    assert np.array_equal(rest, take(twin, 3))
    resumed = resume_stream(small(), tmp_path / "a.evenflow")
    assert (resumed.frames, resumed.history) == (len(first), told)
    assert np.array_equal(rest, take(resumed, 3)) and resumed.nbytes == stream.nbytes
    again = open_(schedule=schedule)
    before = np.concatenate([chunk.frames for chunk in replay(again, told)])
    assert np.array_equal(before, first) and np.array_equal(take(again, 3), rest)
    stream.reset()
    assert stream.position == 0 and stream.prompt == "a blue cube"
    assert np.array_equal(take(stream, 2), take(open_("a blue cube", schedule=schedule), 2))


def test_a_fork_never_sees_what_the_other_does():
    stream = open_()
    take(stream, 5)
    twin = stream.fork()
    expected = take(twin.fork(), 2)
    stream.ask("a blue cube", how="clear")
    stream.draw([(0, 1, 1)])
    take(stream, 3)
    assert np.array_equal(take(twin, 2), expected)


@every
def test_memory_is_flat(schedule):
    stream, sizes = open_(schedule=schedule), []
    while stream.position < 36:
        stream.step()
        sizes.append((stream.position, stream.nbytes))
    assert len({size for position, size in sizes if position > 27}) == 1


def test_a_step_takes_as_long_late_as_early():
    old, young, took = open_(), open_(), {}
    take(young, 6), take(old, 40)
    for n in range(40):  # in turns, as others use the machine too
        start = time.perf_counter()
        (young, old)[n % 2].step()
        took.setdefault(n % 2, []).append(time.perf_counter() - start)
    assert np.median(took[1]) < 1.5 * np.median(took[0])


@pytest.mark.parametrize("how", ["keep", "clear", "recache"])
def test_another_prompt_shows_from_the_next_chunk_on_and_not_before(how):
    stream, other = open_(), open_()
    take(stream, 6)
    take(other, 6)
    stream.ask("a blue cube", how=how)
    assert stream.prompt == "a red ball"
    chunk = stream.step()
    assert chunk.prompt == stream.prompt == "a blue cube" and not np.array_equal(chunk.frames, other.step().frames)


def test_ways_to_switch_differ_and_clear_forgets():
    frames, held = {}, {}
    for how in ("keep", "clear", "recache"):
        stream = open_()
        take(stream, 6)
        stream.ask("a blue cube", how=how)
        frames[how], held[how] = take(stream, 1), stream.held()
    assert not np.array_equal(frames["keep"], frames["clear"])
    assert not np.array_equal(frames["keep"], frames["recache"])
    assert held["keep"] == held["recache"] == [(f, "sink") for f in range(3)] + [(f, "window") for f in range(12, 21)]
    assert held["clear"] == [(f, "sink") for f in range(18, 21)]


def test_a_recache_is_one_clean_pass_of_the_last_frames_under_the_new_prompt():
    """Without sinks that stay, nothing of the old prompt is left in the memory."""
    stream, other = (
        open_(memory="longlive(global_sink=False)"),
        open_("a blue cube", memory="longlive(global_sink=False)"),
    )
    take(stream, 6)
    take(other, 6)
    other._clean, other._decoder = stream._clean, stream._decoder  # the same pictures, made under another prompt
    for one in (stream, other):
        one.ask("a blue ball", how="recache")
    assert np.array_equal(take(stream, 3), take(other, 3))


def test_with_the_same_prompt_recache_changes_the_memory_of_a_joint_pass_only():
    """Chunk by chunk and causally it would give the same; together, frames of several chunks see one another both ways."""
    stream, other = open_(memory="longlive(window=12)"), open_(memory="longlive(window=12)")
    take(stream, 1)
    take(other, 1)
    stream.ask("a red ball", how="recache")
    assert np.array_equal(take(stream, 1), take(other, 1))  # one chunk: the joint pass is the pass it was


def test_a_switch_asked_for_at_a_frame_comes_with_the_next_chunk_and_one_a_chunk():
    stream = open_()
    stream.ask("a blue ball", at=40)
    stream.ask("a blue cube", at=41)
    prompts = {3 * n: stream.step().prompt for n in range(17)}
    changes = [f for f in prompts if f and prompts[f] != prompts.get(f - 3, "a red ball")]
    assert changes == [42, 45] and (prompts[39], prompts[42], prompts[45]) == (
        "a red ball",
        "a blue ball",
        "a blue cube",
    )


def test_a_change_that_cannot_be_made_is_told_once_and_the_stream_goes_on(monkeypatch):
    stream, other = open_(memory="longlive(window=12)"), open_(memory="longlive(window=12)")
    take(stream, 2), take(other, 2)
    stream.ask("a blue cube", how="recache")

    def fails(*args, **options):
        raise ValueError("cannot be computed anew")

    with monkeypatch.context() as patch:
        patch.setattr(stream._engine, "know", fails)
        with pytest.raises(ValueError, match="computed anew"):
            stream.step()
    assert stream.prompt == "a red ball"
    assert np.array_equal(take(stream, 2), take(other, 2))


def test_a_transition_takes_its_time_and_a_blend_is_between():
    stream = open_()
    take(stream, 2)
    stream.ask({"a blue cube": 3, "a red ball": 1}, over=2.0)
    said = [stream.step().prompt for _ in range(4)]
    assert said[0].startswith("72% a red ball") and said[-1] == "75% a blue cube + 25% a red ball"
    both = {"a red ball": 0.5, "a blue cube": 0.5}
    assert not np.array_equal(take(open_(both), 2), take(open_(), 2))
    assert np.array_equal(take(open_({"a red ball": 2.0}), 2), take(open_(), 2))


def test_slerp_goes_around():
    ways = []
    for way in ("linear", "slerp"):
        stream = open_()
        stream.ask("a blue cube", over=3.0, way=way)
        ways.append(take(stream, 2))
    assert not np.array_equal(*ways)


def test_what_is_drawn_shows_until_it_is_erased_and_only_when_it_is_there():
    stream, other = open_(), open_()
    take(stream, 2), take(other, 2)
    late = stream.draw([(10.0, 3, 3), (12.0, 12, 12)])
    assert np.array_equal(take(stream, 1), take(other, 1))
    stream.erase(late)
    number = stream.draw([(0.0, 5, 5)])
    twin = stream.fork()
    twin.erase(number)
    assert not np.array_equal(take(stream, 1), take(other, 1)) and stream.seconds == other.seconds
    assert np.array_equal(take(twin, 1), take(open_(), 4)[-12:])


def test_a_track_that_is_dragged_for_ever_stays_short():
    stream = open_()
    number = stream.draw([(0.0, 5, 5)])
    for n in range(1, 120):
        stream.draw([(n / 4, 5 + n % 7, 5)], id=number)
        if n % 3 == 0:
            stream.step()
    assert len(stream._tracks) == 1 and len(stream._tracks[0].points) < 60


def test_an_image_is_the_first_frame_and_a_video_is_gone_on_from():
    image = picture(3)
    shown = open_()
    shown.show(image)
    assert (shown.position, shown.frames) == (1, 1)
    chunk = shown.step()
    assert chunk.first == 1 and len(chunk.frames) == 12
    assert not np.array_equal(chunk.frames, take(open_(), 2)[9:21])
    watched = open_()
    watched.watch(image[None])
    assert np.array_equal(watched.step().frames, chunk.frames)
    video = picture(4, 21)
    at_once, pieces = open_(), open_(memory="longlive")
    at_once.watch(video)
    pieces.watch(video[:9])
    pieces.watch(video[9:])
    assert at_once.position == pieces.position == 6 and at_once.held() == pieces.held()
    assert np.array_equal(take(at_once, 2), take(pieces, 2))


def test_going_on_from_a_video_is_a_clean_pass_chunk_by_chunk():
    """A stream that watches what another has made goes on nearly as that one: it knows the pictures, coded once more."""
    stream = open_()
    video = take(stream, 4)
    latents, _ = small().codec.encode(from_pixels(video))
    other = open_()
    other.watch(video)
    assert float((torch.stack(other._clean) - latents[0, -12:]).abs().max()) < 1e-6
    assert other.held() == stream.held()


def test_a_restyled_video_follows_what_it_watches():
    video = picture(5, 40)
    weak, strong = open_(strength=0.05), open_(strength=1.0)
    for stream in (weak, strong):
        stream.watch(video[:10])
        assert len(stream.step().frames) == 9
        with pytest.raises(ValueError, match="watch 21 frames before this chunk; 10 were watched"):
            stream.step()
        stream.watch(video[10:33])
        assert len(stream.step().frames) == 12
    codec = small().codec
    coded = to_pixels(codec.decode(codec.encode(from_pixels(video[:21]))[0])[0]).astype(int)

    def distance(strength):
        stream = open_(strength=strength)
        stream.watch(video[:21])
        return np.abs(take(stream, 2).astype(int) - coded).mean()

    assert distance(0.05) < 0.5 * distance(1.0)
    nothing = open_(strength=1.0)
    nothing.watch(video[:21])
    assert np.array_equal(take(nothing, 2), take(open_(), 2))


def test_a_replay_shows_images_and_finds_videos(tmp_path):
    stream = open_()
    stream.watch(picture(4, 9))
    take(stream, 1)
    expected = take(stream, 1)
    told = json.loads(json.dumps(stream.history))
    again = open_()
    list(replay(again, told, videos=lambda entry: picture(4, 9)))
    take(again, 1)
    assert np.array_equal(take(again, 1), expected)
    with pytest.raises(ValueError, match="not the video"):
        list(replay(open_(), told, videos=lambda entry: picture(5, 9)))
    with pytest.raises(ValueError, match="give `videos`"):
        list(replay(open_(), told))
    with pytest.raises(ValueError, match="fresh"):
        list(replay(again, told))
    image = open_()
    image.show(picture(1))
    other = open_()
    list(replay(other, json.loads(json.dumps(image.history))))
    assert np.array_equal(take(image, 1), take(other, 1))


@pytest.mark.parametrize(("wrong", "word"), [
    (lambda s: s.ask(5), "a text"), (lambda s: s.ask({"a": -1}), "weight"), (lambda s: s.ask({}), "a text"),
    (lambda s: s.ask("a ball", how="foo"), "one of keep"), (lambda s: s.ask("a ball", how="anchored"), "anchor-forcing"),
    (lambda s: s.ask("a ball", over=-1), "seconds"), (lambda s: s.ask("a ball", way="round"), "linear"),
    (lambda s: s.ask("a ball", at=1), "from 6 on"), (lambda s: s.draw([]), "one point"),
    (lambda s: s.draw([(0, 99, 99)]), "inside"), (lambda s: s.draw([(1, 2, 2), (0, 2, 2)]), "in time"),
    (lambda s: s.draw([(0, "x", 2)]), "points"), (lambda s: s.erase(7), "no track"),
    (lambda s: s.show(picture()), "before the first chunk"), (lambda s: s.watch(picture(0, 9)), "before the first chunk"),
    (lambda s: s.show(np.zeros((16, 16, 3))), "uint8"), (lambda s: s.watch(picture()[None, :8]), "16×16"),
])  # fmt: skip
def test_bad_input_is_refused_and_changes_nothing(wrong, word):
    stream = open_()
    take(stream, 2)
    told, twin = len(stream.history), stream.fork()
    with pytest.raises((ValueError, TypeError), match=word):
        wrong(stream)
    assert len(stream.history) == told and np.array_equal(take(stream, 2), take(twin, 2))


@pytest.mark.parametrize("schedule", ["chunks", "rolling", "batch", "buffer(0, 4, 2, 1)", "knots"])
def test_a_step_that_fails_leaves_the_stream_as_it_was(schedule, monkeypatch):
    """Whichever network call, or the decoder, is interrupted."""
    stream = open_(schedule=schedule)
    take(stream, 3)
    stream.ask("a blue cube")
    expected, model = take(stream.fork(), 2), small()
    codec, network = model.codec.decode, type(model.transformer).forward
    for fatal in range(1, 7):
        calls = 0

        def broken(self, *args, fatal=fatal):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise KeyboardInterrupt
            return network(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(type(model.transformer), "forward", broken)
            twin = stream.fork()
            try:
                twin.step()
            except KeyboardInterrupt:
                pass
            else:
                continue
        assert np.array_equal(take(twin, 2), expected), fatal
    with monkeypatch.context() as patch:
        patch.setattr(model.codec, "decode", lambda *args: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            stream.step()
    assert model.codec.decode == codec and np.array_equal(take(stream, 2), expected)


@pytest.mark.parametrize(("options", "word"), [
    ({"memory": "streaming-llm"}, "memory of frames"), ({"memory": "longlve"}, "longlive"),
    ({"memory": None}, "has to be remembered"), ({"schedule": "chonks"}, "did you mean 'chunks'"),
    ({"schedule": "chunks(levels=0)"}, "levels is 0"), ({"schedule": "chunks(foo=1)"}, "does not take 'foo'"),
    ({"schedule": "chunks("}, "write chunks"), ({"memory": "longlive(frame=9)"}, "frames of 9 tokens"),
    ({"seed": "x"}, "seed"), ({"size": (15, 16)}, "multiple"), ({"strength": 2.0}, "strength"),
    ({"schedule": "buffer(0, 4, 2, 1)", "memory": "longlive"}, "leave the memory out"),
    ({"schedule": "rolling", "memory": "longlive"}, "window of longlive has 9"), ({"schedule": 3}, "a name such as"),
    ({"prompt": 3}, "a text"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_reason(options, word):
    with pytest.raises((ValueError, TypeError), match=word):
        open_(**options)


def test_other_sizes():
    stream = open_(size=(8, 24))
    assert stream.step().frames.shape == (9, 8, 24, 3)
    assert parse_schedule("chunks", chunk=2, levels=2).chunk == 2
