"""Every mesh against one rank, from one seed checkpoint in fp32: the cells, one run of a cell, the table.

    python -m tests.matrix [NAME ...] [--write docs/meshes.md]

runs all cells, or those whose name holds a NAME, and prints what was held; exit status 1 where a cell is red.
tests/test_matrix.py runs the same cells.
"""

import argparse
import math
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.ranks import RankError, RankTimeout, close_pools, run_ranks
from tests.training import train
from titan_moe.config import ConfigError, load
from titan_moe.moe import MoE

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "train_configs" / "debug_local.toml")
STEPS = 3
TIMEOUT_S = 280.0
QUIET = "--debug.no-enable_structured_logging"
MARKS = ("<!-- python -m tests.matrix -->", "<!-- end -->")
# What a cell may be off by, relative to the reference; counts and expert bias may not be off at all.
LIMITS = {"loss": 1e-6, "losses": 1e-5, "grad_norm": 1e-5, "gradients": 1e-5, "parameters": 1e-3}
# A compiled cell, in bfloat16, against the same mesh without compile. Inductor keeps more digits between
# operations, tokens flip, and Adam moves a parameter with a tiny gradient by its sign.
LIMITS_COMPILED = {
    "inductor": {"loss": 1e-4, "losses": 1e-3, "grad_norm": 1e-3, "gradients": 1e-1, "parameters": 3e-1},
    # Every bit on torch 2.13; 2.15 rounds the backward of a norm otherwise.
    "aot_eager": {"loss": 0.0, "losses": 1e-3, "grad_norm": 1e-3, "gradients": 1e-2, "parameters": 1e-1},
}


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
    yield Cell(tp=2, ep=2, seq_len=127, compiled="aot_eager", dtype="bfloat16", dispatcher="deepep", **ci)
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


@dataclass(frozen=True, kw_only=True)
class Held:
    """How far a cell was off, and why it is red if it is."""

    loss: float  # of the first step
    losses: float  # the worst of all steps
    grad_norm: float  # of the first step
    gradients: float  # the worst of the first step, relative to its norm
    worst: str
    parameters: float  # the worst after all steps, relative to what it moved
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """Runs cells below ``folder``; what they share, the seed and the references, is made once."""

    folder: Path
    references: dict[Cell, list[dict[str, Any]]] = field(default_factory=dict)

    def run(self, cell: Cell, sabotage: Callable[[list[MoE]], None] | None = None) -> Held:
        """Trains in worker processes of ``tests.ranks``, and compares; ``sabotage`` is a planted fault."""
        reference = self._reference(cell)
        ranks = self._train(cell, reference.name, sabotage)
        return judge(ranks, self.references[reference], cell)

    def _seed(self, model: str) -> Path:
        """The checkpoint that all runs of ``model`` start from."""
        folder = self.folder / f"seed-{model}"
        if not (folder / "step-0").exists():
            make = ("--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.folder=.")
            argv = [CONFIG, f"--model.name={model}", f"--dump_folder={folder}", *make, QUIET]
            run_ranks(train, 1, argv, timeout_s=TIMEOUT_S)
        return folder / "step-0"

    def _reference(self, cell: Cell) -> Cell:
        """What ``cell`` is compared with: one rank, the same sequences; compiled, itself without compile."""
        if cell.compiled:
            alike = replace(cell, compiled="", dtype="bfloat16")
        else:
            alike = Cell(ranks=1, model=cell.model, seq_len=cell.seq_len, batch=cell.batch, validate=True)
        if alike not in self.references:
            self.references[alike] = self._train(alike, alike.name)
        return alike

    def _train(self, cell: Cell, reference: str, sabotage: Any = None) -> list[dict[str, Any]]:
        argv = [
            CONFIG,
            f"--dump_folder={self.folder / cell.name}",
            QUIET,
            "--checkpoint.enable",
            f"--checkpoint.initial_load_path={self._seed(cell.model)}",
            "--checkpoint.interval=1000",
            *cell.flags,
        ]
        whole = str(self.folder / f"whole-{reference}")
        in_step = cell.pp == 1  # stages hold other layers, and the first and the last send less
        try:
            return run_ranks(train, cell.ranks, argv, whole, sabotage, timeout_s=TIMEOUT_S, in_step=in_step)
        finally:
            shutil.rmtree(self.folder / cell.name, ignore_errors=True)  # the last step's checkpoint, 300 MB


