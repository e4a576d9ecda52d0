"""Every recipe once more, as its paper defines it: plain loops in float64, one query at a time.

`reference.longlive.reference(layers, rope, frame=4, ...)` takes what a model would hand to the memory of one stream and
returns what attention must give. Nothing here is fast, and nothing here shares code with the memory: that is the point.
"""

from .plain import Call, attention, rotated

__all__ = ["Call", "attention", "rotated"]
