"""One thread that owns one model: all sessions of that model take turns in it."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

log = logging.getLogger("evenflow.serve")


class Job(Protocol):
    """What takes turns."""

    def wait(self, now: float) -> float | None:
        """Seconds until a turn is wanted, 0 for now; None until something wakes the worker."""

    def turn(self) -> None:
        """Do one piece of work: one chunk."""

    def failed(self, error: Exception) -> None:
        """A turn raised; what is to be told of it."""


class Worker:
    """Gives turns round robin: who had one goes to the end of the row, so that nobody waits for more than the others'."""

    def __init__(self, name: str) -> None:
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._woken = self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"evenflow-{name}", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Let `job` take part from now on."""
        with self._changed:
            self._jobs.append(job)
        self.wake()

    def remove(self, job: Job) -> None:
        """No more turns for `job`; one that it is having goes to its end."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def wake(self) -> None:
        """Ask all jobs again how long they want to wait."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread after the turn it is in."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)

    def _next(self) -> Job | None:
        """The job whose turn it is; None to stop."""
        with self._changed:
            while not self._stopping:
                now, soonest = time.monotonic(), 1.0
                for job in self._jobs:
                    seconds = job.wait(now)
                    if seconds is not None and seconds <= 0:
                        self._jobs.remove(job)
                        self._jobs.append(job)
                        return job
                    soonest = min(soonest, seconds or soonest)
                if not self._woken:
                    self._changed.wait(soonest)
                self._woken = False
            return None

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.turn()
            except Exception as error:  # whatever one session does, the others go on
                log.error("a turn failed", exc_info=error)
                job.failed(error)
