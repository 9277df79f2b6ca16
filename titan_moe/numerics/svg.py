"""Plots as SVG text, for a page that needs nothing else."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 620, 260, 70, 34, 14, 14
Curve = Sequence[tuple[float, float]]
COLORS = ("#1f5fa8", "#c8511b", "#2d8a57")


def lines(series: dict[str, Curve], *, log: bool = False, unit: str = "") -> str:
    """Curves over steps; with ``log``, values of 0 lie on the floor and are drawn hollow."""
    points = [(x, y) for curve in series.values() for x, y in curve if math.isfinite(y)]
    if not points:
        return _frame("nothing to draw")
    positive = [y for _, y in points if y > 0]
    floor = min(positive, default=1e-12) / 3
    scale = (lambda y: math.log10(max(y, floor))) if log else (lambda y: y)
    low, high = (f([scale(y) for _, y in points]) for f in (min, max))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    first, last = (f([x for x, _ in points]) for f in (min, max))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / max(last - first, 1e-9)
        up = (scale(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    drawn = []
    for number, (name, curve) in enumerate(series.items()):
        color, finite = COLORS[number % len(COLORS)], [(x, y) for x, y in curve if math.isfinite(y)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in finite))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y in finite:
            px, py = at(x, y)
            fill = "#fff" if log and y <= 0 else color
            title = f"{escape(name)}, step {x:g}: {y:.6g}"
            drawn.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{fill}" stroke="{color}">'
                f"<title>{title}</title></circle>"
            )
        drawn.append(_text(LEFT + 8, TOP + 14 + 15 * number, name, color=color))
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    axis = [
        _text(LEFT - 6, at(first, 10**t if log else t)[1] + 4, _tick(t, log), anchor="end") for t in ticks
    ]
    axis += [_text(at(x, points[0][1])[0], HEIGHT - 12, f"{x:g}", anchor="middle") for x in {first, last}]
    axis.append(_text(WIDTH - RIGHT, TOP + 10, unit, anchor="end"))
    return _frame("".join(axis + drawn), text=False)


def heat(rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float]) -> str:
    """A map of magnitudes on a log scale; white is 0, grey is unknown."""
    cell, left = 22, 220
    width, height = left + cell * len(columns) + 20, cell * len(rows) + 40
    present = [v for v in values.values() if v > 0 and math.isfinite(v)]
    low, high = (math.log10(f(present)) for f in (min, max)) if present else (0.0, 1.0)
    drawn = []
    for i, row in enumerate(rows):
        drawn.append(_text(left - 6, i * cell + 16, row, anchor="end"))
        for j, column in enumerate(columns):
            value = values.get((row, column))
            title = f"{row}, step {column}: {'not there' if value is None else f'{value:.3g}'}"
            drawn.append(
                f'<rect x="{left + j * cell}" y="{i * cell}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="{_shade(value, low, high)}" stroke="#ddd"><title>{escape(title)}</title></rect>'
            )
    for j, column in enumerate(columns):
        drawn.append(_text(left + j * cell + cell / 2, height - 22, column, anchor="middle"))
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(drawn)}</svg>'


def bars(values: dict[str, float], *, unit: str = "", most: int = 25) -> str:
    """Horizontal bars, the longest first as given."""
    shown = list(values.items())[:most]
    if not shown:
        return _frame("nothing to draw")
    left, bar, longest = 330, 18, max(abs(v) for _, v in shown) or 1.0
    height, room = bar * len(shown) + 10, 240
    drawn = []
    for i, (name, value) in enumerate(shown):
        length = max(1.0, abs(value) / longest * room)
        drawn.append(_text(left - 6, i * bar + 13, name, anchor="end"))
        drawn.append(
            f'<rect x="{left}" y="{i * bar + 2}" width="{length:.1f}" height="{bar - 5}" fill="{COLORS[0]}"/>'
        )
        drawn.append(_text(left + length + 5, i * bar + 13, f"{value:.3g}{unit}"))
    return f'<svg viewBox="0 0 680 {height}" width="680" role="img">{"".join(drawn)}</svg>'


def _shade(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "#e6e6e6"
    if value == 0:
        return "#ffffff"
    part = 1.0 if not math.isfinite(value) else (math.log10(value) - low) / max(high - low, 1e-9)
    mix = [
        round(a + (b - a) * (0.12 + 0.88 * part)) for a, b in zip((255, 244, 230), (176, 38, 12), strict=True)
    ]
    return "#{:02x}{:02x}{:02x}".format(*mix)


def _tick(value: float, log: bool) -> str:
    return f"{10**value:.0e}" if log else f"{value:.4g}"


def _text(x: float, y: float, words: str, *, anchor: str = "start", color: str = "#444") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="12"'
    return f"<text {place}>{escape(words)}</text>"


def _frame(inside: str, *, text: bool = True) -> str:
    body = _text(WIDTH / 2, HEIGHT / 2, inside, anchor="middle") if text else inside
    border = (
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" '
        'fill="none" stroke="#bbb"/>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{border}{body}</svg>'