def judge(ranks: list[dict[str, Any]], reference: list[dict[str, Any]], cell: Cell) -> Held:
    """Every rank's results against the reference's; under PP a rank tells of its own stages."""
    told = {key: _worst(ranks, key) for key in ("gradient_errors", "parameter_errors")}
    problems = _missing(told, ranks)
    if cell.compiled != "inductor":
        for key in ("first_load", "first_bias", "expert_bias"):
            problems += _unequal(key, ranks, reference)
    if cell.validate and cell.accumulate == 1:  # a step of validation is a microbatch
        problems += [p for rank in ranks for p in _validation(rank["validation"], reference[0]["validation"])]
    ours, theirs = ranks[0]["records"], reference[0]["records"]
    if len(ours) != STEPS or len(theirs) != STEPS:
        problems.append(f"{len(ours)} and {len(theirs)} steps")
    losses = [_apart(our["loss"], their["loss"]) for our, their in zip(ours, theirs, strict=False)]
    worst = max(told["gradient_errors"], key=lambda name: told["gradient_errors"][name])
    figures = {
        "loss": losses[0],
        "losses": max(losses),
        "grad_norm": _apart(ours[0]["grad_norm"], theirs[0]["grad_norm"]),
        "gradients": told["gradient_errors"][worst],
        "parameters": max(told["parameter_errors"].values()),
    }
    limits = LIMITS_COMPILED[cell.compiled] if cell.compiled else LIMITS
    problems += [
        f"{key} {figures[key]:.1e} > {most:.0e}" for key, most in limits.items() if not figures[key] <= most
    ]
    return Held(**figures, worst=worst, problems=tuple(problems))


def _validation(ours: list[float], theirs: list[float]) -> list[str]:
    pairs = zip(ours, theirs, strict=False)
    same = len(ours) == len(theirs) and all(_apart(our, their) <= LIMITS["losses"] for our, their in pairs)
    return [] if same else [f"validation losses {ours} instead of {theirs}"]


def _worst(ranks: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: max(r[key][name] for r in ranks if name in r[key]) for rank in ranks for name in rank[key]}


def _unequal(key: str, ranks: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[str]:
    expected = {name: tensor_E for rank in reference for name, tensor_E in rank[key].items()}
    missing = expected.keys() - {name for rank in ranks for name in rank[key]}
    wrong = {
        n for rank in ranks for n, tensor_E in rank[key].items() if not torch.equal(tensor_E, expected[n])
    }
    return [f"{key} of {name}" for name in sorted(missing | wrong)]


def _missing(told: dict[str, dict[str, float]], ranks: list[dict[str, Any]]) -> list[str]:
    """Parameters nobody compared, without a gradient, or with unlike copies."""
    names = set(ranks[0]["names"])
    keys = ("gradient_errors", "parameter_errors")
    problems = [f"no {key} of {name}" for key in keys for name in names - told[key].keys()]
    for key in ("none_gradients", "replicas_differ"):
        problems += [f"{key}: {rank[key][0]}" for rank in ranks if rank[key]]
    return problems


def _apart(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs) if math.isfinite(ours) else math.inf


def table_line(cell: Cell, held: Held | None, note: str) -> str:
    """What the command prints of a cell; without figures where it did not run."""
    figures = [f"{getattr(held, key):.0e}" if held else "" for key in LIMITS]
    shape = f"{cell.seq_len:>4} {cell.local_batch:>2}"
    told = " ".join(f"{figure:>9}" for figure in figures)
    return f"{cell.ranks}  {cell.mesh:<19} {cell.what:<46} {shape}  {told}  {note}"


def _print_cells(cells: Sequence[Cell], tell: Callable[[str], None]) -> bool:
    """Runs and tells them one by one; whether all held."""
    good = True
    tell(f"{'':2} {'mesh':<19} {'what':<46} {'L':>4} {'B':>2}  " + " ".join(f"{key:>9.9}" for key in LIMITS))
    with tempfile.TemporaryDirectory(prefix="titan_moe_matrix_") as folder:
        matrix = Matrix(Path(folder))
        for number, cell in enumerate(cells):
            if number % 16 == 15:
                close_pools()  # a worker keeps about 100 MB of every run
            try:
                held = matrix.run(cell)
            except (RankError, RankTimeout) as error:
                good = False
                tell(table_line(cell, None, f"RED: {str(error).splitlines()[0][:300]}"))
                continue
            good = good and not held.problems
            tell(table_line(cell, held, f"RED: {'; '.join(held.problems)}" if held.problems else "held"))
    return good


def refusal(arguments: str) -> str:
    """What the config check says to ``arguments``; empty where it lets them pass."""
    try:
        load([str(ROOT / "train_configs" / "debug_fsdp_tp_ep.toml"), *shlex.split(arguments)], world_size=4)
    except ConfigError as error:
        return str(error)
    return ""


def main(argv: Sequence[str]) -> int:
    """The command above. Writes between the marks of the --write file, at the end and only if all was run."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cells whose name holds one of these")
    parser.add_argument("--write", type=Path, help="put the tables between the marks of this file")
    options = parser.parse_args(argv)
    cells = [c for c in CELLS if not options.names or any(name in c.name for name in options.names)]
    if not cells:
        parser.error(f"no cell holds {' or '.join(options.names)}; their names are like {CELLS[5].name}")
    if options.write and len(cells) < len(CELLS):
        parser.error("--write wants all cells: leave the names out")
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line.rstrip())

    good = _print_cells(cells, tell)
    tell("")
    tell("refused before any rank starts:")
    for arguments in REFUSED:
        said = refusal(arguments)
        good = good and bool(said)
        tell(f"  {arguments}")
        tell(f"      {said or 'RED: not refused'}")
    if options.write:
        page, table = options.write.read_text(), "\n".join(lines)
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        options.write.write_text(f"{before}{MARKS[0]}\n```text\n{table}\n```\n{MARKS[1]}{after}")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    finally:
        close_pools()
    sys.exit(status)
