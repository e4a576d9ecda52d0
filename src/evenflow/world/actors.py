"""How things move: one actor a thing, stepped frame by frame.

Positions are in units of the shorter side of the view, x to the right and y downwards from the upper left corner. Things
keep company with the camera: they move in the view, and the world passes behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .scene import Thing
from .words import COLOURS, SHAPES, SIZES, TEXTURES

BLEND = 10  # frames that a change takes to be complete
NOTES = (110.0, 146.0, 196.0, 262.0, 330.0)  # Hz, the lowest note of each thing in turn
HUM = 320.0  # Hz that a hum rises with a speed of one view a second
OUT = 1.36  # radii from its centre beyond which a thing has left the picture


def radius_of(size: str) -> float:
    return SIZES[size] / 64


def ease(step: int) -> float:
    """How much of a change is done `step` frames after it began: 0 before, 1 from BLEND on, smooth between."""
    t = min(max(step / BLEND, 0.0), 1.0)
    return t * t * (3 - 2 * t)


@dataclass
class Actor:
    """One thing on its way. number: never used twice in a world; depth: never changes, so that order does not either."""

    number: int
    thing: Thing
    x: float
    y: float
    depth: float
    speed: float
    heading: float  # radians, 0 to the right
    turn: float  # radians a second while it spins
    born: int
    vx: float = 0.0
    vy: float = 0.0
    angle: float = 0.0
    goal: tuple[float, float] = (0.5, 0.5)
    grows: bool = False
    dies: int | None = None
    before: Thing = field(init=False)
    changed: int = -BLEND
    since: int = 0  # the frame when it took up its motion
    phase: float = 0.0  # of its hum, in turns

    def __post_init__(self) -> None:
        self.before = self.thing
        self.since = self.born

    def pitch(self) -> float:
        """Of its hum, in Hz: the faster, the higher; each thing has its own lowest note."""
        return NOTES[self.number % len(NOTES)] + HUM * math.hypot(self.vx, self.vy)

    def become(self, thing: Thing, frame: int) -> None:
        if thing == self.thing:
            return
        if thing.motion != self.thing.motion:
            self.since = frame
        self.before, self.thing, self.changed = self.thing, thing, frame

    def done(self, frame: int) -> float:
        return ease(frame - self.changed)

    def radius(self, frame: int) -> float:
        done = self.done(frame)
        radius = radius_of(self.before.size) * (1 - done) + radius_of(self.thing.size) * done
        if self.grows:
            radius *= ease(frame - self.born + 1)
        if self.dies is not None:
            radius *= 1 - ease(frame - self.dies)
        return radius

    def look(self, frame: int) -> tuple[float, ...]:
        """The columns of a stretch's table of actors: see `stage`."""
        done = self.done(frame)
        before, now = COLOURS[self.before.colour], COLOURS[self.thing.colour]
        rgb = (a + (b - a) * done for a, b in zip(before, now, strict=True))
        shapes = SHAPES.index(self.before.shape), SHAPES.index(self.thing.shape)
        textures = TEXTURES.index(self.before.texture), TEXTURES.index(self.thing.texture)
        place = self.x, self.y, self.angle, self.radius(frame)
        return (*place, *rgb, *shapes, *textures, done, self.vx, self.vy, self.phase)


@dataclass(frozen=True)
class Happening:
    """Something that happened within a step. time: seconds; things: numbers of the actors; value: how hard."""

    time: float
    kind: str
    things: tuple[int, ...]
    value: float = 0.0


