"""CurveStream: frames get in where the path of their features bends or jumps."""

from typing import Literal

from ..memory.admission import Curvature, Door
from .registry import register


@register(
    "curve-stream",
    paper="CurveStream: Boosting Streaming Video Understanding in MLLMs via Curvature-Aware Hierarchical Visual Memory Management, arXiv 2603.19571",
    claims=("admission",),
)
def curve_stream(
    *, lam: float = 0.2, k1: float = 0.0, k2: float = 1.0, gamma: float = 0.95, warm: Literal["first", "zero"] = "first",
    eps_noise: float = 0.0,
) -> Door:  # fmt: skip
    """Frames far over the running mean of motion and bend get in whole, those a little over it in low resolution.

    lam: weight of the bend; k1, k2: deviations over the mean from which on a frame is fuzzy, or clear; gamma: how slowly
    mean and deviation forget; eps_noise: how far noise moves a feature, 0 as published. Which frames stay:
    `evenflow.memory.admission.Fifo`.
    """
    return Door(lets=Curvature(lam, k1, k2, gamma, warm, eps_noise))
