"""A Comparison for the console, for programs and for the browser."""

import dataclasses
import json
import math
from html import escape
from pathlib import Path
from typing import Any

from titan_moe.numerics import svg
from titan_moe.numerics.compare import Comparison, relative


def console(free: Comparison, replayed: Comparison | None, *, base: str, candidate: str) -> str:
    """A table of steps, then what is worst, then the verdict."""
    head = f"{'step':>5}  {base:>14}  {candidate:>14}  {'difference':>10}"
    steps = {} if replayed is None else {step: relative(a, b) for step, a, b in replayed.losses}
    lines = [head + (f"  {'replayed':>10}" if steps else "")]
    for step, a, b in free.losses:
        line = f"{step:>5}  {a:>14.8f}  {b:>14.8f}  {relative(a, b):>10.2e}"
        lines.append(line + (f"  {steps[step]:>10.2e}" if step in steps else ""))
    worst = sorted(free.gradients.items(), key=lambda item: -item[1][0])[:3]
    lines += [
        f"gradient {name}: {off:.2e} of its norm, norm ratio {ratio:.6f}" for name, (off, ratio) in worst
    ]
    flipped = sum(f.flipped for f in free.flips)
    if free.flips:
        suspicious = sum(f.suspicious for f in free.flips)
        first = next((f"{f.layer} at step {f.step}" for f in free.flips if f.flipped), "nowhere")
        lines.append(f"routes that flip: {flipped} tokens, {suspicious} of them suspicious, first {first}")
    if replayed is not None:
        lines.append(f"on the baseline's routes: {replayed.verdict}")
    return "\n".join([*lines, f"verdict: {free.verdict}"])


def write_json(path: Path, free: Comparison, replayed: Comparison | None, about: dict[str, Any]) -> None:
    """Everything, for programs."""
    report = {"about": about, "free": _plain(free)}
    if replayed is not None:
        report["replayed"] = _plain(replayed)
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


def write_html(path: Path, free: Comparison, replayed: Comparison | None, about: dict[str, Any]) -> None:
    """One page with everything in it."""
    both: dict[str, svg.Curve] = {
        "baseline": [(s, a) for s, a, _ in free.losses],
        "candidate": [(s, b) for s, _, b in free.losses],
    }
    gaps: dict[str, svg.Curve] = {"free": [(s, relative(a, b)) for s, a, b in free.losses]}
    if replayed is not None:
        gaps["on the baseline's routes"] = [(s, relative(a, b)) for s, a, b in replayed.losses]
    outputs = [m for m in free.modules if "(gradient)" not in m.module]
    steps = sorted({m.step for m in outputs})
    names = list(dict.fromkeys(m.module for m in outputs))
    cells = {(m.module, str(m.step)): m.relative for m in outputs}
    flips: dict[str, float] = {}
    for flip in free.flips:
        flips[flip.layer] = flips.get(flip.layer, 0) + flip.flipped
    off = {name: d for name, (d, _) in sorted(free.gradients.items(), key=lambda item: -item[1][0])}
    ratio = {
        name: abs(math.log(max(r, 1e-30)))
        for name, (_, r) in sorted(free.gradients.items(), key=lambda i: -abs(math.log(max(i[1][1], 1e-30))))
    }
    sections = [
        ("Loss", svg.lines(both)),
        ("|difference| of the loss, relative", svg.lines(gaps, log=True)),
        (
            "Where it differs: modules in forward order, by step",
            svg.heat(names, [str(s) for s in steps], cells),
        ),
        ("Tokens whose route flips, by layer", svg.bars(flips)),
        ("Gradients of step 1: difference over norm, worst first", svg.bars(off)),
        ("Gradients of step 1: |log of the norms' ratio|, worst first", svg.bars(ratio)),
    ]
    lines = "".join(f"<li>{escape(f'{key}: {value}')}</li>" for key, value in about.items())
    verdict = escape(free.verdict)
    if replayed is not None:
        verdict += f"<br>on the baseline's routes: {escape(replayed.verdict)}"
    body = "".join(f"<section><h2>{escape(title)}</h2>{plot}</section>" for title, plot in sections)
    path.write_text(_PAGE.format(verdict=verdict, about=lines, body=body), encoding="utf-8")


def _plain(comparison: Comparison) -> dict[str, Any]:
    return dataclasses.asdict(comparison) | {
        "verdict": comparison.verdict,
        "bitwise": comparison.bitwise,
        "problems": comparison.problems,
    }


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>numerics</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 24px auto;
  padding: 0 24px }}
h1 {{ font-size: 20px; font-weight: 600 }} h2 {{ font-size: 15px; margin: 0 0 6px }}
main {{ display: flex; flex-wrap: wrap; gap: 28px }} section {{ overflow-x: auto; max-width: 100% }}
ul {{ color: #555; padding-left: 18px }} svg {{ font-family: inherit; max-width: 100%; height: auto }}
</style></head><body><h1>{verdict}</h1><ul>{about}</ul><main>{body}</main></body></html>
"""
