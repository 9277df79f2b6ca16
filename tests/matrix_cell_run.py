"""One cell of tests/matrix.py: run, and judged against one rank."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.matrix_cells import ROOT, STEPS, Cell
from tests.ranks import run_ranks
from tests.training import train
from titan_moe.layer.moe import MoE

CONFIG = str(ROOT / "train_configs" / "debug_local.toml")
QUIET = "--debug.no-enable_structured_logging"
TIMEOUT_S = 280.0
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
    """Runs cells below ``folder``, all from one seed; the references are made once."""

    folder: Path
    references: dict[Cell, list[dict[str, Any]]] = field(default_factory=dict)

    def run(self, cell: Cell, sabotage: Callable[[list[MoE]], None] | None = None) -> Held:
        """Trains in worker processes of ``tests.ranks``, and compares; ``sabotage`` is a planted fault."""
        reference = self._reference(cell)
        ranks = self._train(cell, reference.name, sabotage)
        return judge(ranks, self.references[reference], cell)

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
        argv = [CONFIG, f"--dump_folder={self.folder / cell.name}", QUIET, *cell.flags]
        whole = str(self.folder / f"whole-{reference}")
        in_step = cell.pp == 1  # stages hold other layers, and the first and the last send less
        try:
            return run_ranks(train, cell.ranks, argv, whole, sabotage, timeout_s=TIMEOUT_S, in_step=in_step)
        finally:
            shutil.rmtree(self.folder / cell.name, ignore_errors=True)


def judge(ranks: list[dict[str, Any]], reference: list[dict[str, Any]], cell: Cell) -> Held:
    """Every rank's results against the reference's; under PP a rank tells of its own stages."""
    told = {key: _worst(ranks, key) for key in ("gradient_errors", "parameter_errors")}
    problems = _missing(told, ranks)
    problems += [f"first value of {name}" for rank in ranks for name in rank["unequal_starts"][:1]]
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
