"""What a person reads of a run: a line per logged step, and a summary at the end."""

from dataclasses import dataclass, field
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


@dataclass(kw_only=True)
class Summary:
    """The logged steps of a run in a few lines."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def lines(self, dump_folder: Path, checkpoints: Path | None) -> list[str]:
        """Five lines; none where no step was logged.

        Args:
            checkpoints: the folder that they are in; None where the run saved none.
        """
        if not self.records:
            return []
        first, last = self.records[0], self.records[-1]
        memory = max(record["peak_memory_gib"] for record in self.records)
        # The first step compiles and allocates: it says little about the speed.
        speeds = sorted(record["tokens_per_second"] for record in self.records[1:] or self.records)
        loads = [(*_worst_load(record), record["step"]) for record in self.records if record["load"]]
        load = "no MoE layers of ours"
        if loads:
            layer, stats, step = max(loads, key=lambda load: load[1]["max_over_mean"])
            load = f"max/mean {stats['max_over_mean']:.2f} at worst, in {layer} at step {step}"
        return [
            f"loss        {first['loss']:.5f} at step {first['step']}, "
            f"{last['loss']:.5f} at step {last['step']}",
            f"speed       {speeds[len(speeds) // 2]:,.0f} tokens per second, the median of the logged steps",
            f"load        {load}",
            f"memory      {memory:.2f} GiB at most, on rank 0",
            f"files       {dump_folder}: metrics.jsonl, resolved.toml; checkpoints: {checkpoints or 'none'}",
        ]


def _worst_load(record: dict[str, Any]) -> tuple[str, dict[str, float]]:
    return max(record["load"].items(), key=lambda item: item[1]["max_over_mean"])


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
