"""``torchrun ... -m titan_moe.trainer.train CONFIG.toml [--section.key value ...]``; see run_train.sh."""

import dataclasses
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed import ParallelDims
from torchtitan.observability import structured_logger
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.utils import device_type
from torchtitan.trainer import Trainer as TorchtitanTrainer

from titan_moe.numerics.capture import Capture, forget_capture
from titan_moe.numerics.section import Numerics
from titan_moe.parallel.initialization import draw_models_by_name
from titan_moe.parallel.parallelize import unbind
from titan_moe.replay.section import RoutingReplay
from titan_moe.replay.training import Place, TrainingReplay
from titan_moe.trainer.checkpoint import CheckpointManager
from titan_moe.trainer.config import ConfigError, Job, load, write_resolved
from titan_moe.trainer.metrics import MetricsProcessor


class Trainer(TorchtitanTrainer):
    """torchtitan's trainer for sequences of any length, with our first weights and metrics."""

    @dataclass(kw_only=True, slots=True)
    class Config(TorchtitanTrainer.Config):
        """torchtitan 0.3.0's fields."""

        wants_sequence_parallel: bool = False  # set by the trainer, see init_distributed
        routing_replay: RoutingReplay = field(default_factory=RoutingReplay)
        numerics: Numerics = field(default_factory=Numerics)

        @classmethod
        def of(cls, job: Job) -> "Trainer.Config":
            """``job``'s config with our metrics in the place of torchtitan's, and our sections."""
            metrics = _as(MetricsProcessor.Config, job.trainer.metrics)
            return _as(
                cls,
                job.trainer,
                metrics=metrics,
                routing_replay=job.routing_replay,
                numerics=job.numerics,
            )

        def maybe_log(self) -> None:
            """Gives back what ``init_distributed`` took, then as torchtitan."""
            self.parallelism.enable_sequence_parallel = self.wants_sequence_parallel
            TorchtitanTrainer.Config.maybe_log(self)

    def __init__(self, config: Config) -> None:
        draw_models_by_name()
        super().__init__(config)
        assert config.parallelism.enable_sequence_parallel == config.wants_sequence_parallel, (
            "torchtitan's constructor no longer calls maybe_log after init_distributed"
        )
        self.replay: TrainingReplay | None = None
        self.capture: Capture | None = None
        if config.checkpoint.create_seed_checkpoint:
            return
        forget_capture(config.dump_folder)
        if config.numerics.capture:
            self.capture = Capture(
                config.numerics,
                self.model_parts,
                seq_len=config.training.seq_len,
                sequences=self._place().sequences_per_step,
                dtype=config.training.mixed_precision_param,
                dump_folder=config.dump_folder,
            )
        if config.routing_replay.mode != "off" or self.capture is not None:
            spec: Any = config.model_spec
            self.replay = TrainingReplay(
                config.routing_replay,
                self.model_parts,
                self._place(),
                model=f"{spec.name}/{spec.flavor}",
                dump_folder=config.dump_folder,
                observers=(self.capture,) if self.capture is not None else (),
            )

    def init_distributed(self) -> ParallelDims:
        """As torchtitan, and allows a sequence length that TP does not divide.

        torchtitan's constructor refuses one with SP right after this call, for the sake of its own
        MoE, and calls ``config.maybe_log`` next: SP is off in between.
        """
        parallel_dims = super().init_distributed()
        config = cast(Trainer.Config, self.config)
        config.wants_sequence_parallel = config.parallelism.enable_sequence_parallel
        config.parallelism.enable_sequence_parallel = False
        return parallel_dims

    def train(self) -> None:
        """As torchtitan, unless it is done; a replay that was to be checked must have been."""
        if not self._is_done():
            super().train()
        if self.replay is not None:
            self.replay.finish()

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """As torchtitan, with routes recorded or replayed."""
        if self.replay is None:
            return super().train_step(data_iterator)
        self.microbatches = itertools.count()
        with self.replay.step(self.step):
            super().train_step(self.replay.watched(data_iterator))
        if self.capture is not None:
            self.capture.end_step(self.step)
        if self.replay.summary:
            logger.info(f"step {self.step:>5}  {self.replay.summary}")

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        """As torchtitan; in a microbatch of its own."""
        if self.replay is None:
            return super().forward_backward_step(**kwargs)
        with self.replay.microbatch(next(self.microbatches), self.device) as microbatch:
            if self.capture is None:
                return super().forward_backward_step(**kwargs)
            with self.capture.during(microbatch):
                loss = super().forward_backward_step(**kwargs)
            if microbatch.number + 1 == self.gradient_accumulation_steps:
                self.capture.gradients(self.step)  # before they are clipped
            return loss

    def close(self) -> None:
        """As torchtitan, and finishes a recording."""
        super().close()
        replay: TrainingReplay | None = getattr(self, "replay", None)  # None: the constructor failed
        if replay is not None:
            replay.close()

    def _is_done(self) -> bool:
        """Whether the last step is there in Hugging Face's format, which torchtitan cannot load to see it."""
        checkpointer, steps = cast(CheckpointManager, self.checkpointer), self.config.training.steps
        exported = checkpointer.exported_step() if self.config.checkpoint.load_step == -1 else -1
        if exported >= steps:
            logger.info(
                f"{checkpointer.folder}/step-{exported} is the end of this run, in Hugging Face's format; to "
                f"go on from the checkpoint before it, raise training.steps ({steps})"
            )
        return exported >= steps

    def _place(self) -> Place:
        config, dims = self.config, self.parallel_dims
        batch = dims.get_optional_mesh("batch")
        parallelism, training = config.parallelism, config.training
        return Place(
            dp_rank=batch.get_local_rank() if batch is not None else 0,
            dp_size=batch.size() if batch is not None else 1,
            local_batch_size=training.local_batch_size,
            accumulation=self.gradient_accumulation_steps,
            seq_len=training.seq_len,
            ep_size=parallelism.expert_parallel_degree,
            replica=dims.tp_enabled and not dims.ep_enabled and dims.get_mesh("tp").get_local_rank() > 0,
            mesh=f"dp {dims.dp_replicate * dims.dp_shard} tp {dims.tp} ep {dims.ep}",
        )


