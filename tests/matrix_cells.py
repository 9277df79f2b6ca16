"""The cells of tests/matrix.py: which meshes, with what on them; and which combinations are refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One mesh and what runs on it. ``shard`` is what is left of the ranks.

    Attributes:
        batch: sequences per step, of all ranks.
        accumulate: microbatches of a step outside of PP.
        in_ci: runs without TITAN_MOE_SLOW=1.
    """

    ranks: int = 4
    model: str = "deepseek_v3"
    replicate: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    sp: bool = True
    dispatcher: str = ""  # all_to_all with EP, local without
    ac: str = "none"
    seq_len: int = 128
    batch: int = 12
    accumulate: int = 1
    schedule: str = "1F1B"
    microbatch: int = 1
    balancer: str = "headtail"
    compiled: str = ""
    dtype: str = "float32"  # torch compiles its grouped matmul for bfloat16 only
    chunked: bool = False
    validate: bool = False
    in_ci: bool = False

    @property
    def shard(self) -> int:
        """FSDP's degree."""
        return self.ranks // (self.replicate * self.cp * self.tp * self.pp)

    @property
    def local_batch(self) -> int:
        """Sequences of a data-parallel rank in one call of the trainer."""
        return self.batch // (self.replicate * self.shard * self.accumulate)

    @property
    def name(self) -> str:
        """All that is not default, for humans and for pytest -k."""
        return f"{self.ranks}-ranks-{self.mesh}-{self.what}-L{self.seq_len}-B{self.local_batch}".replace(
            " ", "-"
        )

    @property
    def mesh(self) -> str:
        """Its axes, as ``HSDP 2x2 TP2 EP4``."""
        parts = [f"PP{self.pp}"] if self.pp > 1 else []
        if self.replicate > 1:
            parts.append(f"HSDP{self.replicate}x{self.shard}")
        elif self.shard > 1:
            parts.append(f"FSDP{self.shard}")
        parts += [f"CP{self.cp}"] if self.cp > 1 else []
        parts += [f"TP{self.tp}{'' if self.sp else ' no SP'}"] if self.tp > 1 else []
        return " ".join([*parts, f"EP{self.ep}"] if self.ep > 1 else parts)

    @property
    def what(self) -> str:
        """Dispatcher, recomputation and what else is switched on."""
        parts = [self.backend] if self.model == "deepseek_v3" else [self.model, self.backend]
        parts += [f"AC {self.ac}"] if self.ac != "none" else []
        parts += [self.schedule] if self.pp > 1 else []
        parts += [f"microbatch {self.microbatch}"] if self.microbatch > 1 else []
        parts += [self.balancer] if self.cp > 1 else []
        parts += [f"compile {self.compiled}"] if self.compiled else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"accumulate {self.accumulate}"] if self.accumulate > 1 else []
        parts += ["chunked loss"] if self.chunked else []
        parts += ["validation"] if self.validate else []
        return " ".join(parts)

    @property
    def backend(self) -> str:
        """The dispatcher; ``per_slot`` is deepep with all rows back."""
        return self.dispatcher or ("all_to_all" if self.ep > 1 else "local")

    @property
    def flags(self) -> list[str]:
        """The command line that makes this cell of train_configs/debug_local.toml."""
        dispatcher = (
            ["deepep", "--moe.deepep.combine", "per_slot"] if self.backend == "per_slot" else [self.backend]
        )
        flags = [
            f"--model.name={self.model}",
            *("--moe.dispatcher", *dispatcher),
            *(f"--training.{key}={value}" for key, value in self._training.items()),
            *(f"--parallelism.{key}={value}" for key, value in self._parallelism.items()),
            f"--activation_checkpoint.mode={self.ac}",
        ]
        flags += [] if self.sp else ["--parallelism.no-enable_sequence_parallel"]
        if self.compiled:
            flags += [
                "--compile.enable",
                '--compile.components=["model"]',
                f"--compile.backend={self.compiled}",
            ]
        flags += ["--loss.name=chunked_cross_entropy"] if self.chunked else []
        if self.validate:
            flags += ["--validator.enable", "--validator.freq=1", "--validator.steps=1"]
        return flags

    @property
    def _training(self) -> dict[str, Any]:
        return {
            "seq_len": self.seq_len,
            "local_batch_size": self.local_batch,
            "global_batch_size": self.batch,
            "mixed_precision_param": self.dtype,
            "steps": STEPS,
        }

    @property
    def _parallelism(self) -> dict[str, Any]:
        return {
            "data_parallel_replicate_degree": self.replicate,
            "context_parallel_degree": self.cp,
            "context_parallel_load_balancer": self.balancer,
            "tensor_parallel_degree": self.tp,
            "pipeline_parallel_degree": self.pp,
            "pipeline_parallel_schedule": self.schedule,
            "pipeline_parallel_microbatch_size": self.microbatch,
            "expert_parallel_degree": self.ep,
        }


