"""The numbers of a plan: a whole model rehearsed, and one layer of it under each dispatcher."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import MemoryBudgetAC

from titan_moe.layer import dispatch
from titan_moe.parallel.blocks import count_drawn
from titan_moe.plan.memory import Held, largest_unit
from titan_moe.plan.rehearsal import Axis, MicrobatchCost, Rehearsal, fake_world
from titan_moe.plan.routes import Load, RehearsedRoutes
from titan_moe.plan.wire import Call
from titan_moe.trainer.config import ConfigError, Job, load

LOADS: tuple[Load, ...] = ("balanced", "worst")


class DispatcherBytes(NamedTuple):
    """What one rank's MoE layers send to other ranks under one dispatcher, routing balanced.

    Attributes:
        dispatch, combine: rows of one forward, by the dispatcher's closed form.
        step: all of a step: ids and scores, backward and recomputation too; rehearsed.
    """

    dispatch: float
    combine: float
    step: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What one rank, the fullest, holds and sends. Bytes, per optimizer step where they are sent.

    Attributes:
        model_parameters: of the whole model, a number.
        unit: the largest FSDP unit, its name and its bytes while it is gathered.
        rows: R, what a MoE layer's experts get here, by routing.
        microbatches: by routing.
        sent: with balanced routing, by axis, collective and dtype.
        dispatchers: by name and variant; none without EP.
        drawn: random numbers that the rank draws for its first weights, if no initialiser draws twice.
    """

    job: Job
    world_size: int
    accumulation: int
    tokens: int
    model_parameters: int
    held: Held
    unit: tuple[str, int]
    rows: dict[Load, int]
    microbatches: dict[Load, MicrobatchCost]
    axes: dict[str, Axis]
    sent: Counter[Call]
    dispatchers: dict[str, DispatcherBytes]
    drawn: int

    def peak(self, load: Load) -> int:
        """The most bytes at once: what is held but for gradients, and what a microbatch adds to it."""
        held = self.held
        return held.parameters + held.optimizer + held.buffers + self.microbatches[load].peak

    def by_axis(self) -> dict[str, int]:
        """Bytes sent per step, by mesh axis, most first."""
        total: Counter[str] = Counter()
        for call, amount in self.sent.items():
            total[call.axis] += amount
        return dict(total.most_common())


def find(argv: Sequence[str], world_size: int, ranks_per_node: int) -> Findings:
    """Rehearses what ``titan_moe.trainer.train`` would do with these arguments on that many ranks.

    Raises:
        ConfigError: the config is wrong, or asks for what cannot be rehearsed.
    """
    job = load(argv, world_size=world_size)
    refuse_what_is_not_rehearsed(job)
    with fake_world(world_size):
        rehearsal = Rehearsal(job.trainer, world_size)
        microbatches = {load: rehearsal.microbatch(load) for load in LOADS}
        accumulation = rehearsal.accumulation
        once = microbatches["balanced"].sent
        sent = Counter({call: amount * accumulation for call, amount in once.items()})
        sent.update(rehearsal.optimizer_step())
        training, dims = job.trainer.training, rehearsal.dims
        layers = len(rehearsal.moe_layers)
        sequences = accumulation * training.local_batch_size * dims.dp_replicate * dims.dp_shard
        return Findings(
            job=job,
            world_size=world_size,
            accumulation=accumulation,
            tokens=sequences * training.seq_len,
            model_parameters=sum(parameter.numel() for parameter in rehearsal.model.parameters()),
            held=rehearsal.held(),
            unit=largest_unit(rehearsal.model, TORCH_DTYPE_MAP[training.mixed_precision_param]),
            rows={load: RehearsedRoutes(rehearsal.limits, load).rows_received for load in LOADS},
            microbatches=microbatches,
            axes=rehearsal.axes(ranks_per_node),
            sent=sent,
            dispatchers=dict(_dispatchers(argv, world_size, layers, accumulation)) if dims.ep_enabled else {},
            drawn=sum(count_drawn(parameter) for parameter in rehearsal.model.parameters()),
        )


def refuse_what_is_not_rehearsed(job: Job) -> None:
    """One line for each thing that a rehearsal of one rank's eager code would get wrong.

    Raises:
        ConfigError: the first of them.
    """
    degree = job.trainer.parallelism.pipeline_parallel_degree
    if degree > 1:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree ({degree}): the plan rehearses one rank, and a stage "
            "waits for the others; plan with 1"
        )
    if job.resolved["model"]["moe"] != "titan_moe":
        raise ConfigError("model.moe ('torchtitan'): the plan rehearses titan_moe's layer; remove the key")
    if isinstance(job.trainer.activation_checkpoint, MemoryBudgetAC.Config):
        raise ConfigError(
            "activation_checkpoint.mode (memory_budget): only compiled code knows its budget, and the plan "
            "rehearses it eagerly; plan with 'selective' or 'full'"
        )
    if job.trainer.checkpoint.create_seed_checkpoint:
        raise ConfigError("checkpoint.create_seed_checkpoint (true): nothing is trained; remove the key")


def _dispatchers(
    argv: Sequence[str], world_size: int, num_layers: int, accumulation: int
) -> Iterator[tuple[str, DispatcherBytes]]:
    """One MoE layer under each dispatcher that serves EP, times the layers."""
    for name, variant in dispatch.variants().items():
        try:
            job = load([*argv, *variant.flags], world_size=world_size)
        except ConfigError:
            continue  # a dispatcher that cannot serve this mesh
        spec: Any = job.trainer.model_spec
        model = spec.model
        model.layers = [layer for layer in model.layers if layer.moe is not None][:1]
        rehearsal = Rehearsal(job.trainer, world_size)
        step = sum(
            amount
            for call, amount in rehearsal.microbatch("balanced").sent.items()
            if call.axis == "ep" and call.collective == "all-to-all"
        )
        times = num_layers * accumulation
        dispatch_rows, combine_rows = _forward(rehearsal)
        yield name, DispatcherBytes(times * dispatch_rows, times * combine_rows, times * step)


def _forward(rehearsal: Rehearsal) -> tuple[float, float]:
    """Bytes of rows to other ranks in one layer's forward, expected under uniform routing."""
    (layer,) = rehearsal.moe_layers
    limits = rehearsal.limits
    to_others = (limits.ep_size - 1) / limits.ep_size
    row = limits.num_max_tokens_per_rank * limits.dim * limits.dtype.itemsize * to_others
    dispatch_rows, combine_rows = layer.routed_experts.token_dispatcher.uniform_rows_per_token(limits)
    return dispatch_rows * row, combine_rows * row
