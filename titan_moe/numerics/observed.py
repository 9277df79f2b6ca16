"""What two captured runs showed side by side, and which of it is beyond tolerance."""

import math
from dataclasses import dataclass, field

from titan_moe.numerics.differences import Flips, ModuleDifference
from titan_moe.numerics.tolerance import Tolerance, relative

Pairs = list[tuple[int, float, float]]  # step, baseline's, candidate's


@dataclass(kw_only=True)
class Observed:
    """The differences that were found, by kind.

    Attributes:
        losses, grad_norms, rates: by step.
        gradients: of the first step, by parameter: difference over norm, ratio of norms.
        gradient_norms: by parameter, by step: ratio of norms.
        expert_biases: layers, by step, whose biases differ.
        modules, flips: by step, then forward order, then backward order.
        alone: what only one run has written down, in words.
        keys: of modules, how many were compared, and how many there are.
    """

    tolerance: Tolerance
    dtype: str
    losses: Pairs = field(default_factory=list)
    grad_norms: Pairs = field(default_factory=list)
    rates: list[tuple[int, list[float], list[float]]] = field(default_factory=list)
    gradients: dict[str, tuple[float, float]] = field(default_factory=dict)
    gradient_norms: dict[str, dict[int, float]] = field(default_factory=dict)
    expert_biases: list[tuple[int, str]] = field(default_factory=list)
    modules: list[ModuleDifference] = field(default_factory=list)
    flips: list[Flips] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    keys: tuple[int, int] = (0, 0)

    @property
    def bitwise(self) -> bool:
        """All that was written down, of which there must be some of each kind, has the same bits."""
        numbers = (*self.losses, *self.grad_norms, *self.rates)
        norms = [ratio for by_step in self.gradient_norms.values() for ratio in by_step.values()]
        return (
            bool(self.losses and self.gradients and self.modules and self.flips)
            and not self.alone
            and not self.expert_biases
            and all(base == candidate for _, base, candidate in numbers)
            and all(difference == 0 for difference, _ in self.gradients.values())
            and all(ratio == 1 for ratio in norms)
            and not any(m.differing or m.missing or m.replicas for m in self.modules)
            and not any(flips.flipped or flips.replicas for flips in self.flips)
        )

    @property
    def worst_loss(self) -> float:
        """The largest relative difference of a loss."""
        return max((relative(a, b) for _, a, b in self.losses), default=0.0)

    @property
    def first_difference(self) -> ModuleDifference | None:
        """The first module, of the first step that has one, whose bits differ anywhere."""
        return next((m for m in self.modules if m.differing or m.missing), None)

    @property
    def first_beyond(self) -> ModuleDifference | None:
        """The first module, of the first step that has one, that is beyond tolerance."""
        return next((m for m in self.modules if self._is_beyond(m)), None)

    @property
    def first_flip(self) -> Flips | None:
        """The first layer, of the first step that has one, where a token goes to other experts."""
        return next((flips for flips in self.flips if flips.flipped), None)

    @property
    def first_step(self) -> int:
        """The first step that both runs have captured."""
        return min((m.step for m in self.modules), default=0)

    def _is_beyond(self, module: ModuleDifference) -> bool:
        first, limits = module.step == self.first_step, self.tolerance
        limit = limits.module if first else limits.later_module  # later steps have other weights
        worst = limits.token * limits.module if first else math.inf
        return bool(module.missing) or not module.relative <= limit or not module.worst <= max(worst, limit)