def _cells() -> Iterator[Cell]:
    """All of them. Uneven lengths wherever they are possible: CP cuts whole blocks of 128 tokens."""
    ci: dict[str, Any] = {"in_ci": True}
    yield Cell(seq_len=127)
    yield Cell(ep=2, seq_len=127)
    yield Cell(ep=4)
    yield Cell(tp=2, seq_len=127)
    yield Cell(tp=2, sp=False)
    yield Cell(tp=2, ep=2, seq_len=127, **ci)
    yield Cell(tp=2, ep=2, sp=False)
    yield Cell(tp=2, ep=4, sp=False, seq_len=127)
    yield Cell(tp=4, seq_len=127)
    yield Cell(tp=4, ep=2)
    yield Cell(tp=4, ep=4, seq_len=127)
    yield Cell(tp=4, ep=4, seq_len=2, **ci)  # two ranks without a token
    yield Cell(replicate=2)
    yield Cell(replicate=2, ep=2, seq_len=127)
    yield Cell(replicate=2, tp=2, ep=2, seq_len=127)
    for dispatcher in ("deepep", "per_slot"):
        yield Cell(tp=2, ep=2, seq_len=127, dispatcher=dispatcher)
        yield Cell(ep=4, seq_len=127, dispatcher=dispatcher)
    for ac in ("selective", "full"):
        yield Cell(tp=2, ep=2, seq_len=127, ac=ac, validate=True, in_ci=ac == "selective")
        yield Cell(tp=2, ep=2, seq_len=127, ac=ac, dispatcher="deepep")
    yield Cell(tp=2, ep=2, seq_len=127, accumulate=3)
    yield Cell(ep=2, seq_len=127, accumulate=3, ac="full", dispatcher="deepep", validate=True)
    yield from _context_cells()
    yield from _pipeline_cells()
    for ac in ("none", "selective", "full"):
        yield Cell(tp=2, ep=2, compiled="inductor", dtype="bfloat16", ac=ac)
    yield Cell(tp=2, ep=2, seq_len=127, compiled="aot_eager", dtype="bfloat16", dispatcher="deepep")
    yield Cell(ep=4, seq_len=127, compiled="aot_eager", dtype="bfloat16", ac="selective")
    for mesh in ({"tp": 2, "seq_len": 127}, {"cp": 2, "seq_len": 256}, {"pp": 2, "seq_len": 127}):
        yield Cell(model="qwen3_moe", ep=2, **mesh)
    yield from _cells_of_8()


def _context_cells() -> Iterator[Cell]:
    cp: dict[str, Any] = {"cp": 2, "seq_len": 256, "batch": 8}
    for balancer in ("headtail", "ptrr", "none"):
        yield Cell(**cp, balancer=balancer, ep=2, in_ci=balancer == "headtail")
    yield Cell(**cp)
    yield Cell(**cp, ep=4, dispatcher="deepep")
    yield Cell(**cp, tp=2, ep=4)
    yield Cell(**cp, tp=2, ep=2, sp=False, ac="full")
    yield Cell(**cp, replicate=2, ep=2, ac="selective", dispatcher="per_slot")
    yield Cell(**cp, tp=2, ep=4, compiled="aot_eager", dtype="bfloat16")
    yield Cell(**cp, ep=4, accumulate=2, validate=True)
    yield Cell(**cp | {"cp": 4, "seq_len": 512}, ep=4)


