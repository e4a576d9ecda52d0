"""The benchmark of video: what it counts is what is done, and without a GPU it says so."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import video
from benchmarks.showing import figure, tables
from evenflow.models.video import PRESETS, random_model

CONFIG = replace(PRESETS["wan2.1-1.3b"], **video.REDUCED)
STATIC = repr(((0, 1),) * CONFIG.layers)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, vae_dim=4)


@pytest.mark.parametrize(
    ("memory", "frames"), [("longlive(window=12, sink=3)", 12), ("self-forcing(window=6)", 6), ("self-forcing(window=3)", 3)]
)  # fmt: skip
def test_operations_are_counted_as_they_happen(model, memory, frames):
    with torch.no_grad():
        loop = video.Loop(model, memory, model.transformer.read(model.encode_text(["a b"])))
        loop.fill()
        keys, tokens = loop.keys(), CONFIG.tokens(CONFIG.latent_size())
        assert keys == frames * tokens
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the only one it counts on a CPU
            loop.call(500.0, False)
    work = video.network_work(model.transformer, 3, CONFIG.latent_size(), keys)
    assert work.flops == counter.get_total_flops()
    # The least that is moved: weights, held keys and values, those of the text, latents.
    assert work.nbytes > 4 * sum(p.numel() for p in model.transformer.blocks.parameters())
    assert work.nbytes > 4 * 2 * CONFIG.layers * CONFIG.dim * keys


def test_heads_that_hold_less_attend_less(model):
    with torch.no_grad():
        loop = video.Loop(model, f"forcing-kv(static={STATIC})", model.transformer.read(model.encode_text(["a b"])))
        loop.fill()
        tokens = CONFIG.tokens(CONFIG.latent_size())
        # Every head: the first and the last frame, and the chunk itself. Half the heads above layer 0: a frame more.
        assert loop.keys() == tokens * (5 + 5.5) / 2


def test_a_floor_is_the_longer_of_arithmetic_and_traffic():
    machine = {"flops": 1e12, "bytes": 1e9}
    assert video.Work(2e12, 1e9).floor(machine) == 2 and video.Work(1e12, 5e9).floor(machine) == 5


def test_without_a_gpu_it_says_so(tmp_path):
    result = video.measure(device="cpu", chunks=1, memories=video.MEMORIES[:1], say=lambda text: None)
    assert "reduced" in result["title"] and result["device"].startswith("not measured on a GPU here")
    (row,) = result["memories"].values()
    assert set(row["milliseconds"]) == set(row["floor, milliseconds"]) == {
        video.DENOISING, video.CLEAN, video.DECODING, video.PARTS, video.STREAM
    }  # fmt: skip
    assert row["frames a chunk"] == 12
    for what, took in row["milliseconds"].items():
        assert took > 0 and row["floor, milliseconds"][what] > 0
    assert row["frames a second"][video.PARTS] == pytest.approx(12e3 / row["milliseconds"][video.PARTS])
    (table,) = tables("video", result)
    assert table.row_count == 5 and "not measured on a GPU here" in str(table.caption)
    figure({"video": result}, tmp_path / "video.png")
    assert (tmp_path / "video.png").read_bytes().startswith(b"\x89PNG")
