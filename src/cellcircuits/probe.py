"""Time a few units of a run, and what that says about the whole run.

A unit is a piece of the run's own work. Its seconds are divided by its operations (flops.py), so that short and long
cells, early and late layers can stand for one another.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

PROBE_SECONDS = 10.0
UNSEEN = 1.25  # how far ten seconds may be from the hours that follow: heat, other users, the parts not timed

Result = TypeVar("Result")


@dataclass(frozen=True)
class Seconds:
    """An estimate with a range."""

    best: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def exactly(cls, seconds: float) -> "Seconds":
        """One that was measured as a whole."""
        return cls(seconds, seconds / UNSEEN, seconds * UNSEEN)

    def __add__(self, other: "Seconds") -> "Seconds":
        """Both, one after the other."""
        return Seconds(self.best + other.best, self.low + other.low, self.high + other.high)

    def times(self, n: float) -> "Seconds":
        """`n` of them."""
        return Seconds(n * self.best, n * self.low, n * self.high)


@dataclass
class Rate:
    """Seconds per operation, from the units timed so far."""

    samples: list[tuple[float, float]] = field(default_factory=list)

    def add(self, flops: float, seconds: float) -> None:
        """Count a unit of so many operations."""
        self.samples.append((float(flops), seconds))

    @property
    def flops_per_second(self) -> float:
        """Operations per second over all units; 0 where none was timed."""
        seconds = sum(of_unit for _, of_unit in self.samples)
        return sum(flops for flops, _ in self.samples) / seconds if seconds else 0.0

    def seconds(self, flops: float) -> Seconds:
        """How long so many operations take: the mean over the units, and twice its standard error around that.

        Raises:
            ValueError: nothing was timed.
        """
        if not self.flops_per_second:
            raise ValueError("no unit was timed")
        spent, per_second, n = sum(seconds for _, seconds in self.samples), self.flops_per_second, len(self.samples)
        squares = sum((seconds - flops_of_unit / per_second) ** 2 for flops_of_unit, seconds in self.samples)
        error = math.sqrt(squares * n / (n - 1)) / spent if n > 1 else 0.5
        best, width = flops / per_second, UNSEEN + 2 * error
        return Seconds(best, best / width, best * width)


class Probe:
    """A clock on a device, with a time by which to stop."""

    def __init__(self, device: "torch.device", seconds: float | None = None) -> None:
        """Start now; without `seconds` there are `PROBE_SECONDS`."""
        self._device = device
        self._until = time.monotonic() + (PROBE_SECONDS if seconds is None else seconds)

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._until - time.monotonic())

    def share(self, part: float) -> "Probe":
        """A probe that ends with a share of what is left."""
        return Probe(self._device, part * self.left)

    def timed(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """Seconds that a call takes, its work on the device included, and what it returns; no progress bar is drawn."""
        with redirect_stderr(StringIO()):  # which is no terminal; messages keep going where they went
            self._wait()
            started = time.perf_counter()
            result = call()
            self._wait()
            return time.perf_counter() - started, result

    def _wait(self) -> None:
        """Until the device has done all it was asked to do."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


def is_long(seconds: float) -> bool:
    """Whether a first call took so long that it tells enough, and warming up is no part of it worth speaking of."""
    return seconds > PROBE_SECONDS


def spread(n: int) -> list[int]:
    """0 to n - 1 so that every beginning of the list is spread over the whole: the middle, the quarters, ..."""
    order: dict[int, None] = {}
    parts = 2
    while len(order) < n:
        order |= dict.fromkeys(i * n // parts for i in range(1, parts))
        if parts > n:
            order |= dict.fromkeys(range(n))
        parts *= 2
    return list(order)


def by_length(lengths: Sequence[int]) -> list[int]:
    """Numbers of cells so that every beginning of the list has short, middling and long ones."""
    ascending = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [ascending[place] for place in spread(len(lengths))]
