"""Two captured runs against each other: where they first differ, how much, by rounding or by routing."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_moe.numerics.load import Captured, CaptureError

NEAR_TIE = 1e-3  # of the router's scores: a route that flips at a smaller margin is rounding


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What is still the same. ``module`` is of a module's output, ``gradient`` of a gradient's norm."""

    first_loss: float = 1e-6
    loss: float = 1e-4
    gradient: float = 1e-5
    module: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class ModuleDifference:
    """One module at one step.

    Attributes:
        relative: root mean square of the tokens' differences over that of their norms.
        differing: tokens whose bits differ.
        first_token: the first of them, -1 without.
        worst_token: the one that is farthest off.
    """

    step: int
    module: str
    relative: float
    tokens: int
    differing: int
    first_token: int
    worst_token: int
    missing: int = 0  # tokens that only one run has


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Tokens of a layer and step whose set of experts differs."""

    step: int
    layer: str
    tokens: int
    flipped: int
    suspicious: int  # of them, at a margin that rounding does not explain
    first_token: int


@dataclass(kw_only=True)
class Comparison:
    """Everything that was found."""

    losses: list[tuple[int, float, float]] = field(default_factory=list)  # step, baseline, candidate
    grad_norms: list[tuple[int, float, float]] = field(default_factory=list)
    gradients: dict[str, tuple[float, float]] = field(default_factory=dict)  # relative difference, norm ratio
    modules: list[ModuleDifference] = field(default_factory=list)
    flips: list[Flips] = field(default_factory=list)
    tolerance: Tolerance = field(default_factory=Tolerance)

    @property
    def bitwise(self) -> bool:
        """Losses, norms, gradients, every token of every module, and all routes."""
        same = all(a == b for _, a, b in (*self.losses, *self.grad_norms))
        gradients = all(difference == 0 for difference, _ in self.gradients.values())
        modules = all(not m.differing and not m.missing for m in self.modules)
        return same and gradients and modules and not any(flips.flipped for flips in self.flips)

    @property
    def problems(self) -> list[str]:
        """What is beyond tolerance, first things first."""
        found = []
        for step, base, candidate in self.losses:
            limit = self.tolerance.first_loss if step == self.losses[0][0] else self.tolerance.loss
            if not relative(base, candidate) <= limit:
                found.append(f"loss at step {step}: {base:.6g} and {candidate:.6g}")
                break
        wrong = {n: d for n, (d, _) in self.gradients.items() if not d <= self.tolerance.gradient}
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            ratio = self.gradients[worst][1]
            found.append(f"gradient of {worst}: {wrong[worst]:.2g} of its norm, norm ratio {ratio:.4g}")
        if (place := self.first_module) is not None:
            token = place.first_token if place.missing else place.worst_token
            found.append(f"{place.module} at step {place.step}, token {token}: {place.relative:.2g}")
        suspicious = next((flips for flips in self.flips if flips.suspicious), None)
        if suspicious is not None:
            found.append(
                f"{suspicious.layer} at step {suspicious.step} routes {suspicious.suspicious} tokens away "
                f"against a clear margin, the first of {suspicious.flipped} is token {suspicious.first_token}"
            )
        return found

    @property
    def first_module(self) -> ModuleDifference | None:
        """In the first step, the first module in forward order that is beyond tolerance."""
        steps = sorted({m.step for m in self.modules})
        here = [m for m in self.modules if steps and m.step == steps[0]]
        return next((m for m in here if m.missing or not m.relative <= self.tolerance.module), None)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.bitwise:
            return f"bitwise equal over {len(self.losses)} steps"
        if not self.problems:
            worst = max((relative(a, b) for _, a, b in self.losses), default=0.0)
            return f"within tolerance over {len(self.losses)} steps: losses differ by {worst:.2g} at most"
        return f"different: {'; '.join(self.problems)}"


def relative(base: float, candidate: float) -> float:
    """|difference| over |base|; infinite where one is not a number."""
    if math.isnan(base) or math.isnan(candidate):
        return math.inf
    return abs(base - candidate) / max(abs(base), 1e-30)


def compare(base: Captured, candidate: Captured, tolerance: Tolerance) -> Comparison:
    """Raises CaptureError where the two cannot be laid side by side."""
    found = Comparison(tolerance=tolerance)
    ours = {record["step"]: record for record in candidate.records}
    for record in base.records:
        if (other := ours.get(record["step"])) is not None:
            found.losses.append((record["step"], record["loss"], other["loss"]))
            found.grad_norms.append((record["step"], record["grad_norm"], other["grad_norm"]))
    if not found.losses:
        raise CaptureError(f"{base.folder} and {candidate.folder} share no step")
    for step in base.manifest["steps"]:
        if step in candidate.manifest["steps"]:
            _compare_step(found, step, base, candidate)
            _compare_gradients(found, base.gradients(step), candidate.gradients(step))
    return found


def _compare_step(found: Comparison, step: int, base: Captured, candidate: Captured) -> None:
    left, right = base.step(step), candidate.step(step)
    for key in base.manifest["modules"]:
        if key not in left or key not in right:
            continue
        both, missing = _side_by_side(left[key], right[key])
        if key.endswith("|route"):
            found.flips.append(_flips(step, key.removesuffix("|route"), both))
        else:
            found.modules.append(_module(step, key, both, missing))


def _side_by_side(left: Any, right: Any) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
    """Columns of the tokens that both have, and how many only one has."""
    mine, theirs = left["tokens"], right["tokens"]
    if torch.equal(mine, theirs):
        return {name: (left[name], right[name]) for name in left}, 0
    in_left, in_right = torch.isin(mine, theirs), torch.isin(theirs, mine)
    missing = int((~in_left).sum() + (~in_right).sum())
    return {name: (left[name][in_left], right[name][in_right]) for name in left}, missing


def _module(step: int, key: str, both: Any, missing: int) -> ModuleDifference:
    tokens = both["tokens"][0]
    differs = both["bits_T"][0] != both["bits_T"][1]
    off = (both["projection_T"][0] - both["projection_T"][1]).square()
    scale = both["norm_T"][0].square().mean().clamp_min(1e-60) if len(tokens) else torch.tensor(1.0)
    return ModuleDifference(
        step=step,
        module=key.replace("|out", "").replace("|grad", " (gradient)"),
        relative=float((off.mean() / scale).sqrt()) if len(tokens) else 0.0,
        tokens=len(tokens),
        differing=int(differs.sum()),
        first_token=int(tokens[differs.int().argmax()]) if differs.any() else -1,
        worst_token=int(tokens[off.argmax()]) if differs.any() else -1,
        missing=missing,
    )


def _flips(step: int, layer: str, both: Any) -> Flips:
    tokens = both["tokens"][0]
    flipped = (both["ids"][0] != both["ids"][1]).any(1)
    clear = torch.minimum(*both["margin"]) > NEAR_TIE
    return Flips(
        step=step,
        layer=layer,
        tokens=len(tokens),
        flipped=int(flipped.sum()),
        suspicious=int((flipped & clear).sum()),
        first_token=int(tokens[flipped.int().argmax()]) if flipped.any() else -1,
    )


def _compare_gradients(
    found: Comparison, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]
) -> None:
    for name in left.keys() & right.keys():
        norm = left[name].double().norm()
        off = (left[name].double() - right[name].double()).norm()
        floor = norm.clamp_min(1e-30)
        found.gradients[name] = (float(off / floor), float(right[name].double().norm() / floor))