def _pipeline_cells() -> Iterator[Cell]:
    pp: dict[str, Any] = {"pp": 2, "seq_len": 127}
    for schedule in SCHEDULES:
        yield Cell(**pp, tp=2, ep=2, schedule=schedule, in_ci=schedule == "ZBVZeroBubble")
    yield Cell(**pp)
    yield Cell(**pp, ep=2, microbatch=3)
    yield Cell(**pp, tp=2, sp=False, accumulate=3, validate=True)
    yield Cell(**pp, replicate=2, dispatcher="local")
    for schedule in ("1F1B", "Interleaved1F1B"):
        yield Cell(**pp, ep=2, ac="selective", schedule=schedule, dispatcher="deepep")
    for schedule in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"):
        yield Cell(**pp, ep=2, ac="full", schedule=schedule, dispatcher="deepep")
    yield Cell(**pp, ep=2, schedule="Interleaved1F1B", dispatcher="per_slot", validate=True)
    yield Cell(**pp | {"pp": 4})
    yield Cell(pp=2, tp=2, ep=2, chunked=True)
    yield Cell(**pp, ep=2, compiled="aot_eager", dtype="bfloat16")
    yield Cell(pp=2, cp=2, ep=2, seq_len=256, batch=8)
    yield Cell(
        pp=2, cp=2, ep=2, seq_len=256, batch=8, schedule="Interleaved1F1B", ac="full", dispatcher="deepep"
    )


def _cells_of_8() -> Iterator[Cell]:
    eight: dict[str, Any] = {"ranks": 8, "seq_len": 127}
    yield Cell(**eight, ep=8, batch=24)
    yield Cell(**eight, tp=2, ep=8)
    yield Cell(**eight, tp=4, ep=2, dispatcher="deepep")
    yield Cell(**eight, tp=2, ep=4, replicate=2, ac="selective")
    yield Cell(ranks=8, cp=2, tp=2, ep=8, seq_len=256, batch=8)
    yield Cell(**eight, pp=2, tp=2, ep=4)
    yield Cell(**eight, pp=2, replicate=2, ep=2, schedule="ZBVZeroBubble", dispatcher="deepep")
    yield Cell(ranks=8, pp=2, cp=2, tp=2, ep=4, seq_len=256, batch=8, schedule="Interleaved1F1B", ac="full")


SCHEDULES = (
    "1F1B",
    "GPipe",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)
CELLS = tuple(_cells())

# What cannot work: arguments after train_configs/debug_fsdp_tp_ep.toml, on 4 ranks.
_PP, _CP = "--parallelism.pipeline_parallel_degree 2", "--parallelism.context_parallel_degree 2"
_SCHEDULE, _LONG = "--parallelism.pipeline_parallel_schedule", "--training.seq_len 256"
REFUSED = (
    "--moe.dispatcher local",
    "--parallelism.expert_parallel_degree 3",
    f"{_CP} --training.seq_len 127",
    f"{_CP} {_LONG} --routing_replay.mode record",
    f"{_CP} {_LONG} --numerics.capture",
    f"{_PP} --routing_replay.mode record",
    f"{_PP} --numerics.capture",
    f"{_PP} --training.local_batch_size 1",
    f"{_PP} {_SCHEDULE} DualPipeV --training.local_batch_size 2",
    f"{_PP} {_SCHEDULE} Interleaved1F1B --training.local_batch_size 5",
    f"{_PP} {_SCHEDULE} ZBVZeroBubble --activation_checkpoint.mode selective",
    f"{_PP} {_SCHEDULE} ZBVZeroBubble --compile.enable",
    f"{_PP} {_SCHEDULE} ZBVZeroBubble --parallelism.pipeline_parallel_layers_per_stage 1",
    f"{_PP} {_SCHEDULE} PipelineScheduleMulti",
    f"{_PP} --training.local_batch_size 6 --parallelism.pipeline_parallel_microbatch_size 4",
    "--compile.enable --training.mixed_precision_param float32",
    "--compile.enable --routing_replay.mode record",
    "--compile.enable --numerics.capture",
    "--activation_checkpoint.mode memory_budget",
    "--parallelism.spmd_backend spmd_types",
)
