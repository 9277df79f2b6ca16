"""What a person reads of a run: a line per logged step, and a summary at the end."""

import statistics
from pathlib import Path
from typing import Any


def step_line(record: dict[str, Any], *, steps: int, seconds_left: float | None = None) -> str:
    """One line of one logged step; the layer with the worst load stands for all of them.

    Args:
        record: a line of metrics.jsonl.
        steps: how many the run will take.
        seconds_left: how long the rest will take; None where it is not known yet.
    """
    width = len(str(steps))
    line = (
        f"step {record['step']:>{width}}/{steps}  loss {record['loss']:8.5f}  "
        f"grad_norm {record['grad_norm']:8.4f}  {record['tokens_per_second']:>9,.0f} tok/s  "
        f"{record['peak_memory_gib']:6.2f} GiB  left {_clock(seconds_left):>8}"
    )
    if record["load"]:
        worst, stats = _worst_load(record)
        dead = sum(stats["dead_experts"] for stats in record["load"].values())
        line += f"  load max/mean {stats['max_over_mean']:.2f} ({worst})  dead experts {dead}"
    return line


class Summary:
    """The logged steps of a run in a few lines. It keeps a number per step and the records it may name."""

    def __init__(self) -> None:
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.heaviest: dict[str, Any] = {}  # the record with the worst load
        self.speeds: list[float] = []
        self.peak_memory_gib = 0.0

    @property
    def last_step(self) -> int | None:
        """The step that was logged last; None before the first one."""
        return self.last.get("step")

    def add(self, record: dict[str, Any]) -> None:
        """Takes a line of metrics.jsonl."""
        self.first, self.last = self.first or record, record
        self.speeds.append(record["tokens_per_second"])
        self.peak_memory_gib = max(self.peak_memory_gib, record["peak_memory_gib"])
        if record["load"] and _max_over_mean(record) > _max_over_mean(self.heaviest):
            self.heaviest = record

    def lines(self, dump_folder: Path, checkpoints: Path | None) -> list[str]:
        """Five lines; none where no step was logged.

        Args:
            checkpoints: the folder that they are in; None where the run saved none.
        """
        if not self.first:
            return []
        load = "no MoE layers of ours"
        if self.heaviest:
            layer, stats = _worst_load(self.heaviest)
            step = self.heaviest["step"]
            load = f"max/mean {stats['max_over_mean']:.2f} at worst, in {layer} at step {step}"
        # The first step compiles and allocates, and says little about the speed.
        speed = statistics.median_high(self.speeds[1:] or self.speeds)
        return [
            f"loss        {self.first['loss']:.5f} at step {self.first['step']}, "
            f"{self.last['loss']:.5f} at step {self.last['step']}",
            f"speed       {speed:,.0f} tokens per second, the median of the logged steps",
            f"load        {load}",
            f"memory      {self.peak_memory_gib:.2f} GiB at most, on rank 0",
            f"files       {dump_folder}: metrics.jsonl, resolved.toml; checkpoints: {checkpoints or 'none'}",
        ]


def _max_over_mean(record: dict[str, Any]) -> float:
    return _worst_load(record)[1]["max_over_mean"] if record else 0.0


def _worst_load(record: dict[str, Any]) -> tuple[str, dict[str, float]]:
    return max(record["load"].items(), key=lambda item: item[1]["max_over_mean"])


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
