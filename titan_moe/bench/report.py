"""What every part of the bench shares: its settings, what it finds, and the tables it prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titan_moe.bench import clock, shapes
from titan_moe.bench.shapes import Shape

Found = dict[str, Any]  # raw numbers, as they go into --json
Table = list[list[str]]  # the first line holds the heads


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How much is measured."""

    world_size: int = 4  # the most ranks
    quick: bool = False
    only: Sequence[str] = ()  # parts; none: all

    @property
    def layer_shapes(self) -> Sequence[Shape]:
        """Of the parts on one rank."""
        if self.quick:
            return shapes.QUICK
        return shapes.LAYER if clock.DEVICE == "cpu" else (*shapes.LAYER, *shapes.ON_A_GPU)

    @property
    def kernel_shapes(self) -> Sequence[Shape]:
        """Of kernels alone: a GPU's cache holds the small ones."""
        return self.layer_shapes if self.quick or clock.DEVICE == "cpu" else shapes.ON_A_GPU

    @property
    def rank_shapes(self) -> Sequence[Shape]:
        """Of the parts over several, with the tokens of each."""
        return shapes.QUICK if self.quick else shapes.OVER_RANKS

    @property
    def ep_sizes(self) -> list[int]:
        """2, 4, 8 ... as far as there are ranks."""
        sizes = [2**power for power in range(1, 10) if 2**power <= self.ranks]
        return sizes[:1] if self.quick else sizes

    @property
    def ranks(self) -> int:
        """No more than there are GPUs, where there are any."""
        return min(self.world_size, clock.max_ranks() or self.world_size)

    def repeats(self, whole: int) -> int:
        """``whole``, or a few when it is to be quick."""
        return 3 if self.quick else whole
