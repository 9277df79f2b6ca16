"""Two captured runs against each other: where they first differ, how much, by rounding or by routing."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_moe.numerics import verdict
from titan_moe.numerics.differences import Flips, ModuleDifference, StepDifference, only_sublayers
from titan_moe.numerics.load import Captured, CaptureError
from titan_moe.numerics.tolerance import Tolerance, relative

Pairs = list[tuple[int, float, float]]  # step, baseline's, candidate's


@dataclass(kw_only=True)
class Comparison:
    """Everything that was found.

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
        return next((m for m in self.modules if verdict.is_beyond(self, m)), None)

    @property
    def first_flip(self) -> Flips | None:
        """The first layer, of the first step that has one, where a token goes to other experts."""
        return next((flips for flips in self.flips if flips.flipped), None)

    @property
    def first_step(self) -> int:
        """That both runs have captured."""
        return min((m.step for m in self.modules), default=0)

    @property
    def problems(self) -> list[str]:
        """What is beyond tolerance, causes before consequences."""
        return verdict.problems(self)

    @property
    def verdict(self) -> str:
        """One sentence."""
        return verdict.sentence(self)


def compare(
    base: Captured, candidate: Captured, *, rtol: float | None = None, module_rtol: float | None = None
) -> Comparison:
    """Tolerances are those of the runs' dtype but for what is given.

    Raises:
        CaptureError: the two cannot be laid side by side.
    """
    refuse_other_data(base, candidate)
    dtypes = [run.manifest["dtype"] for run in (base, candidate)]
    dtype = next((dtype for dtype in dtypes if dtype != "float32"), "float32")  # the coarser
    found = Comparison(tolerance=Tolerance.of(dtype, loss=rtol, module=module_rtol), dtype=dtype)
    _compare_records(found, base, candidate)
    shared = [step for step in base.manifest["steps"] if step in candidate.manifest["steps"]]
    if not found.losses or not shared:
        raise CaptureError(f"{base.folder} and {candidate.folder} share no step")
    for step in shared:
        _compare_step(found, step, base, candidate)
        _compare_parameters(found, step, base.parameters.get(step), candidate.parameters.get(step))
    found.gradients = _compare_gradients(base.gradients(shared[0]), candidate.gradients(shared[0]))
    return found


@dataclass(frozen=True, kw_only=True)
class Born:
    """What differs in the first step though every sublayer is fed with what it was given in the other run.

    Attributes:
        sublayers: their outputs.
        flipped: tokens that a router sends to other experts, at equal inputs; summed over layers.
    """

    sublayers: list[ModuleDifference]
    flipped: int

    @property
    def share_of_moe(self) -> float:
        """The MoE layers' part of the sum of mean squares, all sublayers counted; 0 where nothing differs."""
        squares = {m.module: m.absolute**2 for m in self.sublayers}
        whole = sum(squares.values())
        return sum(v for name, v in squares.items() if name.endswith(".moe")) / whole if whole else 0.0


def born_inside(base: Captured, fed: Captured) -> Born:
    """``fed`` ran with ``numerics.inputs_of`` set to ``base``."""
    step, tolerance = base.manifest["steps"][0], Tolerance.of(fed.manifest["dtype"])
    order, seq_len = base.manifest["modules"], base.manifest["seq_len"]
    found = StepDifference(step, order, base.step(step), fed.step(step), tolerance, seq_len=seq_len)
    return Born(sublayers=only_sublayers(found.modules), flipped=sum(f.flipped for f in found.flips))


def refuse_other_data(base: Captured, candidate: Captured) -> None:
    """Raises CaptureError where the two runs cannot have seen the same tokens."""
    sizes = [(run.manifest["sequences"], run.manifest["seq_len"]) for run in (base, candidate)]
    if sizes[0] != sizes[1]:
        (n, length), (other_n, other_length) = sizes
        raise CaptureError(
            f"{base.folder} takes {n} sequences of {length} tokens a step, {candidate.folder} {other_n} of "
            f"{other_length}: other data; set training.global_batch_size and training.seq_len alike"
        )


def _compare_records(found: Comparison, base: Captured, candidate: Captured) -> None:
    mine, theirs = ({record["step"]: record for record in run.records} for run in (base, candidate))
    for step in sorted(mine.keys() & theirs.keys()):
        one, other = mine[step], theirs[step]
        found.losses.append((step, one["loss"], other["loss"]))
        found.grad_norms.append((step, one["grad_norm"], other["grad_norm"]))
        rates = [list(record.get("lr", {}).values()) for record in (one, other)]
        found.rates.append((step, rates[0], rates[1]))
    if only := sorted(mine.keys() ^ theirs.keys()):
        found.alone.append(f"steps {only[0]} to {only[-1]}")


def _compare_step(found: Comparison, step: int, base: Captured, candidate: Captured) -> None:
    order, seq_len = base.manifest["modules"], base.manifest["seq_len"]
    left, right = base.step(step), candidate.step(step)
    walk = StepDifference(step, order, left, right, found.tolerance, seq_len=seq_len)
    found.modules += walk.modules
    found.flips += walk.flips
    found.keys = (len(left.keys() & right.keys()), len(left.keys() | right.keys()))
    held = {key for key in left.keys() ^ right.keys() if verdict.on_every_mesh(key)}
    found.alone += [f"{key.replace('|', ' ')} at step {step}" for key in sorted(held)]


def _compare_parameters(
    found: Comparison, step: int, mine: dict[str, Any] | None, theirs: dict[str, Any] | None
) -> None:
    if mine is None or theirs is None:
        found.alone.append(f"gradient norms of step {step}")
        return
    for name in sorted(mine["norms"].keys() | theirs["norms"].keys()):
        one, other = mine["norms"].get(name), theirs["norms"].get(name)
        if one is None or other is None:
            ratio = math.inf if one is None else 0.0
        else:
            ratio = 1.0 if relative(one, other) == 0 else other / max(one, 1e-30)
        found.gradient_norms.setdefault(name, {})[step] = ratio
    biases, others = mine["expert_biases"], theirs["expert_biases"]
    found.expert_biases += [(step, name) for name in biases if biases[name] != others.get(name)]


def _compare_gradients(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    found = {}
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            found[name] = (math.inf, math.inf if name in right else 0.0)  # a gradient of nothing
            continue
        one, other = left[name].double(), right[name].double()
        if one.shape != other.shape:
            shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
            raise CaptureError(f"gradients of {name} have shapes {shapes}: another model")
        norm, off = one.norm().clamp_min(1e-30), float((one - other).norm())
        difference = off / float(norm)
        ratio = float(other.norm() / norm) if off else 1.0
        found[name] = (difference if math.isfinite(difference) else math.inf, ratio)
    return found
