"""How the pictures of a long video change with time: what drifts in a stream shows in these curves first."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

CURVES = {
    "brightness": "mean of all pixels, 0 to 1", "contrast": "standard deviation over a picture",
    "saturation": "largest minus smallest of red, green and blue", "sharpness": "mean difference of neighbours",
    "motion": "mean difference to the picture before",
}  # fmt: skip
STRETCH = 32  # frames that the judge looks at


class Drift:
    """One number a second of video for each of `CURVES`, and at its end what the world's judge sees in it.

    Of the pictures only a first stretch is kept, and for each prompt the last one.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.seconds: dict[str, list[float]] = {name: [] for name in CURVES}
        self.switches: list[tuple[float, str]] = []
        self._last: np.ndarray | None = None
        self._first: list[np.ndarray] = []
        self._newest: dict[float, deque[np.ndarray]] = {}  # by when their prompt came
        self._sums, self._count, self._frames = dict.fromkeys(CURVES, 0.0), 0, 0

    def add(self, frames: np.ndarray, prompt: str) -> None:
        """Frames, uint8 [n, H, W, 3], and what they were made for."""
        if not self.switches or self.switches[-1][1] != prompt:
            self.switches.append((self._frames / self.fps, prompt))
            self._newest[self.switches[-1][0]] = deque(maxlen=STRETCH)
        self._newest[self.switches[-1][0]].extend(frames)
        self._first.extend(frames[: max(0, STRETCH - len(self._first))])
        for frame in frames.astype(np.float32) / 255:
            now = {
                "brightness": frame.mean(), "contrast": frame.std(),
                "saturation": (frame.max(-1) - frame.min(-1)).mean(),
                "sharpness": (np.abs(np.diff(frame, axis=0)).mean() + np.abs(np.diff(frame, axis=1)).mean()) / 2,
                "motion": 0.0 if self._last is None else np.abs(frame - self._last).mean(),
            }  # fmt: skip
            self._last, self._frames, self._count = frame, self._frames + 1, self._count + 1
            for name, value in now.items():
                self._sums[name] += float(value)
            if self._count >= self.fps:
                self._close()

    def _close(self) -> None:
        for name in CURVES:
            self.seconds[name].append(self._sums[name] / self._count)
        self._sums, self._count = dict.fromkeys(CURVES, 0.0), 0

    def told(self) -> dict[str, Any]:
        """The curves, and for each how far its last fifth lies from its first, relative to the first."""
        drift = {}
        for name, curve in self.seconds.items():
            part = max(1, len(curve) // 5)
            first, last = (float(np.mean(curve[some])) if curve else 0.0 for some in (slice(part), slice(-part, None)))
            drift[name] = (last - first) / first if first else 0.0
        switches = [{"seconds": at, "prompt": prompt} for at, prompt in self.switches]
        return {
            "what": CURVES, "seconds": self.seconds, "drift": drift, "switches": switches, "judge": self._judged(),
        }  # fmt: skip

    def _judged(self) -> dict[str, Any] | None:
        """The judge of the synthetic world on the ends: from the start, and from what each prompt asks for; None where
        these are no pictures that it can read."""
        from ..world import drift, obeys

        last = np.stack(self._newest[self.switches[-1][0]]) if self.switches else None
        try:
            judged: dict[str, Any] = {"drift": asdict(drift(np.stack(self._first), last))} if last is not None else {}
        except (ValueError, TypeError):
            return None
        for (at, prompt), frames in zip(self.switches, self._newest.values(), strict=True):
            with contextlib.suppress(ValueError):  # a prompt in words that the judge does not know
                judged.setdefault("obeys", []).append({"seconds": at, **obeys(np.stack(frames), prompt).scores})
        return judged

    def write(self, folder: Path) -> list[Path]:
        """drift.json and drift.png in a folder, which is made."""
        if self._count and not self.seconds["brightness"]:
            self._close()  # less than a second
        folder.mkdir(parents=True, exist_ok=True)
        numbers, figure = folder / "drift.json", folder / "drift.png"
        told = self.told()
        numbers.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self._draw(told, figure)
        return [numbers, figure]

    def _draw(self, told: dict[str, Any], path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.5 * len(CURVES)), layout="constrained")
        for axes, name in zip(figure.subplots(len(CURVES), sharex=True), CURVES, strict=True):
            axes.plot(
                np.arange(len(self.seconds[name])) + 0.5, self.seconds[name], color="C0", marker=".", markersize=3
            )
            axes.set_ylim(bottom=0)
            axes.set_title(f"{name}: {CURVES[name]} ({told['drift'][name]:+.0%})", loc="left", fontsize=9)
            for number, (at, prompt) in enumerate(self.switches[1:]):
                axes.axvline(at, color="C3", linewidth=0.8)
                if name == next(iter(CURVES)):
                    axes.annotate(
                        prompt[:30], (at, 0), xytext=(2, 2 + 9 * (number % 2)), textcoords="offset points", fontsize=7
                    )
        axes.set_xlabel("seconds of video")
        figure.savefig(path, dpi=130)
