"""Two captured runs against each other: where they first differ, how much, by rounding or by routing."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from titan_moe.numerics import verdict
from titan_moe.numerics.differences import ModuleDifference, StepDifference, only_sublayers
from titan_moe.numerics.load import Captured, CaptureError
from titan_moe.numerics.observed import Observed
from titan_moe.numerics.tolerance import Tolerance, relative


@dataclass(kw_only=True)
class Comparison(Observed):
    """Two runs compared: what was observed, and the verdict on it."""

    @property
    def problems(self) -> list[str]:
        """What is beyond tolerance, causes before consequences."""
        return verdict.problems(self)

    @property
    def verdict(self) -> str:
        """The verdict in one sentence."""
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
