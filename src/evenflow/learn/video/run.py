"""What every training run of a video model keeps: modules, a slow average of them, optimizers, and its curve."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from ..muon import Muon

SAVING = 30.0  # seconds of training between checkpoints, at least


def optimizers(module: nn.Module, rate: float, betas: tuple[float, float] = (0.9, 0.95)) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for everything else; both take `rate` as AdamW would."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        matrix = parameter.ndim == 2 and ("blocks." in name or "body." in name)
        (inner if matrix else outer).append(parameter)
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(outer, rate, betas=betas, weight_decay=0.01)]
    if inner:
        made.append(Muon(inner, rate))
    return made


def agreed(seconds: float) -> float:
    """The first process's time, so that all end with the same step."""
    if not distributed.is_initialized():
        return seconds
    said = torch.tensor([seconds], dtype=torch.float64)
    distributed.broadcast(said, 0)
    return float(said)


class Average:
    """An exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module; faster at first, as there is little to average yet."""
        self.updates += 1
        keep = min(self.decay, self.updates / (self.updates + 10))
        for name, parameter in module.named_parameters():
            self.values[name].lerp_(parameter, 1 - keep)

    @torch.no_grad()
    def into(self, module: nn.Module) -> None:
        """Give the averages to a module of the same shape."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def best_device() -> str:
    """What training runs on where nothing else is asked for: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def joined() -> int:
    """Number of this process among those that `torchrun` started, which then share every step; 0 where it did not."""
    if "RANK" not in os.environ:
        return 0
    distributed.init_process_group("gloo")
    return distributed.get_rank()


def shared(parameters: Iterable[nn.Parameter]) -> None:
    """Make gradients the mean over all processes."""
    if not distributed.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


class Run:
    """A run of `minutes`, with a checkpoint and a curve in `folder`, which a later run may resume."""

    def __init__(
        self, folder: Path, minutes: float, modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer], averages: Mapping[str, Average],
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.minutes = folder, minutes
        self.modules, self.optimizers, self.averages = modules, optimizers, averages
        self.step, self.seconds, self.saved = 0, 0.0, 0.0
        self.first = not distributed.is_initialized() or distributed.get_rank() == 0  # it keeps the books

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def done(self) -> float:
        """Share of the run that lies behind, 0 to 1."""
        return min(1.0, self.seconds / (60 * self.minutes))

    def rate(self, top: float, warmup: int = 100, decay: float = 0.4) -> float:
        """Learning rate now: warm-up, plateau, linear decay over the last part."""
        return top * min(1.0, (self.step + 1) / warmup, max(0.02, (1 - self.done) / decay))

    def save(self) -> None:
        """Everything needed to go on, as one file; the old one stays until the new one is whole."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
        for name, average in self.averages.items():
            tensors |= {f"average/{name}/{key}": value for key, value in average.values.items()}
        for name, optimizer in self.optimizers.items():
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{number}/{key}": torch.as_tensor(v) for key, v in state.items()}
        meta = {"step": self.step, "seconds": self.seconds, "updates": {n: a.updates for n, a in self.averages.items()}}
        part = self.checkpoint.with_suffix(".part")
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, part, {"run": json.dumps(meta)})
        part.replace(self.checkpoint)

    def load(self) -> None:
        """Take up the run where `save` left it. Raises ValueError for a file that is damaged or of another shape."""
        if not self.checkpoint.exists():
            raise ValueError(f"nothing to resume: there is no {self.checkpoint}")
        try:
            with safe_open(self.checkpoint, "pt") as file:
                meta = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint} is not the whole checkpoint of a run ({error})") from None
        kept: dict[str, dict[str, dict[str, Tensor]]] = {"module": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, owner, key = name.split("/", 2)
            kept[kind].setdefault(owner, {})[key] = tensor
        try:
            for name, module in self.modules.items():
                module.load_state_dict(kept["module"][name])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint} was made with other settings: {error}") from None
        for name, average in self.averages.items():
            for key, value in average.values.items():
                value.copy_(kept["average"][name][key])
            average.updates = meta["updates"][name]
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in kept["optimizer"].get(name, {}).items():
                number, rest = key.split("/", 1)
                state.setdefault(int(number), {})[rest] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.seconds = meta["step"], meta["seconds"]

    def steps(self, what: str, every: int) -> Iterator[dict[str, float]]:
        """Until the time is over: a dict to fill with figures of the step, which are shown, smoothed and logged.

        Logs a line of the curve every `every` steps, and saves then if SAVING seconds have passed. Raises ValueError at
        a figure that is no number.
        """
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
        smooth: dict[str, float] = {}
        with Progress(*columns) as progress, (self.folder / "curve.jsonl").open("a") as curve:
            bar = progress.add_task(what, total=1.0)
            while self.done < 1:
                start = time.perf_counter()
                figures: dict[str, float] = {}
                yield figures
                self.step += 1
                self.seconds = agreed(self.seconds + time.perf_counter() - start)
                for name, value in figures.items():
                    if not math.isfinite(value):
                        raise ValueError(f"{name} is {value} at step {self.step}; lower the learning rate")
                    smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
                text = "  ".join(f"{name} {value:.4f}" for name, value in smooth.items())
                progress.update(bar, completed=self.done, description=f"{what} step {self.step}  {text}")
                if self.first and (self.step % every == 0 or self.done >= 1):
                    line = {"step": self.step, "seconds": round(self.seconds, 1)}
                    curve.write(json.dumps(line | {name: round(v, 5) for name, v in smooth.items()}) + "\n")
                    curve.flush()
                    if self.done >= 1 or self.seconds - self.saved >= SAVING:
                        self.save()
                        self.saved = self.seconds


def grown(optimizer: torch.optim.Optimizer, parameters: list[Any], rate: float, clip: float = 1.0) -> float:
    """One update at `rate` with the gradients that are there, clipped; their norm."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm
