"""What the rules look at."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common import moe as upstream
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.base import TokenDispatcher
from titan_moe.trainer.config.build import TypedConfig, moe_layers


class Broken(Exception):
    """A rule is broken. The text names the keys with their numbers, and the remedy."""


@dataclass(frozen=True)
class Facts:
    """A built configuration and how many ranks will run it."""

    plan: TypedConfig
    world_size: int

    @property
    def trainer(self) -> Trainer.Config:
        """torchtitan's whole config."""
        return self.plan.trainer

    @property
    def parallelism(self) -> ParallelismConfig:
        """``[parallelism]``."""
        return self.trainer.parallelism

    @property
    def training(self) -> TrainingConfig:
        """``[training]``."""
        return self.trainer.training

    @property
    def model(self) -> Decoder.Config:
        """The chosen flavor's architecture."""
        return cast(Decoder.Config, self.plan.spec.model)

    @property
    def flavor(self) -> str:
        """The chosen model, as messages name it."""
        return f"model.flavor {self.plan.model.name}/{self.plan.model.flavor}"

    @cached_property
    def moe_layers(self) -> list[tuple[str, upstream.MoE.Config]]:
        """(name, config) of every MoE layer."""
        return moe_layers(self.plan.spec)

    @property
    def stock(self) -> bool:
        """Whether torchtitan's own MoE layer runs."""
        return self.plan.model.moe == "torchtitan"

    @cached_property
    def dispatcher(self) -> type[TokenDispatcher]:
        """The chosen backend's class."""
        return dispatch.load(self.plan.moe.dispatcher)

    @property
    def device(self) -> str:
        """``"cuda"``, ``"cpu"``, ...: what torchtitan will run on."""
        return utils.device_type

    @property
    def ep(self) -> int:
        """Expert-parallel degree."""
        return self.parallelism.expert_parallel_degree

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.parallelism.tensor_parallel_degree

    @property
    def cp(self) -> int:
        """Context-parallel degree."""
        return self.parallelism.context_parallel_degree

    @property
    def pp(self) -> int:
        """Pipeline-parallel degree."""
        return self.parallelism.pipeline_parallel_degree

    @property
    def dp_replicate(self) -> int:
        """Data-parallel replicas."""
        return self.parallelism.data_parallel_replicate_degree

    @property
    def dp_shard(self) -> int:
        """Data-parallel shards, -1 replaced by what is left of the ranks."""
        given = self.parallelism.data_parallel_shard_degree
        return given if given > 0 else self.world_size // (self.dp_replicate * self.cp * self.tp * self.pp)

    @property
    def microbatch(self) -> int:
        """Sequences in one forward."""
        return (
            self.parallelism.pipeline_parallel_microbatch_size
            if self.pp > 1
            else self.training.local_batch_size
        )

    def value(self, key: str) -> Any:
        """The value of a dotted key; None where the chosen variant has no such key."""
        found: Any = self.trainer
        for part in key.split("."):
            found = getattr(found, part, None)
        return found

    def show(self, key: str) -> str:
        """``key (value)``, the way messages name a number."""
        return f"{key} ({self.value(key)})"


def divisors(number: int) -> str:
    """The divisors of ``number`` for a remedy: ``1, 2 or 4``."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
