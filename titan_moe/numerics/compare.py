"""Two captured runs against each other: where they first differ, how much, by rounding or by routing."""

import math
from dataclasses import dataclass, field

import torch

from titan_moe.numerics.differences import (
    Flips,
    ModuleDifference,
    compare_modules,
    compare_routes,
    only_sublayers,
)
from titan_moe.numerics.load import Captured, CaptureError
from titan_moe.numerics.tolerance import Tolerance


@dataclass(kw_only=True)
class Comparison:
    """Everything that was found.

    Attributes:
        losses, grad_norms, rates: by step: baseline's, candidate's.
        gradients: of the first step, by parameter: difference over norm, ratio of norms.
        gradient_norms: by parameter, by step: ratio of norms.
        modules: by step, then forward order, then backward order.
    """

    tolerance: Tolerance
    dtype: str
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    grad_norms: list[tuple[int, float, float]] = field(default_factory=list)
    rates: list[tuple[int, list[float], list[float]]] = field(default_factory=list)
    gradients: dict[str, tuple[float, float]] = field(default_factory=dict)
    gradient_norms: dict[str, dict[int, float]] = field(default_factory=dict)
    modules: list[ModuleDifference] = field(default_factory=list)
    flips: list[Flips] = field(default_factory=list)

    @property
    def bitwise(self) -> bool:
        """Losses, norms, gradients, every token of every module, and all routes."""
        same = all(a == b for _, a, b in (*self.losses, *self.grad_norms))
        gradients = all(difference == 0 for difference, _ in self.gradients.values())
        modules = all(not m.differing and not m.missing for m in self.modules)
        return same and gradients and modules and not any(flips.flipped for flips in self.flips)

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
        """In the first step, the first module that is beyond tolerance: later steps carry on what it did."""
        steps = {m.step for m in self.modules}
        here = [m for m in self.modules if m.step == min(steps)]
        return next((m for m in here if m.missing or not m.relative <= self.tolerance.module), None)

    @property
    def first_flip(self) -> Flips | None:
        """The first layer, of the first step that has one, where a token goes to other experts."""
        return next((flips for flips in self.flips if flips.flipped), None)

    @property
    def problems(self) -> list[str]:
        """What is beyond tolerance, causes before consequences."""
        found = (self._rate(), self._place(), self._gradient(), self._flip(), self._loss())
        return [problem for problem in found if problem is not None]

    def _rate(self) -> str | None:
        found = next((rate for rate in self.rates if rate[1] != rate[2]), None)
        return None if found is None else f"learning rates at step {found[0]}: {found[1]} and {found[2]}"

    def _place(self) -> str | None:
        place = self.first_beyond
        if place is None:
            return None
        missing = f", {place.missing} tokens only in one run" if place.missing else ""
        return f"{place.module} at step {place.step} by {place.relative:.2g} ({place.beyond}){missing}"

    def _gradient(self) -> str | None:
        wrong = {n: d for n, (d, _) in self.gradients.items() if not d <= self.tolerance.gradient}
        if not wrong:
            return None
        worst = max(wrong, key=lambda name: wrong[name])
        ratio, others = self.gradients[worst][1], f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        return f"gradient of {worst}{others} by {wrong[worst]:.2g} of its norm, norm ratio {ratio:.4g}"

    def _flip(self) -> str | None:
        found = next((flips for flips in self.flips if flips.suspicious), None)
        if found is None:
            return None
        return (
            f"{found.layer} at step {found.step} sends {found.suspicious} of {found.tokens} tokens to other "
            f"experts against a clear margin, first token {found.first_suspicious}"
        )

    def _loss(self) -> str | None:
        for step, base, candidate in self.losses:
            first = step == self.losses[0][0]
            if not relative(base, candidate) <= (self.tolerance.first_loss if first else self.tolerance.loss):
                return f"loss at step {step}: {base:.6g} and {candidate:.6g}"
        return None

    @property
    def verdict(self) -> str:
        """One sentence."""
        steps = f"{len(self.losses)} step{'s' if len(self.losses) != 1 else ''}"
        if self.bitwise:
            return f"bitwise equal over {steps}"
        if not self.problems:
            worst = f"losses differ by {self.worst_loss:.2g} at most"
            return f"within {self.dtype} tolerance over {steps}: {worst}"
        return f"different: {'; '.join(self.problems)}"


