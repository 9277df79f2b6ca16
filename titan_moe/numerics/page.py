"""A Report for the browser: one page that needs nothing else."""

import math
from html import escape
from pathlib import Path

from titan_moe.numerics import svg
from titan_moe.numerics.compare import Comparison
from titan_moe.numerics.report import Report
from titan_moe.numerics.tolerance import relative

MOST_PARAMETERS = 24


def write(path: Path, found: Report) -> None:
    """Writes the page."""
    free = found.free
    sections = [
        ("Loss", "", _losses(free)),
        ("Difference of the losses, relative", _HELP_GAPS if found.replayed else "", _gaps(found)),
        ("Where it differs: modules in forward order, by step", _HELP_MAP, _outputs(free)),
        ("Where it is born: sublayers at equal inputs, step 1", _HELP_BORN, _born(found)),
        ("Tokens that change experts", _HELP_FLIPS, _flips(free)),
        (f"Gradients of step {_first_step(free)}: difference over norm, worst first", "", _gradients(free)),
        ("Gradient norms by step: |log ratio|, worst first", "", _norms(free)),
    ]
    drawn = "".join(
        f"<section><h2>{escape(title)}</h2>{f'<p>{escape(words)}</p>' if words else ''}{plot}</section>"
        for title, words, plot in sections
        if plot
    )
    about = dict(found.about)
    if found.replayed is not None:
        about["on the baseline's routes"] = found.replayed.verdict
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in about.items())
    page = _PAGE.format(verdict=escape(free.verdict), kind=_kind(free), about=rows, body=drawn)
    path.write_text(page, encoding="utf-8")


def _kind(free: Comparison) -> str:
    return "same" if free.bitwise else "different" if free.problems else "close"


def _first_step(free: Comparison) -> int:
    return min((m.step for m in free.modules), default=1)


def _losses(free: Comparison) -> str:
    return svg.lines(
        {"baseline": [(s, a) for s, a, _ in free.losses], "candidate": [(s, b) for s, _, b in free.losses]}
    )


def _gaps(found: Report) -> str:
    named = {"candidate": found.free, "numerics": found.replayed, "routing": found.routing}
    curves: dict[str, svg.Curve] = {
        name: [(step, relative(base, candidate)) for step, base, candidate in part.losses]
        for name, part in named.items()
        if part is not None
    }
    return svg.lines(curves, log=True)


def _outputs(free: Comparison) -> str:
    outputs = [m for m in free.modules if "(gradient)" not in m.module]
    steps = [str(step) for step in sorted({m.step for m in outputs})]
    names = list(dict.fromkeys(m.module for m in outputs))
    return svg.heat(names, steps, {(m.module, str(m.step)): m.relative for m in outputs})


def _born(found: Report) -> str:
    if found.born is None:
        return ""
    shown = {m.module: m.absolute for m in found.born.sublayers}
    return svg.bars(shown, marked=[name for name in shown if name.endswith(".moe")])


def _flips(free: Comparison) -> str:
    layers = list(dict.fromkeys(f.layer for f in free.flips))
    steps = [str(step) for step in sorted({f.step for f in free.flips})]
    return svg.heat(layers, steps, {(f.layer, str(f.step)): f.flipped for f in free.flips})


def _gradients(free: Comparison) -> str:
    worst = sorted(free.gradients.items(), key=lambda item: -item[1][0])[:MOST_PARAMETERS]
    return svg.bars({name: off for name, (off, _) in worst}, log=True)


def _norms(free: Comparison) -> str:
    logs = {
        name: {step: abs(math.log(max(ratio, 1e-30))) for step, ratio in by_step.items()}
        for name, by_step in free.gradient_norms.items()
    }
    worst = sorted(logs, key=lambda name: -max(logs[name].values()))[:MOST_PARAMETERS]
    steps = sorted({step for by in logs.values() for step in by})
    cells = {(name, str(step)): value for name in worst for step, value in logs[name].items()}
    return svg.heat(worst, [str(step) for step in steps], cells)


_HELP_GAPS = (
    "numerics: the candidate on the baseline's routes, against the baseline: rounding alone. "
    "routing: the candidate on its own routes, against itself on the baseline's: what flips do."
)
_HELP_MAP = (
    "Root mean square of the tokens' differences over that of their norms, without tokens that go to other "
    "experts by a near tie. White: the same bits."
)
_HELP_BORN = (
    "Each sublayer is fed with what it was given in the baseline: its output differs by what it makes "
    "itself. In units of the residual stream; MoE layers in the second colour."
)
_HELP_FLIPS = "By layer and step."

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>numerics</title><style>
:root {{ --ink: #1d2733; --soft: #5d6b7a; --line: #dfe5ec; --paper: #f6f8fa }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 }}
header, main {{ max-width: 1280px; margin: 0 auto; padding: 24px }}
h1 {{ font-size: 19px; font-weight: 600; margin: 0 0 12px; padding: 12px 16px; border-radius: 8px;
  color: #fff; overflow-wrap: anywhere }}
h1.same {{ background: #1c7a4a }} h1.close {{ background: #2563a8 }} h1.different {{ background: #b3261e }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; color: var(--soft) }}
dd {{ margin: 0; overflow-wrap: anywhere }} dt {{ font-weight: 600 }}
main {{ columns: 2 540px; column-gap: 20px; padding-top: 0 }}
section {{ background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  margin: 0 0 20px; break-inside: avoid; overflow-x: auto }}
h2 {{ font-size: 15px; margin: 0 0 4px }}
p {{ color: var(--soft); margin: 0 0 8px; font-size: 13px }}
svg {{ max-width: 100%; height: auto; display: block }}
</style></head><body>
<header><h1 class="{kind}">{verdict}</h1><dl>{about}</dl></header><main>{body}</main>
</body></html>
"""
