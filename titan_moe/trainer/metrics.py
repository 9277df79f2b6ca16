"""What a run says about itself: one console line and one JSON object per logged step."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.components import metrics as upstream
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from titan_moe.trainer.console import Summary, step_line
from titan_moe.trainer.load_report import load_report, traffic_report


class MetricsProcessor(upstream.MetricsProcessor):
    """torchtitan's processor (TensorBoard, W&B), plus ``metrics.jsonl`` and a line a person can read."""

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.MetricsProcessor.Config):
        """torchtitan 0.3.0's fields."""

    def __init__(
        self,
        config: Config,
        *,
        dump_folder: str,
        config_dict: dict[str, Any],
        pp_schedule: str = "1F1B",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config, dump_folder=dump_folder, config_dict=config_dict, pp_schedule=pp_schedule, **kwargs
        )
        self.steps: int = config_dict["training"]["steps"]
        self.summary = Summary()
        self.writes = dist.get_rank() == 0
        # In a schedule that goes down and up again, the last stage is the first rank's.
        folded = pp_schedule.lower() in ("zbvzerobubble", "dualpipev")
        self.last_stage = -1 if self.parallel_dims.pp_enabled and not folded else 0
        self.file = Path(dump_folder) / "metrics.jsonl"
        self.file_is_ours = False

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Called on every rank, at logged steps. Gathers loss, load and traffic of all pipeline stages."""
        global_avg_loss, global_max_loss = self._of_last_stage((global_avg_loss, global_max_loss))
        record = {
            "step": step,
            "loss": global_avg_loss,
            "grad_norm": grad_norm,
            "tokens_per_second": self._tokens_per_second(),
            # Since the step that was logged before; on a CPU, since the process began.
            "peak_memory_gib": self._peak_memory_gib(),
            "lr": {
                key.removeprefix("lr/"): value
                for key, value in (extra_metrics or {}).items()
                if key.startswith("lr/")
            },
            "load": self._expert_load(),
            "traffic": self._traffic(),
        }
        seconds_left = self._seconds_left(step)
        with _without_console():  # its own line reports MFU per device, which says nothing about MoE
            super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        if self.writes:
            self._write(record)
            self.summary.add(record)
            logger.info(step_line(record, steps=self.steps, seconds_left=seconds_left))

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """As torchtitan, with the last pipeline stage's loss on every rank. Collective."""
        super().log_validation(self._of_last_stage(loss), step, extra_metrics)

    def _of_last_stage(self, loss: Any) -> Any:
        return self._of_all_stages(loss)[self.last_stage]

    def _peak_memory_gib(self) -> float:
        # Not by the monitor: it would warn of retried allocations a second time.
        stats = utils.device_module.memory_stats(self.device_memory_monitor.device)
        return stats["active_bytes.all.peak"] / 2**30

    def _seconds_left(self, step: int) -> float | None:
        """At the speed of the steps since the last line; the first line has nothing to go by."""
        before = self.summary.last_step
        if before is None or before >= step:
            return None
        return (time.perf_counter() - self.time_last_log) / (step - before) * (self.steps - step)

    def _tokens_per_second(self) -> float:
        """Over all data-parallel ranks, which hold equally many tokens."""
        elapsed = time.perf_counter() - self.time_last_log
        replicas = self.parallel_dims.world_size // self.parallel_dims.non_data_parallel_size
        return self.ntokens_since_last_log * replicas / elapsed

    def _expert_load(self) -> dict[str, dict[str, float]]:
        balancer = getattr(self.optimizers, "load_balancer", None)  # None: torchtitan's own layers
        stages = self._of_all_stages({} if balancer is None else load_report(balancer))
        return {fqn: stats for stage in stages for fqn, stats in stage.items()}

    def _traffic(self) -> dict[str, float]:
        balancer = getattr(self.optimizers, "load_balancer", None)
        stages = self._of_all_stages({} if balancer is None else traffic_report(balancer))
        return {key: sum(stage[key] for stage in stages) for key in stages[0]}

    def _of_all_stages(self, report: Any) -> list[Any]:
        if not self.parallel_dims.pp_enabled:
            return [report]
        stages: list[Any] = [None] * self.parallel_dims.pp
        dist.all_gather_object(stages, report, group=self.parallel_dims.get_mesh("pp").get_group())
        return stages

    def _write(self, record: dict[str, Any]) -> None:
        if not self.file_is_ours:
            # A resumed run continues its own record; steps it will do again, or another run's, go.
            keep_steps_before(self.file, record["step"])
            self.file_is_ours = True
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")


def keep_steps_before(file: Path, step: int) -> None:
    """Rewrites a metrics.jsonl without the records from ``step`` on and without a torn last line."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(kept))


class _without_console:
    """Silences the shared logger below a warning."""

    def __enter__(self) -> None:
        self.level = logger.level
        logger.setLevel("WARNING")

    def __exit__(self, *_: object) -> None:
        logger.setLevel(self.level)