def wish(
    actor: Actor, others: list[Actor], width: float, height: float, time: float, frame: int, fps: float
) -> tuple[float, float]:
    """The velocity that the actor's motion asks for now."""
    motion, r = actor.thing.motion, radius_of(actor.thing.size)
    if motion == "drift left":
        return -actor.speed * 0.55, 0.0
    if motion == "drift right":
        return actor.speed * 0.55, 0.0
    if motion in ("bounce", "collide"):
        fast = math.hypot(actor.vx, actor.vy)
        if fast < 0.3 * actor.speed:
            return math.cos(actor.heading) * actor.speed, math.sin(actor.heading) * actor.speed
        vx, vy = actor.vx / fast * actor.speed, actor.vy / fast * actor.speed
        if abs(vy) < 0.25 * actor.speed:  # never quite level, never quite upright: it shall visit all borders
            vy = math.copysign(0.25 * actor.speed, vy)
        if abs(vx) < 0.25 * actor.speed:
            vx = math.copysign(0.25 * actor.speed, vx)
        return vx, vy
    if motion == "leave" and frame - actor.since > 1.2 * fps:
        return math.copysign(actor.speed, math.cos(actor.heading)), 0.0
    if motion == "hide":
        nearer = [other for other in others if other.depth < actor.depth and other.dies is None]
        if nearer:
            partner = nearer[-1]
            gx = partner.x + (partner_radius(partner) + r) * 0.9 * math.sin(2.1 * time + actor.heading)
            return (gx - actor.x) * 4 + partner.vx, (partner.y - actor.y) * 4 + partner.vy
    inside = (min(max(actor.goal[0], r), width - r), min(max(actor.goal[1], r), height - r))
    gx, gy = inside[0] - actor.x, inside[1] - actor.y
    far = math.hypot(gx, gy)
    pace = min(1.6 * far, actor.speed)
    return (gx / far * pace, gy / far * pace) if far > 1e-9 else (0.0, 0.0)


def partner_radius(actor: Actor) -> float:
    return radius_of(actor.thing.size)


def advance(actors: list[Actor], width: float, height: float, frame: int, fps: float) -> list[Happening]:
    """Move all actors from `frame` to the next; what happened on the way, in order of time."""
    dt, time = 1 / fps, frame / fps
    happened: list[Happening] = []
    wishes = [wish(actor, [o for o in actors if o is not actor], width, height, time, frame, fps) for actor in actors]
    for actor, (wx, wy) in zip(actors, wishes, strict=True):
        blend = 1 - math.exp(-6 * dt)
        actor.vx += (wx - actor.vx) * blend
        actor.vy += (wy - actor.vy) * blend
        was = (actor.x, actor.y)
        actor.phase = (actor.phase + actor.pitch() * dt) % 1.0
        actor.x += actor.vx * dt
        actor.y += actor.vy * dt
        if actor.thing.motion == "spin":
            actor.angle += actor.turn * dt
        elif actor.angle:  # upright again, the short way
            actor.angle = (actor.angle + math.pi) % (2 * math.pi) - math.pi
            actor.angle *= math.exp(-3 * dt)
            actor.angle = 0.0 if abs(actor.angle) < 1e-3 else actor.angle
        if actor.thing.motion in ("bounce", "collide"):
            happened += _bounced(actor, width, height, frame, time, dt)
        elif actor.thing.motion in ("drift left", "drift right"):
            reach = OUT * actor.radius(frame)
            if actor.vx < 0 and actor.x < -reach:
                actor.x += width + 2 * reach
            elif actor.vx > 0 and actor.x > width + reach:
                actor.x -= width + 2 * reach
        happened += _crossed(actor, was, width, frame, time, dt)
    happened += _collided(actors, width, height, frame, time, dt)
    return sorted(happened, key=lambda happening: (happening.time, happening.kind, happening.things))


def _bounced(actor: Actor, width: float, height: float, frame: int, time: float, dt: float) -> list[Happening]:
    """Turn back at the borders, at the instant they were met."""
    r = actor.radius(frame + 1)
    happened = []
    for axis, limit in (("x", width), ("y", height)):
        place, speed = getattr(actor, axis), getattr(actor, "v" + axis)
        for border, outwards in ((r, -1.0), (limit - r, 1.0)):
            beyond = (place - border) * outwards
            if beyond > 0 and speed * outwards > 0:
                late = min(beyond / abs(speed), dt)
                setattr(actor, "v" + axis, -speed)
                # Whoever came from far outside is not thrown across the picture.
                setattr(
                    actor, axis, border - outwards * late * abs(speed) if beyond < abs(speed) * dt + 1e-12 else place
                )
                if beyond < abs(speed) * dt + 1e-12:
                    happened.append(Happening(time + dt - late, "bounce", (actor.number,), abs(speed)))
                break
    return happened


