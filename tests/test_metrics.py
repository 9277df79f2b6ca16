"""metrics.jsonl over restarts, and the throughput number."""

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torchtitan.tools.logging import logger

from titan_moe.trainer.console import Summary
from titan_moe.trainer.metrics import MetricsProcessor, _without_console, keep_steps_before


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 7.5} | changes


def write(file: Path, steps: list[int], torn: str = "") -> None:
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + torn)


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


class TestKeepStepsBefore:
    @pytest.mark.parametrize(
        ("step", "kept"),
        [(1, []), (10, [1]), (15, [1, 10]), (20, [1, 10]), (30, [1, 10, 20]), (99, [1, 10, 20, 30])],
    )
    def test_drops_what_will_be_done_again(self, tmp_path: Path, step: int, kept: list[int]) -> None:
        file = tmp_path / "metrics.jsonl"
        write(file, [1, 10, 20, 30])
        keep_steps_before(file, step)
        assert steps_in(file) == kept

    def test_a_fresh_run_drops_another_runs_record(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        write(file, [1, 10], torn="not JSON at all\n")
        keep_steps_before(file, 1)
        assert file.read_text() == ""

    @pytest.mark.parametrize("torn", ['{"step": 2', '{"step": 20, "lo', "{", '{"loss": 1.0}', "\0\0\0"])
    def test_a_torn_last_line_goes(self, tmp_path: Path, torn: str) -> None:
        """As a killed run leaves it; what is appended next must start a line of its own."""
        file = tmp_path / "metrics.jsonl"
        write(file, [1, 10], torn=torn)
        keep_steps_before(file, 30)
        assert steps_in(file) == [1, 10]
        assert file.read_text().endswith("\n")

    def test_a_last_line_without_its_newline_stays(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        write(file, [1], torn='{"step": 10}')
        keep_steps_before(file, 30)
        assert steps_in(file) == [1, 10]
        assert file.read_text().endswith("\n")

    def test_lines_are_kept_as_they_are(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        text = '{"step":1,  "loss": NaN}\n{"loss": 1e400, "step": 2}\n'
        file.write_text(text)
        keep_steps_before(file, 3)
        assert file.read_text() == text

    def test_a_missing_file_and_folder(self, tmp_path: Path) -> None:
        file = tmp_path / "new" / "folder" / "metrics.jsonl"
        keep_steps_before(file, 1)
        assert file.read_text() == ""


class TestFile:
    def _processor(self, file: Path) -> Any:
        """A processor at the point where it has a record to write; building one takes a process group."""
        processor = MetricsProcessor.__new__(MetricsProcessor)
        processor.file, processor.file_is_ours = file, False
        return processor

    def test_one_line_per_record(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        processor = self._processor(file)
        for step in (1, 10, 20):
            processor._write(record(step))
        assert [json.loads(line) for line in file.read_text().splitlines()] == [
            record(step) for step in (1, 10, 20)
        ]

    def test_a_resumed_run_continues(self, tmp_path: Path) -> None:
        """Killed at 30 in the middle of a line, resumed from a checkpoint of step 15."""
        file = tmp_path / "metrics.jsonl"
        first = self._processor(file)
        for step in (1, 10, 20):
            first._write(record(step, loss=9.0))
        with file.open("a") as torn:
            torn.write('{"step": 30, "lo')
        second = self._processor(file)
        for step in (20, 30):
            second._write(record(step, loss=8.0))
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(r["step"], r["loss"]) for r in records] == [(1, 9.0), (10, 9.0), (20, 8.0), (30, 8.0)]

    def test_a_fresh_run_starts_over(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        self._processor(file)._write(record(40))
        self._processor(file)._write(record(1))
        assert steps_in(file) == [1]


@pytest.mark.parametrize(("world_size", "others", "replicas"), [(1, 1, 1), (8, 2, 4), (8, 8, 1)])
def test_tokens_per_second_counts_all_data_ranks(
    world_size: int, others: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`others`: cp * tp * pp, whose ranks share their tokens."""
    processor: Any = MetricsProcessor.__new__(MetricsProcessor)
    processor.parallel_dims = SimpleNamespace(world_size=world_size, non_data_parallel_size=others)
    processor.time_last_log, processor.ntokens_since_last_log = 100.0, 600
    monkeypatch.setattr(time, "perf_counter", lambda: 103.0)
    assert processor._tokens_per_second() == 200.0 * replicas


def test_seconds_left_at_the_speed_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    processor: Any = MetricsProcessor.__new__(MetricsProcessor)
    processor.steps, processor.summary, processor.time_last_log = 40, Summary(), 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: 110.0)
    assert processor._seconds_left(5) is None, "nothing to go by"
    processor.summary.last = {"step": 5}
    assert processor._seconds_left(10) == 10.0 / 5 * 30
    assert processor._seconds_left(40) == 0.0
    assert processor._seconds_left(5) is None, "no step since"


def test_upstreams_line_is_silent_and_ours_is_not(caplog: pytest.LogCaptureFixture) -> None:
    level = logger.level
    monitor = caplog.handler
    logger.addHandler(monitor)
    try:
        logger.setLevel(logging.INFO)
        with _without_console():
            logger.info("upstream's")
            logger.warning("a warning")
        logger.info("ours")
        assert logger.level == logging.INFO
    finally:
        logger.removeHandler(monitor)
        logger.setLevel(level)
    assert "upstream's" not in caplog.messages
    assert {"a warning", "ours"} <= set(caplog.messages)
