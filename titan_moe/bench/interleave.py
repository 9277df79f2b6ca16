"""Contestants timed in turn, A B B A ..., so that they share the machine's moods; medians and quartiles."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from titan_moe.bench import clock


class Contestant(Protocol):
    """Something that can be run again and again."""

    def run(self) -> None:
        """What is timed."""
        ...

    def clear(self) -> None:
        """Before and after it, not timed: gives back what ``run`` left."""
        ...


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    def show(self, digits: int = 2) -> str:
        """``median (low-high)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float

    def show(self, digits: int = 2) -> str:
        """``value ± error``."""
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def interleaved(
    contestants: Mapping[str, Contestant], *, repeats: int, warmup: int = 1, over_ranks: bool = False
) -> dict[str, list[float]]:
    """Seconds of each run, by name; the i-th of all contestants ran one after the other.

    Every second round is in reverse: who comes later finds more in the caches, oneDNN's of kernels too.

    Args:
        warmup: rounds before those that count.
        over_ranks: all ranks start together, and the slowest one's time is the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    turns = list(contestants.items())
    for number in range(-warmup, repeats):
        for name, contestant in turns if number % 2 == 0 else reversed(turns):
            contestant.clear()
            if over_ranks:
                clock.barrier()
            taken = clock.seconds(contestant.run)
            contestant.clear()
            if over_ranks:
                taken = clock.slowest(taken)
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def spread(values: Sequence[float]) -> Spread:
    """Of one value: three times the same."""
    if len(values) == 1:
        return Spread(*values, *values, *values)
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of runs that followed each other."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def total_ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Of the sums, which resolves more than the median of the pairs; the error is that of the pairs' mean."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else math.nan
    return Estimate(sum(above) / sum(below), error)


def geometric_mean(values: Iterable[float]) -> float:
    """Of ratios."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