def _crossed(
    actor: Actor, was: tuple[float, float], width: float, frame: int, time: float, dt: float
) -> list[Happening]:
    """Entering and leaving at the left and right border, told by the centre."""
    inside_before, inside = 0 <= was[0] <= width, 0 <= actor.x <= width
    if (
        inside_before == inside or not actor.vx or not actor.radius(frame + 1)
    ):  # a thing that has shrunk away crosses nothing
        return []
    border = 0.0 if min(was[0], actor.x) < 0 else width
    share = min(max((border - was[0]) / (actor.vx * dt), 0.0), 1.0)
    return [Happening(time + share * dt, "enter" if inside else "leave", (actor.number,), abs(actor.vx))]


def _collided(actors: list[Actor], width: float, height: float, frame: int, time: float, dt: float) -> list[Happening]:
    """Elastic collisions of discs, pair by pair; a disc's mass goes with its area."""
    movers = [actor for actor in actors if actor.thing.motion == "collide"]
    happened = []
    for i, a in enumerate(movers):
        for b in movers[i + 1 :]:
            ra, rb = a.radius(frame + 1), b.radius(frame + 1)
            dx, dy = b.x - a.x, b.y - a.y
            far = math.hypot(dx, dy)
            if far >= ra + rb or far < 1e-9 or not ra * rb:
                continue
            nx, ny = dx / far, dy / far
            closing = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
            if closing <= 0:
                continue
            ma, mb = ra * ra, rb * rb
            push = 2 * closing / (ma + mb)
            a.vx, a.vy = a.vx - push * mb * nx, a.vy - push * mb * ny
            b.vx, b.vy = b.vx + push * ma * nx, b.vy + push * ma * ny
            late = min((ra + rb - far) / closing, dt)
            # Each goes the time since they met at its new speed.
            a.x, a.y = a.x - push * mb * nx * late, a.y - push * mb * ny * late
            b.x, b.y = b.x + push * ma * nx * late, b.y + push * ma * ny * late
            happened.append(Happening(time + dt - late, "collide", (a.number, b.number), closing))
    return happened


def cast(
    thing: Thing,
    number: int,
    others: list[Actor],
    width: float,
    height: float,
    frame: int,
    seed: int,
    fresh: bool,
    fps: float,
) -> Actor:
    """A new actor. fresh: it is there from the first frame on, else it grows (or comes in, if its motion is to enter)."""
    random = np.random.default_rng((seed, 1, number))
    r = radius_of(thing.size)
    best, x, y = -math.inf, 0.5, 0.5
    for _ in range(12):  # the most lonely of a few places
        px = r + random.random() * (width - 2 * r)
        py = r + random.random() * (height - 2 * r)
        room = min((math.hypot(px - o.x, py - o.y) - r - radius_of(o.thing.size) for o in others), default=1.0)
        if room > best:
            best, x, y = room, px, py
        if best > 0.05:
            break
    depth = 1.0 + 0.4 * random.random() + (0.5 if thing.motion == "hide" else 0.0)
    speed = 0.38 + 0.2 * random.random()
    heading = 2 * math.pi * random.random()
    turn = math.copysign(1.5 + 1.5 * random.random(), random.random() - 0.5)
    actor = Actor(number, thing, x, y, depth, speed, heading, turn, frame, goal=(x, y))
    if thing.motion == "enter":
        actor.x = -OUT * r if random.random() < 0.5 else width + OUT * r
    else:
        actor.grows = not fresh
    if thing.motion in ("bounce", "collide"):
        diagonal = math.pi / 4 * (1 + 2 * int(heading / (math.pi / 2)))
        actor.heading = diagonal + 0.6 * (random.random() - 0.5)
    if fresh or thing.motion == "enter":
        actor.vx, actor.vy = wish(actor, others, width, height, frame / fps, frame, fps)
    return actor
