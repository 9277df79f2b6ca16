"""Two long runs beside each other, from their metrics.jsonl: loss and worst load.

    python -m tests.long_run BASE/metrics.jsonl CANDIDATE/metrics.jsonl

prints a Markdown table of a few steps; docs/numerics.md has the one of the main job.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = (1, 2, 3, 5, 10, 20, 50, 100, 150, 200)


def lines(base: dict[int, Any], candidate: dict[int, Any]) -> Iterator[str]:
    """The table, for those of STEPS that both runs have."""
    yield "| step | loss | loss | difference | load | load | dead experts |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for step in STEPS:
        if step in base and step in candidate:
            one, other = base[step], candidate[step]
            apart = abs(other["loss"] - one["loss"]) / one["loss"]
            loads = [f"{_worst_load(run):.2f}" for run in (one, other)]
            dead = [sum(layer["dead_experts"] for layer in run["load"].values()) for run in (one, other)]
            cells = [
                f"{one['loss']:.5f}",
                f"{other['loss']:.5f}",
                f"{apart:.0e}",
                *loads,
                f"{dead[0]}, {dead[1]}",
            ]
            yield f"| {step} | {' | '.join(cells)} |"


def records(path: Path) -> dict[int, Any]:
    """A run's metrics by step."""
    return {record["step"]: record for record in map(json.loads, path.read_text().splitlines())}


def _worst_load(record: dict[str, Any]) -> float:
    return max(layer["max_over_mean"] for layer in record["load"].values())


if __name__ == "__main__":
    print(*lines(*(records(Path(argument)) for argument in sys.argv[1:3])), sep="\n")
