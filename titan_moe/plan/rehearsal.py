"""One training step of one rank without data: the run's own code on tensors that have only a shape.

torch's fake process group stands for the other ranks and answers nothing; its FakeTensor stands for memory.
What is counted is what the code did; no layer's formula is written down here.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as torchtitan_distributed
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.utils import set_default_dtype
from torchtitan.trainer import Trainer

from titan_moe.layer.dispatch.base import DispatchLimits
from titan_moe.layer.moe import MoE
from titan_moe.plan.attention import plan_attention, planned
from titan_moe.plan.memory import Alive, Held, held
from titan_moe.plan.routes import Load, RehearsedRoutes
from titan_moe.plan.wire import Call, Wire


@dataclass(frozen=True)
class Axis:
    """A mesh axis as its process group is laid out: how many ranks, on how many nodes."""

    ranks: int
    nodes: int


@dataclass(frozen=True)
class MicrobatchCost:
    """One forward and backward, gradients already there where several accumulate.

    Attributes:
        after_forward: bytes alive when the model's forward ends, beyond what is held between steps.
        peak: the most bytes alive at once, gradients included.
        sent: bytes to other ranks.
    """

    after_forward: int
    peak: int
    sent: Counter[Call]


class Rehearsal:
    """A model built, sharded and wrapped as ``titan_moe.trainer.train`` does it, as rank 0 of a fake world.

    Rank 0 is the one that holds most: ``torch.chunk`` gives the first ranks the larger parts.
    """

    def __init__(self, config: Trainer.Config, world_size: int) -> None:
        """Inside ``fake_world``; the config's ``model_spec`` is used up."""
        self.config = config
        self.dims = ParallelDims.from_config(config.parallelism, world_size)
        self.dims.build_mesh()
        torchtitan_distributed.set_spmd_backend(config.parallelism.spmd_backend)
        spec = cast(ModelSpec, config.model_spec)
        plan_attention(spec.model)
        spec.model.update_from_config(config=config)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model: Any = spec.model.build()
        self.model: Decoder = spec.parallelize_fn(
            model,
            parallel_dims=self.dims,
            training=config.training,
            parallelism=config.parallelism,
            compile_config=dataclasses.replace(config.compile, enable=False),
            ac_config=planned(config.activation_checkpoint),
            dump_folder=config.dump_folder,
        )
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)  # a mesh's ranks are real numbers
        with self.fake:
            self.model.to_empty(device="cpu")
            self.loss = config.loss.build(compile_config=dataclasses.replace(config.compile, enable=False))
            self.optimizers = config.optimizer.build(model_parts=[self.model])
        self.model.train()
        self.warm = False
        if isinstance(self.loss, ChunkedLossWrapper):
            self.loss.set_lm_head(cast(Any, self.model.lm_head))
            self.model._skip_lm_head = True
        if spec.post_optimizer_build_fn is not None:
            spec.post_optimizer_build_fn(self.optimizers, [self.model], self.dims)

    @property
    def limits(self) -> DispatchLimits:
        """What every dispatcher of the model was bound with."""
        (limits,) = {moe.routed_experts.token_dispatcher.limits for moe in self.moe_layers}
        return limits

    @property
    def moe_layers(self) -> list[MoE]:
        """The model's own, in order."""
        return [module for module in self.model.modules() if isinstance(module, MoE)]

    @property
    def accumulation(self) -> int:
        """Microbatches per optimizer step."""
        training, batch = self.config.training, self.dims.dp_replicate * self.dims.dp_shard
        whole = training.global_batch_size
        return 1 if whole < 0 else whole // (training.local_batch_size * batch)

    def microbatch(self, load: Load) -> MicrobatchCost:
        """Forward and backward, the last of several where gradients accumulate.

        A run's first one is left out. In it torchtitan's chunked loss changes what FSDP keeps of the head,
        and DTensor tries each operator on fake tensors of the global size, which a run does not hold.
        """
        self.optimizers.zero_grad()
        wire, alive = Wire(self._axis_of_group()), Alive()
        with self.fake, RehearsedRoutes(self.limits, load), wire, alive:
            if not self.warm:
                self._forward_backward(alive)
                self.optimizers.zero_grad()
            self.warm = True
            if self.accumulation > 1:
                self._forward_backward(alive)
            wire.sent.clear()
            alive.reset_peak()
            after_forward = self._forward_backward(alive)
            return MicrobatchCost(after_forward, alive.peak, wire.sent)

    def optimizer_step(self) -> Counter[Call]:
        """Clipping, load balancing and the step itself; afterwards there is optimizer state."""
        wire = Wire(self._axis_of_group())
        with self.fake, wire:
            torchtitan_distributed.clip_grad_norm_(
                list(self.model.parameters()),
                self.config.training.max_norm,
                foreach=True,
                ep_enabled=self.dims.ep_enabled,
            )
            self.optimizers.step()
        return wire.sent

    def held(self) -> Held:
        """Bytes between two steps."""
        return held([self.model], self.optimizers)

    def axes(self, ranks_per_node: int) -> dict[str, Axis]:
        """Every axis that has more than one rank."""
        found = {}
        for name, group in groups_of(self.dims):
            ranks = dist.get_process_group_ranks(group)
            if len(ranks) > 1:
                found[name] = Axis(len(ranks), len({rank // ranks_per_node for rank in ranks}))
        return found

    def _forward_backward(self, alive: Alive) -> int:
        training = self.config.training
        shape = training.local_batch_size, training.seq_len // self.dims.cp
        tokens_BL, labels_BL, positions_BL = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        before = alive.now
        pred: Any = self.model(tokens_BL, positions=positions_BL)
        after_forward = alive.now - before
        loss, _ = self.loss(pred, labels_BL, torch.ones((), dtype=torch.int64), positions=positions_BL)
        del pred
        loss.backward()
        return after_forward

    def _axis_of_group(self) -> dict[str, str]:
        return {group.group_name: name for name, group in groups_of(self.dims)}


def groups_of(dims: ParallelDims) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """Every process group of a run with the name of its axis; an axis has one in each mesh it is part of."""
    for mesh in dims._global_meshes.values():
        for name in mesh.mesh_dim_names or ():
            yield name.removesuffix("_mesh"), mesh.get_group(name)


@contextlib.contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """A process group of ranks that are not there; this process is rank 0."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # what DTensor remembers there names groups that are gone