@record  # torchrun then shows which rank failed and why, even when LOG_RANK hides it
def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or writes a seed checkpoint. Exit status 2 for a wrong config, before any rank talks."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        job = load(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        if rank == 0:
            print(f"titan_moe: {error}", file=sys.stderr)
        sys.exit(2)
    if rank == 0:
        write_resolved(job, Path(job.trainer.dump_folder) / "resolved.toml")
    init_logger()
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 calls it
    logger.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    structured_logger.init_structured_logger(
        source="training",
        output_dir=job.trainer.dump_folder,
        enable=job.trainer.debug.enable_structured_logging,
    )
    # Under PP torchtitan asks for the console of the last stage; here rank 0 shows its loss (metrics.py).
    os.environ["LOG_RANK"] = ",".join(map(str, range(int(os.environ.get("WORLD_SIZE", "1")))))
    if device_type == "cpu":
        logger.info("no accelerator: torchtitan's gaps on a CPU are filled (titan_moe/trainer/device.py)")
    run(Trainer.Config.of(job))


def run(config: Trainer.Config) -> None:
    """One training run from construction to the end of its process groups."""
    trainer = Trainer(config)
    try:
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
            _summarize(trainer)
    finally:
        trainer.close()
    unbind(trainer.model_parts)  # not after an error: it waits for all ranks
    dist.destroy_process_group()


def _summarize(trainer: Trainer) -> None:
    """What became of the run, on rank 0's console."""
    metrics = cast(MetricsProcessor, trainer.metrics_processor)
    checkpointer = cast(CheckpointManager, trainer.checkpointer)
    saved = Path(checkpointer.folder) if checkpointer.enable else None
    for line in metrics.summary.lines(Path(trainer.config.dump_folder), saved):
        logger.info(line)


def _as(config_class: type, config: Any, **changes: Any) -> Any:
    """``config``'s fields as a ``config_class``, which extends its class."""
    return config_class(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | changes)


if __name__ == "__main__":
    main()
