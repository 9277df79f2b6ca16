"""What a comparison says: on the console, and for programs."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_moe.numerics.compare import Born, Comparison
from titan_moe.numerics.tolerance import relative


@dataclass(kw_only=True)
class Report:
    """All that one command found.

    Attributes:
        about: which runs they were.
        free: baseline and candidate.
        replayed: baseline and the candidate on the baseline's routes: rounding, no flips.
        routing: the candidate on the baseline's routes and on its own: what flips do.
        born: which sublayers differ at equal inputs.
    """

    about: dict[str, str]
    free: Comparison
    replayed: Comparison | None = None
    routing: Comparison | None = None
    born: Born | None = None


def console(found: Report) -> str:
    """A table of steps, then what is worst, then the verdict."""
    columns = {"difference": found.free, "numerics": found.replayed, "routing": found.routing}
    there = {name: _gaps(comparison) for name, comparison in columns.items() if comparison is not None}
    lines = [f"{'step':>5}  {'baseline':>14}  {'candidate':>14}" + "".join(f"  {name:>10}" for name in there)]
    for step, base, candidate in found.free.losses:
        gaps = "".join(f"  {gap[step]:>10.2e}" for gap in there.values())
        lines.append(f"{step:>5}  {base:>14.8f}  {candidate:>14.8f}{gaps}")
    lines += [*_first(found.free), *_born(found.born), *_gradients(found.free), *_flips(found.free)]
    if found.replayed is not None:
        lines.append(f"on the baseline's routes: {found.replayed.verdict}")
    return "\n".join([*lines, f"verdict: {found.free.verdict}"])


def write_json(path: Path, found: Report) -> None:
    """Everything."""
    parts = {"free": found.free, "replayed": found.replayed, "routing": found.routing}
    report: dict[str, Any] = {"about": found.about}
    report |= {name: _plain(part) for name, part in parts.items() if part is not None}
    if found.born is not None:
        report["born"] = dataclasses.asdict(found.born) | {"share_of_moe": found.born.share_of_moe}
    path.write_text(json.dumps(_json(report), indent=1, allow_nan=False), encoding="utf-8")


def _json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value


def _gaps(comparison: Comparison) -> dict[int, float]:
    return {step: relative(base, candidate) for step, base, candidate in comparison.losses}


def _first(free: Comparison) -> list[str]:
    first = free.first_difference
    compared = f"compared: {free.keys[0]} of the {free.keys[1]} that a run has: outputs, gradients, routes"
    if first is None:
        return [compared]
    return [
        compared,
        f"first difference: {first.module} at step {first.step}, {first.differing} of {first.tokens} tokens, "
        f"{first.relative:.2e}, first token {first.first_token}",
    ]


def _born(born: Born | None) -> list[str]:
    if born is None:
        return []
    worst = sorted(born.sublayers, key=lambda m: -m.absolute)[:3]
    named = ", ".join(f"{m.module} {m.relative:.1e}" for m in worst if m.absolute) or "nowhere"
    return [
        f"born in step 1, at equal inputs: {born.share_of_moe:.1%} inside MoE layers; {born.flipped} routes "
        f"flip; most in {named}"
    ]


def _gradients(free: Comparison) -> list[str]:
    worst = sorted(free.gradients.items(), key=lambda item: -item[1][0])[:3]
    return [f"gradient {name}: {off:.2e} of its norm, norm ratio {ratio:.6f}" for name, (off, ratio) in worst]


def _flips(free: Comparison) -> list[str]:
    if not free.flips:
        return []
    total, near, following, suspicious, tokens = (
        sum(getattr(f, name) for f in free.flips)
        for name in ("flipped", "near", "following", "suspicious", "tokens")
    )
    first = free.first_flip
    where = "" if first is None else f"; first {first.layer} at step {first.step}, token {first.first_token}"
    return [
        f"routes that flip: {total} of {tokens}: {near} near ties, {following} that flipped in an earlier "
        f"layer, {suspicious} suspicious{where}"
    ]


def _plain(comparison: Comparison) -> dict[str, Any]:
    first = {
        name: dataclasses.asdict(value)
        for name in ("first_difference", "first_beyond", "first_flip")
        if (value := getattr(comparison, name)) is not None
    }
    verdict = {name: getattr(comparison, name) for name in ("verdict", "bitwise", "problems")}
    return verdict | first | dataclasses.asdict(comparison)