def relative(base: float, candidate: float) -> float:
    """|difference| over |base|; infinite where one is not a number."""
    if math.isnan(base) or math.isnan(candidate):
        return math.inf
    return abs(base - candidate) / max(abs(base), 1e-30)


def compare(
    base: Captured, candidate: Captured, *, rtol: float | None = None, module_rtol: float | None = None
) -> Comparison:
    """Tolerances are those of the runs' dtype but for what is given.

    Raises:
        CaptureError: the two cannot be laid side by side.
    """
    _refuse_other_data(base, candidate)
    dtypes = [run.manifest["dtype"] for run in (base, candidate)]
    dtype = next((dtype for dtype in dtypes if dtype != "float32"), "float32")  # the coarser
    found = Comparison(tolerance=Tolerance.of(dtype, loss=rtol, module=module_rtol), dtype=dtype)
    theirs = {record["step"]: record for record in candidate.records}
    for record in base.records:
        step = record["step"]
        if (other := theirs.get(step)) is not None:
            found.losses.append((step, record["loss"], other["loss"]))
            found.grad_norms.append((step, record["grad_norm"], other["grad_norm"]))
            found.rates.append((step, list(record["lr"].values()), list(other["lr"].values())))
    shared = [step for step in base.manifest["steps"] if step in candidate.manifest["steps"]]
    if not found.losses or not shared:
        raise CaptureError(f"{base.folder} and {candidate.folder} share no step")
    for step in shared:
        _compare_step(found, step, base, candidate)
    _compare_norms(found, shared, base, candidate)
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


def born_inside(base: Captured, forced: Captured) -> Born:
    """``forced`` ran with ``numerics.inputs_of`` set to ``base``."""
    order, step = base.manifest["modules"], base.manifest["steps"][0]
    left, right, tolerance = base.step(step), forced.step(step), Tolerance.of(forced.manifest["dtype"])
    flips = compare_routes(step, order, left, right, tolerance)
    modules = compare_modules(
        step, order, left, right, tolerance, seq_len=base.manifest["seq_len"], flips=flips
    )
    return Born(sublayers=only_sublayers(modules), flipped=sum(f.flipped for f in flips))


def _refuse_other_data(base: Captured, candidate: Captured) -> None:
    sizes = [(run.manifest["sequences"], run.manifest["seq_len"]) for run in (base, candidate)]
    if sizes[0] != sizes[1]:
        (n, length), (other_n, other_length) = sizes
        raise CaptureError(
            f"{base.folder} takes {n} sequences of {length} tokens a step, {candidate.folder} {other_n} of "
            f"{other_length}: other data; set training.global_batch_size and training.seq_len alike"
        )


def _compare_step(found: Comparison, step: int, base: Captured, candidate: Captured) -> None:
    order, seq_len = base.manifest["modules"], base.manifest["seq_len"]
    left, right = base.step(step), candidate.step(step)
    flips = compare_routes(step, order, left, right, found.tolerance)
    found.flips += flips
    found.modules += compare_modules(step, order, left, right, found.tolerance, seq_len=seq_len, flips=flips)
    if not found.gradients:
        found.gradients = _compare_gradients(base.gradients(step), candidate.gradients(step))


def _compare_gradients(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    found = {}
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            found[name] = (math.inf, math.inf if name in right else 0.0)  # a gradient of nothing
            continue
        norm = left[name].double().norm()
        off = (left[name].double() - right[name].double()).norm()
        floor = norm.clamp_min(1e-30)
        found[name] = (float(off / floor), float(right[name].double().norm() / floor) if off else 1.0)
    return found


def _compare_norms(found: Comparison, steps: list[int], base: Captured, candidate: Captured) -> None:
    for step in steps:
        mine, theirs = base.gradient_norms[step], candidate.gradient_norms[step]
        for name in mine.keys() & theirs.keys():
            found.gradient_norms.setdefault(name, {})[step] = theirs[name] / max(mine[name], 1e-30)
