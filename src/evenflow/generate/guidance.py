"""Guidance: away from what one does not want, with a second evaluation, a single one, or none at all.

Residual guidance (StreamDiffusion, arXiv 2312.12491, section on RCFG) replaces the prediction without the prompt by the
one that would lead back to a known clean latent, the *anchor* of a frame: its input (self), or what the network makes
of its first noisy latent under the negative prompt (onetime). The paper carries that prediction from slot to slot as a
stock of noise; here the anchor is kept and the prediction computed from it, which is the same number, and has nothing
to shift: one slot cannot drift. For flow matching the velocity that leads back is (x − z)/σ (not in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Mode = Literal["self", "onetime", "full"]


@dataclass(frozen=True)
class Guidance:
    """How the network's output is changed: δ·s + γ·(out − δ·s), where s leads to the anchor; "full": s is the output
    under the negative prompt, and δ is 1.

    scale: γ; 1 or less is no guidance. Rows of a call of n: n (self), n + 1 where a frame enters (onetime), 2n (full).
    """

    mode: Mode = "self"
    scale: float = 1.2
    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"guidance is {self.mode!r}; it must be one of {', '.join(get_args(Mode))}")

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.scale > 1

    def mix(self, out: Tensor, away: Tensor) -> Tensor:
        """The guided output."""
        away = away * self.delta if self.mode != "full" else away
        return away + self.scale * (out - away)


def joint(both: Tensor, text: Tensor, motion: Tensor, w_text: float = 3.0, w_motion: float = 1.5) -> Tensor:
    """A teacher's output guided by text and motion, from three evaluations: with both, with one alone.

    v = α·v(motion) + (1 − α)·v(text) + w_t·[v(both) − v(motion)] + w_m·[v(both) − v(text)], α = w_t/(w_t + w_m).
    Source: MotionStream, arXiv 2511.01266, section on joint guidance; its student needs none.
    """
    alpha = w_text / (w_text + w_motion)
    return alpha * motion + (1 - alpha) * text + w_text * (both - motion) + w_motion * (both - text)
