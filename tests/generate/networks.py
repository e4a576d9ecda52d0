"""Networks of frames without weights to train: one that treats frames alone, one in which all frames of a call meet."""

import torch


def separable(x, t, text=None, attend=None):
    """Every frame for itself: a fixed smooth function of its pixels, its time, and the text's number."""
    shift = 0.0 if text is None else text.view(-1, 1, 1, 1, 1).repeat_interleave(len(x) // len(text), 0)
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x.flip(-2) + t[..., None, None, None] / 700 + shift)


def mixing(x, t, text=None, attend=None):
    """The same, and the mean of all frames of the row added: everybody sees everybody, in both directions."""
    return separable(x, t, text) + 0.5 * torch.tanh(x).mean(1, keepdim=True)


class Recording:
    """Another network, and what it was asked: shapes and times."""

    def __init__(self, network):
        self.network, self.shapes, self.times = network, [], []

    def __call__(self, x, t, text, attend):
        self.shapes.append(tuple(x.shape[:2]))
        self.times.append(t.clone())
        return self.network(x, t, text, attend)
