"""The bench as one picture: a layer's time per shape as bars, its growth as lines."""

import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from titan_moe.bench.contestants import FLOOR, OURS, STOCK
from titan_moe.bench.interleave import spread
from titan_moe.bench.report import Found
from titan_moe.numerics import svg

WIDTH, HEIGHT, MARGIN = 360, 240, 44
_BLUE, _ORANGE, _GREEN = svg.COLORS
_FIXED = {STOCK: "#8a949e", OURS: _BLUE, FLOOR: _ORANGE}  # other variants of ours are green
Curves = dict[str, list[tuple[float, float]]]


def picture(parts: dict[str, Found]) -> str:
    """An SVG of the parts ``layer`` and ``growth``, as far as they were measured."""
    drawn = []
    if "layer" in parts:
        drawn.append(_titled("layer: ms, forward and backward", _bars(parts["layer"])))
    for row, sizes in parts.get("growth", {}).items():
        curves: Curves = {}
        for size, seconds in sizes.items():
            for name, taken in seconds.items():
                curves.setdefault(name, []).append((float(size), _ms(taken)))
        drawn.append(_titled(f"growth over {row}: ms, both axes logarithmic", _lines(curves)))
    return _stacked(drawn)


def _bars(layer: Found) -> str:
    """A group of bars per shape, each as long as its time is beside the shape's longest."""
    drawn, y = [], 4
    for shape, sides in layer.items():
        times = {name: _ms(taken) for name, taken in sides["seconds"].items()}
        drawn.append(_words(8, y + 12, shape))
        for name, ms in times.items():
            color, length = _FIXED.get(name, _GREEN), 220 * ms / max(times.values())
            drawn.append(f'<rect x="190" y="{y + 2}" width="{length:.1f}" height="12" fill="{color}"/>')
            drawn.append(_words(196 + length, y + 12, f"{name} {ms:.1f}", color=color))
            y += 16
        y += 10
    return _svg(520, y, drawn)


def _lines(curves: Curves) -> str:
    xs, ys = ([point[axis] for curve in curves.values() for point in curve] for axis in (0, 1))
    drawn = [*_axes(sorted(set(xs)), [min(ys), max(ys)])]
    for name, curve in curves.items():
        color = _FIXED.get(name, _GREEN)
        places = [(_along(x, xs, MARGIN, WIDTH - 80), _along(y, ys, HEIGHT - MARGIN, 20)) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        drawn.append(_words(places[-1][0] + 6, places[-1][1] + 4, name, color=color))
        for (x, y), (px, py) in zip(curve, places, strict=True):
            circle = f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{color}">'
            drawn.append(f"{circle}<title>{escape(name)}, {x:g}: {y:.4g} ms</title></circle>")
    return _svg(WIDTH, HEIGHT, drawn)


def _axes(xs: Sequence[float], ys: Sequence[float]) -> Iterator[str]:
    yield f'<path d="M{MARGIN} 20V{HEIGHT - MARGIN}H{WIDTH - 80}" fill="none" stroke="#c5ccd4"/>'
    for x in xs:
        yield _words(_along(x, xs, MARGIN, WIDTH - 80), HEIGHT - MARGIN + 16, f"{x:g}", anchor="middle")
    for y in ys:
        yield _words(MARGIN - 6, _along(y, ys, HEIGHT - MARGIN, 20) + 4, f"{y:.3g}", anchor="end")


def _ms(seconds: Sequence[float]) -> float:
    return 1e3 * spread(seconds).median


def _along(value: float, values: Sequence[float], first: float, last: float) -> float:
    """From ``first`` at the smallest of ``values`` to ``last`` at the largest, logarithmic."""
    low, high = math.log(min(values)), math.log(max(values))
    return first + (last - first) * (math.log(value) - low) / max(high - low, 1e-9)


def _titled(title: str, drawing: str) -> str:
    width, height = _size(drawing)
    inside = drawing.replace("<svg ", '<svg y="24" ', 1)
    return _svg(max(width, 420), height + 24, [_words(8, 16, title, weight=600), inside])


def _stacked(drawings: Sequence[str]) -> str:
    sizes = [_size(drawing) for drawing in drawings] or [(0.0, 0.0)]
    tops = [sum(height for _, height in sizes[:number]) for number in range(len(sizes))]
    moved = [d.replace("<svg ", f'<svg y="{top:g}" ', 1) for d, top in zip(drawings, tops, strict=False)]
    return _svg(max(width for width, _ in sizes), sum(height for _, height in sizes), moved)


def _size(drawing: str) -> tuple[float, float]:
    found: Any = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    return float(found[1]), float(found[2])


def _words(
    x: float, y: float, words: str, *, anchor: str = "start", color: str = "#44505c", weight: int = 400
) -> str:
    style = f'text-anchor="{anchor}" fill="{color}" font-size="12" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _svg(width: float, height: float, inside: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    space = "http://www.w3.org/2000/svg"
    return f'<svg xmlns="{space}" {size} role="img" font-family="sans-serif">{"".join(inside)}</svg>'
