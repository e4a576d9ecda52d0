"""A video stream on disk: one safetensors file with JSON in it, written atomically, with a checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..memory import Memory, StateError, read_state, write_state
from ..models.video.codec import CodecState
from ..models.video.wan_vae import WanState
from . import composing
from .asking import Asked
from .guidance import Guidance
from .pacing import NoiseControl
from .prompts import Wish
from .schedule import Schedule
from .tracks import Track

if TYPE_CHECKING:
    from ..models.video.model import VideoModel
    from .stream import VideoStream

FORMAT = 1
SAMPLES = 64  # numbers looked at of a weight tensor
STATES = {kind.__name__: kind for kind in (CodecState, WanState)}
PLAIN = ("_turn", "_origin", "_since", "_position", "_next_id", "_watched", "_reference", "_level", "history")


def fingerprint(model: VideoModel) -> str:
    """SHA-256 over the configuration and evenly spaced samples of all weights; any training step changes it."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True, default=str).encode())
    parts = [model.transformer, model.codec, getattr(model.codec, "vae", None)]
    for part in parts:
        for name, tensor in part.state_dict().items() if isinstance(part, nn.Module) else ():
            flat = tensor.detach().reshape(-1)
            few = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.float64).cpu()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + few.numpy().tobytes())
    return digest.hexdigest()


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested states of codecs."""
    if isinstance(tree, Tensor):
        yield tree
    elif dataclasses.is_dataclass(tree):
        yield from tensors_of(vars(tree))
    elif isinstance(tree, Mapping):
        yield from (t for value in tree.values() for t in tensors_of(value))
    elif isinstance(tree, (list, tuple)):
        yield from (t for value in tree for t in tensors_of(value))


def flat(tree: Any, name: str, into: dict[str, Tensor]) -> Any:
    """What JSON can hold of a codec's state; tensors go to `into` and leave their names."""
    if isinstance(tree, Tensor):
        into[name] = tree
        return {"tensor": name}
    if dataclasses.is_dataclass(tree):
        kind = type(tree).__name__
        if kind not in STATES:
            raise StateError(f"a codec's state is a {kind}, which cannot be saved; there are {', '.join(STATES)}")
        return {"state": kind, "of": flat(dict(vars(tree)), name, into)}
    if isinstance(tree, Mapping):
        return {"map": [[key, flat(value, f"{name}.{key}", into)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"list": [flat(value, f"{name}.{n}", into) for n, value in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise StateError(f"a codec's state holds a {type(tree).__name__}, which cannot be saved")


def grown(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `flat` was given."""
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "state" in plain:
        return STATES[plain["state"]](**grown(plain["of"], tensors))
    if "map" in plain:
        return {key: grown(value, tensors) for key, value in plain["map"]}
    return [grown(value, tensors) for value in plain["list"]]


def write(stream: VideoStream, path: str | os.PathLike[str]) -> None:
    """Everything that a later stream needs to go on bit for bit."""
    engine, tensors = stream._engine, dict[str, Tensor]()
    codec = {name: flat(getattr(stream, f"_{name}"), name, tensors) for name in ("decoder", "encoder")}
    for name, latents in (
        ("flight", engine.flight), ("anchors", engine.anchors), ("entered", engine.entered), ("sources", stream._sources),
    ):  # fmt: skip
        tensors |= {f"{name}.{frame}": latent for frame, latent in latents.items()}
    if stream._seen is not None:
        tensors["seen"] = torch.from_numpy(stream._seen)
    tensors |= {f"clean.{n}": latent for n, latent in enumerate(stream._clean)}
    state = {} if engine.memory is None else engine.memory.state_dict()
    tensors |= {f"memory.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    schedule = stream.schedule
    meta = {
        "format": FORMAT, "kind": "video", "model": fingerprint(stream.model), "name": stream.model.config.name,
        "memory": None if stream.memory is None else stream.memory.spec, "seed": stream.seed,
        "schedule": {"kind": type(schedule).__name__.lower(), **dataclasses.asdict(schedule)},
        "size": list(stream.size), "strength": stream.strength if stream.opened.control is None else dataclasses.asdict(stream.opened.control),
        "motion": [[frame, moved] for frame, moved in stream._motion.items()], "segment": engine.segment,
        "guidance": None if stream.opened.guidance is None else dataclasses.asdict(stream.opened.guidance),
        "state": {name: value for name, value in state.items() if not isinstance(value, Tensor)},
        "codec": codec, "wish": dataclasses.asdict(stream._wish),
        "asked": [dataclasses.asdict(asked) for asked in stream._asked],
        "tracks": [dataclasses.asdict(track) for track in stream._tracks],
        "plain": {name: getattr(stream, name) for name in PLAIN},
    }  # fmt: skip
    write_state(path, {name: tensor.clone() for name, tensor in tensors.items()}, meta)


def resume_stream(model: VideoModel, path: str | os.PathLike[str], memory: Memory | None = None) -> VideoStream:
    """Go on with a stream that `VideoStream.save` wrote, bit for bit.

    memory: only needed for a `Memory` of your own. Raises StateError (a ValueError) for a file that is missing, damaged,
    of another model, or that does not fit.
    """
    from .stream import VideoStream

    tensors, meta = read_state(path)
    if meta.get("format") != FORMAT or meta.get("kind") != "video":
        raise StateError(f"{path} is not a saved video stream of format {FORMAT}")
    if meta["model"] != fingerprint(model):
        raise StateError(
            f"{path} was written by another model ({meta['name']}): configuration, weights or dtype differ from this "
            f"{model.config.name}; resume it with the model that made it"
        )
    if memory is not None and memory.spec != meta["memory"]:
        raise StateError(f"{path} was written with memory {meta['memory']}, not {memory.spec}")
    by = None if meta["guidance"] is None else Guidance(**meta["guidance"])
    wish = Wish(**meta["wish"])
    stream = VideoStream(
        model, wish.now, memory or meta["memory"], _schedule(meta["schedule"]), meta["seed"], by, tuple(meta["size"]),
        NoiseControl(**meta["strength"]) if isinstance(meta["strength"], dict) else meta["strength"],
    )  # fmt: skip
    try:
        _fill(stream, {name: tensor.to(stream._device) for name, tensor in tensors.items()}, meta)
    except (KeyError, ValueError) as error:
        raise StateError(f"{path} does not fit this model and memory: {error}") from error
    stream._wish = wish
    stream._asked = [Asked(**asked) for asked in meta["asked"]]
    return stream


def _schedule(told: Mapping[str, Any]) -> Schedule:
    kinds = {kind.__name__.lower(): kind for kind in composing.KINDS}
    return kinds[told["kind"]](**{name: value for name, value in told.items() if name != "kind"})


def _fill(stream: VideoStream, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    engine = stream._engine

    def under(name: str) -> dict[int, Tensor]:
        start = f"{name}."
        return {int(n.removeprefix(start)): t for n, t in sorted(tensors.items()) if n.startswith(start)}

    if engine.memory is not None:
        state = {n.removeprefix("memory."): t for n, t in tensors.items() if n.startswith("memory.")}
        engine.memory.load_state_dict({**state, **meta["state"]})
    engine.flight, engine.anchors, engine.segment = under("flight"), under("anchors"), meta["segment"]
    engine.entered = under("entered")
    stream._sources, clean = under("sources"), under("clean")
    stream._clean = [clean[n] for n in sorted(clean)]
    stream._decoder, stream._encoder = (grown(meta["codec"][name], tensors) for name in ("decoder", "encoder"))
    stream._tracks = [Track(t["id"], tuple(tuple(point) for point in t["points"])) for t in meta["tracks"]]
    stream._motion = dict(meta["motion"])
    stream._seen = tensors["seen"].cpu().numpy() if "seen" in tensors else None
    for name, value in meta["plain"].items():
        setattr(stream, name, value)
    stream._plan = stream.schedule.continued(stream._origin) if stream._origin else stream.schedule
