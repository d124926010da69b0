"""The seconds of a run, dealt out to its cases as they come: each has its share of what the others have left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

SLOW = "not run: --slow"
SPENT = "not run: the case's share of the time budget was spent; --budget SECONDS sets another"
Clock = Callable[[], float]


class Budget:
    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.seconds, self.clock, self.start = seconds, clock, clock()

    @property
    def used(self) -> float:
        return self.clock() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.used

    @property
    def words(self) -> str:
        return f" in about {self.seconds:.0f} s" if math.isfinite(self.seconds) else ""

    def share(self, cases: int) -> Share:
        """For the next of so many cases that are left."""
        return Share(self.left / cases, self.clock)


class Share(Budget):
    """One case's part: half of it to begin providers that are not main ones, the rest to time all. Seconds may be math.inf."""

    @property
    def open(self) -> bool:
        return self.used <= self.seconds / 2

    def timing(self, most: float) -> float:
        return max(0.0, min(most, self.left))
