"""Whole streams over Wan's parts: network, autoencoder and memory together, forked, saved and gone on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evenflow.generate import VideoStream, resume_stream
from evenflow.models.video import VideoConfig, load_video, random_model

CONFIG = VideoConfig(
    "small",
    dim=48,
    ffn_dim=80,
    heads=4,
    layers=2,
    text_dim=12,
    text_len=9,
    freq_dim=32,
    size=(32, 48),
    steps=(1000, 500),
)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, vae_dim=4)


def video(stream, chunks):
    return np.concatenate([stream.step().frames for _ in range(chunks)])


def test_a_stream_of_wan_has_as_many_frames_and_every_seed_its_own(model):
    one = video(VideoStream(model, "a red ball", memory="longlive(window=6, sink=3)", seed=1), 4)
    assert one.shape == (9 + 3 * 12, 32, 48, 3) and one.dtype == np.uint8 and one.std() > 1
    again, other = (
        video(VideoStream(model, "a red ball", memory="longlive(window=6, sink=3)", seed=s), 4) for s in (1, 2)
    )
    assert (one == again).all() and (one != other).any()


def test_forked_saved_and_resumed_it_goes_on_bit_for_bit(model, tmp_path):
    stream = VideoStream(model, "a red ball", memory="longlive(window=6, sink=3)", seed=1)
    video(stream, 3)
    stream.save(tmp_path / "stream")
    twin, resumed = stream.fork(), resume_stream(model, tmp_path / "stream")
    whole = video(stream, 2)
    assert (video(twin, 2) == whole).all() and (video(resumed, 2) == whole).all()


def test_half_precision_runs_from_end_to_end():
    half = random_model(CONFIG, vae_dim=4, dtype=torch.bfloat16)
    assert video(VideoStream(half, "a red ball", memory="longlive(window=6, sink=3)"), 2).shape == (21, 32, 48, 3)


def test_a_loaded_model_streams(folder):
    loaded = load_video(folder)
    loaded = replace(loaded, config=replace(loaded.config, size=(32, 48), steps=(1000,)))
    assert video(VideoStream(loaded, "a red ball", memory="self-forcing(window=3)"), 2).shape == (21, 32, 48, 3)
