"""The line per step and the summary at the end, word by word."""

from pathlib import Path
from typing import Any

from titan_moe.trainer.console import Summary, step_line

LOAD = {
    "layers.1.moe": {"max_over_mean": 1.5, "cv": 0.2, "dead_experts": 0},
    "layers.2.moe": {"max_over_mean": 3.25, "cv": 0.9, "dead_experts": 2},
    "layers.3.moe": {"max_over_mean": 2.0, "cv": 0.4, "dead_experts": 1},
}


def record(step: int, **changes: Any) -> dict[str, Any]:
    base = {"step": step, "loss": 7.5, "grad_norm": 1.25, "tokens_per_second": 12345.6, "load": LOAD}
    return base | {"peak_memory_gib": 1.5} | changes


class TestStepLine:
    def test_reads(self) -> None:
        assert step_line(record(20), steps=100, seconds_left=3723.4) == (
            "step  20/100  loss  7.50000  grad_norm   1.2500     12,346 tok/s    1.50 GiB  left  1:02:03"
            "  load max/mean 3.25 (layers.2.moe)  dead experts 3"
        )

    def test_without_moe_layers_and_at_the_start(self) -> None:
        assert step_line(record(1, load={}), steps=3).endswith("tok/s    1.50 GiB  left        ?")

    def test_columns_stay_in_place(self) -> None:
        """From the first step to the last, and when the loss is lost."""
        lines = [
            step_line(
                record(step, loss=loss, grad_norm=norm, tokens_per_second=speed),
                steps=99999,
                seconds_left=left,
            )
            for step, loss, norm, speed, left in [
                (1, 12.5, 123.5, 3.0, None),
                (99999, 0.00123, 0.5, 9876543.0, 0.0),
                (7, float("nan"), float("inf"), 0.0, 99_999.0),
            ]
        ]
        for word in ("loss", "grad_norm", "tok/s", "GiB", "left", "load"):
            assert len({line.index(word) for line in lines}) == 1, lines
        assert all("\n" not in line for line in lines)


def summary(*records: dict[str, Any]) -> Summary:
    found = Summary()
    for each in records:
        found.add(each)
    return found


class TestSummary:
    def test_reads(self) -> None:
        heavier = LOAD | {"layers.3.moe": {"max_over_mean": 4.0, "cv": 0.4, "dead_experts": 1}}
        records = [
            record(1, loss=8.0, tokens_per_second=10.0),
            record(2, tokens_per_second=300.0, load=heavier, peak_memory_gib=2.0),
            record(3, loss=7.25, tokens_per_second=200.0),
        ]
        assert summary(*records).lines(Path("out"), Path("out/checkpoint")) == [
            "loss        8.00000 at step 1, 7.25000 at step 3",
            "speed       300 tokens per second, the median of the logged steps",
            "load        max/mean 4.00 at worst, in layers.3.moe at step 2",
            "memory      2.00 GiB at most, on rank 0",
            "files       out: metrics.jsonl, resolved.toml; checkpoints: out/checkpoint",
        ]

    def test_one_step_without_moe_layers_or_checkpoints(self) -> None:
        lines = summary(record(1, load={})).lines(Path("out"), None)
        assert lines[1].startswith("speed       12,346 ")
        assert lines[2] == "load        no MoE layers of ours"
        assert lines[4].endswith("checkpoints: none")

    def test_nothing_was_logged(self) -> None:
        assert Summary().lines(Path("out"), None) == []
