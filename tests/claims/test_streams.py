"""The made-up streams are what they say they are."""

from dataclasses import replace

import pytest
import torch

from evenflow.claims.streams import PICTURE, WORD, Frames
from evenflow.memory import Absolute, Memory, MemoryState, Never, Oldest

STREAM = Frames(seed=3, frame=12, watched=(7,))


def test_a_stream_is_the_same_however_it_is_cut():
    whole = STREAM.step(4, 6)
    parts = [STREAM.step(4, 1), STREAM.step(5, 3), STREAM.step(8, 2)]
    for layer, tensors in enumerate(whole.layers):
        for place, tensor in enumerate(tensors):
            assert torch.equal(tensor, torch.cat([part.layers[layer][place] for part in parts], 2))
    for name, tag in whole.tags.items():
        assert torch.equal(tag, torch.cat([part.tags[name] for part in parts]))
    assert whole.m == 72 and whole.layers[0][0].shape == (1, 4, 72, 64) and whole.layers[0][1].shape == (1, 2, 72, 64)
    assert not torch.equal(replace(STREAM, seed=4).step(4, 6).layers[0][0], whole.layers[0][0])


def test_frames_of_a_scene_are_alike_and_scenes_return():
    stream = Frames(first=5, scene=10, scenes=2, needle_every=1000, wander=0)

    def alike(a: int, b: int) -> float:
        return float(torch.cosine_similarity(*(stream.step(t, 1).layers[0][1].flatten() for t in (a, b)), dim=0))

    assert alike(1, 2) > 0.85 and alike(5, 14) > 0.85
    assert abs(alike(4, 5)) < 0.2 and alike(4, 15) > 0.8
    assert [stream.scene_at(t) for t in (0, 4, 5, 14, 15)] == [0, 0, 1, 1, 2]


def test_keys_drift_and_queries_do_not():
    stream = Frames(scene=10_000, first=10_000, drift=0, noise=0, wander=2, needle_every=1000)
    near, far = stream.step(1, 1).layers[0], stream.step(1 + 120, 1).layers[0]
    assert torch.equal(near[0], far[0]) and torch.equal(near[2], far[2])
    assert float((near[1] - far[1]).abs().mean()) > 1


def test_needles_have_channels_of_their_own():
    step, quiet = STREAM.step(6, 2), slice(STREAM.loud, None)
    detail, word, watched = STREAM.needle("detail", 6), STREAM.needle("word", 6), STREAM.needle("watched", 7)
    places = sorted([detail.place, word.place, STREAM.frame + watched.place])
    assert word.place == 0 < detail.place < watched.place
    for layer, (_, k, v) in enumerate(step.layers):
        for tensor in (k, v):
            assert (tensor[..., quiet].abs().amax((0, 1, 3)) > 0).nonzero()[:, 0].tolist() == places
        assert torch.allclose(v[0, 0, detail.place, quiet].norm(), torch.tensor(float(STREAM.loud)).sqrt())
        assert torch.cosine_similarity(k[0, 1, detail.place, quiet], detail.key[layer], dim=0) > 0.999
    assert step.tags["modality"].tolist().index(WORD) == 0 and int((step.tags["modality"] == WORD).sum()) == 1
    later = STREAM.step(8, 1).layers[0][0]
    assert torch.cosine_similarity(later[0, 0, -1, quiet], watched.key[0], dim=0) > 0.999
    with pytest.raises(ValueError, match="frame 7 has no detail; there is one every 3 frames"):
        STREAM.needle("detail", 7)


def test_a_question_asks_for_one_thing_and_brings_nothing():
    needle = STREAM.needle("detail", 3)
    question = STREAM.question(9, 3, needle)
    assert set(question.tags["modality"].tolist()) == {PICTURE}
    for _, k, v in question.layers:
        assert float(k[..., STREAM.loud :].abs().max()) == float(v[..., STREAM.loud :].abs().max()) == 0


def read(memory: Memory, stream: Frames, frames: int) -> MemoryState:
    state = memory.build(**stream.geometry())
    for start in range(0, frames, 3):
        step = stream.step(start, 3)
        with state.step(step.m, step.tags):
            for layer, tensors in enumerate(step.layers):
                state.attend(layer, *tensors)
    return state


@pytest.mark.parametrize("window", [None, 6])
def test_what_is_held_is_recalled_and_nothing_else(window):
    evict = Never() if window is None else Oldest(with_fresh=True)
    state = read(Memory(window=window, evict=evict, place=Absolute(), frame=12, inside="both"), STREAM, 30)
    for kind, frame in [("detail", 27), ("detail", 3), ("word", 0), ("watched", 7)]:
        needle = STREAM.needle(kind, frame)
        question = STREAM.question(30, 3, needle)
        with state.step(question.m, question.tags, commit=False):
            outputs = [state.attend(layer, *tensors) for layer, tensors in enumerate(question.layers)]
        recalled = STREAM.recalled(needle, outputs)
        assert recalled > 0.99 if window is None or frame == 27 else abs(recalled) < 0.3
