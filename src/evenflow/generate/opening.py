"""What a video stream is made of: a model, a memory, a schedule, and whether they go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..memory import Averaged, Memory
from ..models.video import VideoConfig
from ..models.video.model import VideoModel
from ..recipes import parse, recipes
from .composing import compatible, parse_schedule, sampler_of
from .engine import Engine
from .flow import Flow, Sampler
from .guidance import Guidance
from .moving import Batch, Buffer, Rolling
from .pacing import NoiseControl
from .schedule import Knots, Schedule

TRAINED = 21  # latent frames that are kept for computing an unbounded memory anew


@dataclass(frozen=True)
class Opened:
    """A composition that has been checked."""

    memory: Memory | None
    schedule: Schedule
    sampler: Sampler
    guidance: Guidance | None
    seed: int
    size: tuple[int, int]
    strength: float | None
    control: NoiseControl | None

    def engine(self, model: VideoModel) -> Engine:
        """An engine with an empty memory. Raises ValueError where the memory does not serve this model."""
        config, weight = model.config, next(model.transformer.parameters())
        latent = config.latent_size(self.size)
        tokens = latent[0] // config.patch[1], latent[1] // config.patch[2]
        state = None
        if self.memory is not None:
            framed = replace(self.memory, frame=tokens[0] * tokens[1]) if self.memory.frame is None else self.memory
            if framed.frame != tokens[0] * tokens[1]:
                raise ValueError(
                    f"{framed.name} has frames of {framed.frame} tokens, this model of {tokens[0] * tokens[1]}; "
                    "leave out frame="
                )
            state = framed.build(
                layers=config.layers, heads=config.heads, head_dim=config.head_dim, rope=model.transformer.rope,
                dtype=weight.dtype, device=weight.device,
            )  # fmt: skip
        return Engine(
            model.transformer, self.sampler, (config.out_channels, *latent), seed=self.seed, memory=state, tokens=tokens,
            extra=config.in_channels - config.out_channels, slots=isinstance(self.schedule, Batch) and self.schedule.slots,
            segments=self.memory is not None and self.memory.name == "anchor-forcing", guidance=self.guidance,
            device=weight.device,
        )  # fmt: skip

    @property
    def keeps(self) -> int:
        """Clean latents that are kept for computing the memory anew."""
        if self.memory is None or self.memory.rows > 1:
            return 0
        if isinstance(self.memory.fold, Averaged):
            return self.memory.window or TRAINED  # the average of what has left stays as it is
        return self.memory.capacity or TRAINED


def usual_memory(schedule: Schedule) -> str | None:
    """The memory that a schedule was published with, or the everyday one."""
    if isinstance(schedule, Rolling):
        return "rolling-forcing"
    if isinstance(schedule, Buffer) or (isinstance(schedule, Batch) and not schedule.first):
        return None
    if isinstance(schedule, Batch):
        return f"streamdiffusion-v2(steps={schedule.levels})"
    return "self-forcing" if isinstance(schedule, Knots) else "longlive(window=12, sink=3)"


def memory_for_video(memory: str | Memory | None, schedule: Schedule) -> Memory | None:
    """The memory that is meant; "default": the schedule's own. Raises ValueError where it does not go with it."""
    if memory is not None and not isinstance(memory, (str, Memory)):
        raise TypeError(
            f"memory is a {type(memory).__name__}; expected a spec such as 'longlive(window=12)' or a Memory"
        )
    named = usual_memory(schedule) if memory == "default" else memory
    chosen = parse(named) if isinstance(named, str) else named
    if (reason := compatible(schedule, chosen)) is not None:
        fit = [info.name for info in recipes("memory") if compatible(schedule, parse(info.name)) is None]
        hint = f" (with this schedule go {', '.join(fit)})" if fit else ""
        raise ValueError(f"{type(schedule).__name__.lower()}: {reason}{hint}")
    return chosen


def opened(
    model: VideoModel, memory: str | Memory | None, schedule: str | Schedule, seed: int,
    guidance: Guidance | float | None, size: tuple[int, int] | None, strength: float | NoiseControl | None,
) -> Opened:  # fmt: skip
    """Check everything that can be wrong before anything is made. Raises TypeError or ValueError with what to do."""
    config = model.config
    if isinstance(schedule, str):
        schedule = parse_schedule(schedule, **_defaults(schedule, config))
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is {schedule!r}; expected a name such as 'chunks', or a Schedule")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be a whole number")
    size = (int(size[0]), int(size[1])) if size is not None else config.size
    config.latent_size(size)
    sampler = sampler_of(schedule, tuple(config.steps), config.shift)
    control = strength if isinstance(strength, NoiseControl) else None
    strength = strength.most if isinstance(strength, NoiseControl) else strength
    if strength is not None:
        if not isinstance(strength, (int, float)) or isinstance(strength, bool) or not 0 < strength <= 1:
            raise ValueError(f"strength is {strength!r}; it must lie in (0, 1]: 1 keeps nothing of what is watched")
        sampler = weaker(sampler, strength)
    by = Guidance("full", float(guidance)) if isinstance(guidance, (int, float)) else guidance
    chosen = memory_for_video(memory, schedule)
    return Opened(chosen, schedule, sampler, by, seed, size, strength, control)


def _defaults(spec: str, config: VideoConfig) -> dict[str, Any]:
    """What a model says of a schedule that does not say it itself."""
    name = spec.partition("(")[0].strip()
    if name == "batch":
        return {}
    return {"chunk": config.chunk} | ({} if name == "rolling" else {"levels": len(config.steps)})


def weaker(sampler: Sampler, strength: float) -> Sampler:
    """The levels of a video that is restyled: it begins at noise level `strength`, the others in proportion."""
    if not isinstance(sampler, Flow):
        return sampler
    return replace(sampler, sigmas=tuple(strength * s for s in sampler.sigmas), times=())
