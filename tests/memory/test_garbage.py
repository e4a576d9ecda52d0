"""A step that is over is gone at once: nothing that it copied waits for Python's collector of cycles."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from evenflow.recipes import parse

FRAMES = ("longlive(window=6, sink=2)", "reward-forcing", "deep-forcing", "hybrid-forcing", "temp-cache", "forcing-kv")
TOKENS = ("streaming-llm(sink=2, window=6)", "live-vlm", "rekv", "v-rex")


@pytest.mark.parametrize("memory", [*FRAMES, *TOKENS])
@pytest.mark.parametrize("commit", [True, False])
def test_nothing_of_a_step_is_left(memory, commit):
    frame, layers, heads, dim = 6 if memory in FRAMES else 1, 2, 2, 8
    described = parse(memory)
    state = (replace(described, frame=frame) if frame > 1 else described).build(
        layers=layers, heads=heads, head_dim=dim, dtype=torch.float32
    )
    m = 3 * frame
    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            with state.step(m, commit=commit) as step:
                for layer in range(layers):
                    state.attend(layer, *torch.randn(3, 1, heads, m, dim))
            gone = weakref.ref(step)
            del step
            assert gone() is None
    finally:
        gc.enable()
