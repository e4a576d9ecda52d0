"""Wan's decoder arranged for a GPU: the same frames, the same things remembered."""

import pytest
import torch

from evenflow.models.video import wan_fused
from evenflow.models.video.wan_fused import fused

from . import nets
from .test_wan_vae import codec as single
from .test_wan_vae import in_pieces

CUTS = ([1, 3], [], [3, 6])


def codec():
    """In float64, where two arrangements differ by what diffusers rounds on the way, and by no kernel's own order of sums."""
    made = single()
    made.vae.double()
    return made


def noise(*shape):
    return nets.noise(*shape, dtype=torch.float64)


@pytest.mark.parametrize("cuts", CUTS)
def test_it_decodes_as_the_plain_arrangement_does(cuts):
    latents = noise(1, 8, 16, 4, 5)
    plain = in_pieces(codec().decode, latents, cuts)
    arranged = in_pieces(fused(codec()).decode, latents, cuts)
    torch.testing.assert_close(arranged, plain, rtol=1e-5, atol=1e-6)


def test_a_stream_goes_on_in_the_other_arrangement():
    latents, ours, plain = noise(2, 6, 16, 4, 5), fused(codec()), codec()
    first, state = plain.decode(latents[:, :2])
    same, own = ours.decode(latents[:, :2])
    torch.testing.assert_close(same, first, rtol=1e-5, atol=1e-6)
    assert {n: t.shape for n, t in own.features.items()} == {n: t.shape for n, t in state.features.items()}
    torch.testing.assert_close(
        ours.decode(latents[:, 2:], state)[0], plain.decode(latents[:, 2:], own)[0], rtol=1e-5, atol=1e-6
    )


def test_the_passes_are_compiled_once_for_all_sizes(monkeypatch):
    """Every size that compiles anew would stop a stream for seconds: three graphs are all there are."""
    counted = []

    def compiler(graph, inputs):
        counted.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(wan_fused.torch, "compile", lambda over, **how: compiled(over, backend=compiler, **how))
    monkeypatch.setattr(wan_fused, "compiles", lambda codec: True)
    torch._dynamo.reset()
    ours, plain = fused(codec()), codec()
    for size in ((4, 5), (5, 4)):
        latents = noise(1, 6, 16, *size)
        torch.testing.assert_close(
            in_pieces(ours.decode, latents, [2, 3]), in_pieces(plain.decode, latents, [2, 3]), rtol=1e-5, atol=1e-6
        )
    assert len(counted) == 3
