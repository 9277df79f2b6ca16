"""Plots as SVG text, for pages and documents that need nothing else."""

import math
from collections.abc import Callable, Collection, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 280, 64, 34, 28, 14
Curve = Sequence[tuple[float, float]]
COLORS = ("#1f5fa8", "#d1571b", "#2d8a57")
LOW, HIGH = (253, 240, 217), (153, 27, 27)  # of a map: pale, dark


def lines(
    series: dict[str, Curve], *, log: bool = False, decades: tuple[int, int] | None = None, title: str = ""
) -> str:
    """Curves over steps; later ones are dashed, so that equal ones can be told.

    With ``log``, decades are ticked; a value of 0 lies on the floor and is drawn hollow. ``decades`` fixes
    the axis of a log plot: from one power of ten to another.
    """
    points = [(x, y) for curve in series.values() for x, y in curve if math.isfinite(y)]
    if not points or (log and not decades and not any(y > 0 for _, y in points)):
        broken = any(not math.isfinite(y) for curve in series.values() for _, y in curve)
        return _nothing("not a number" if broken else "no difference" if points else "nothing to draw")
    bottom, top = decades or _range([y for _, y in points], log)
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def at(x: float, y: float) -> tuple[float, float]:
        value = bottom if log and y <= 0 else math.log10(y) if log else y
        across, up = (x - first) / max(last - first, 1e-9), (value - bottom) / (top - bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    drawn = [*_grid(bottom, top, log), *_steps(first, last, lambda x: at(x, 1.0 if log else bottom)[0])]
    for number, (name, curve) in enumerate(series.items()):
        color, finite = COLORS[number % len(COLORS)], [(x, y) for x, y in curve if math.isfinite(y)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in finite))
        dash = f' stroke-dasharray="{6 - number} {3 + number}"' if number else ""
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        for x, y in finite:
            px, py = at(x, y)
            fill, words = "#fff" if log and y <= 0 else color, f"{escape(name)}, step {x:g}: {y:.6g}"
            circle = f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{fill}" stroke="{color}">'
            drawn.append(f"{circle}<title>{words}</title></circle>")
    drawn += [_text(LEFT, 16, title, bold=True), *_legend(list(series))]
    return _svg(WIDTH, HEIGHT, drawn)


def heat(rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float]) -> str:
    """A map of magnitudes on a log scale, with its scale below; white is 0, grey is unknown."""
    if not rows or not columns:
        return _nothing("nothing to draw")
    cell, high = max(3, min(34, 380 // len(columns))), 15
    left = 24 + max(round(6.3 * len(row)) for row in rows)
    width, height = max(left + cell * len(columns) + 20, 420), high * len(rows) + 66
    present = [v for v in values.values() if v > 0 and math.isfinite(v)]
    same = all(value == 0 for value in values.values())
    low, top = (math.log10(f(present)) for f in (min, max)) if present else (0.0, 0.0)
    low = min(low, top - 1)  # a single value is not the palest
    drawn = []
    for i, row in enumerate(rows):
        drawn.append(_text(left - 6, i * high + 12, row, anchor="end", size=11))
        for j, column in enumerate(columns):
            value = values.get((row, column))
            words = f"{row}, step {column}: {'not there' if value is None else f'{value:.3g}'}"
            shade = _shade(value, low, top)
            drawn.append(_rect(left + j * cell, i * high, max(cell - 1, 2), high - 1, shade, words))
    every = max(1, len(columns) // 12)
    for j in range(0, len(columns), every):
        middle = left + j * cell + cell / 2
        drawn.append(_text(middle, high * len(rows) + 14, columns[j], anchor="middle", size=11))
    return _svg(width, height, [*drawn, *_scale(left, high * len(rows) + 26, low, top, same)])


def bars(values: dict[str, float], *, log: bool = False, marked: Collection[str] = ()) -> str:
    """Horizontal bars in the order given; those in ``marked`` in the second colour."""
    if all(value == 0 for value in values.values()):
        return _nothing("no difference" if values else "nothing to draw")
    positive = [value for value in values.values() if value > 0 and math.isfinite(value)] or [1.0]
    left, bar, room = 24 + max(round(6.3 * len(name)) for name in values), 16, 240
    low, top = (math.log10(f(positive)) for f in (min, max))
    drawn = []
    for i, (name, value) in enumerate(values.items()):
        part = 1.0 if not math.isfinite(value) else max(0.0, value / max(positive))
        if log and 0 < part < 1:
            part = 0.08 + 0.92 * (math.log10(value) - low) / max(top - low, 1e-9)
        color = COLORS[1] if name in marked else COLORS[0]
        drawn.append(_text(left - 6, i * bar + 12, name, anchor="end", size=11))
        drawn.append(_rect(left, i * bar + 2, max(0.5, part * room), bar - 4, color, f"{name}: {value:.6g}"))
        drawn.append(_text(left + part * room + 6, i * bar + 12, f"{value:.2g}", size=11))
    return _svg(left + room + 70, bar * len(values) + 8, drawn)


def beside(left: str, right: str) -> str:
    """Two plots of ``lines`` as one picture."""
    moved = right.replace("<svg ", f'<svg x="{WIDTH + 20}" ', 1)
    return _svg(2 * WIDTH + 20, HEIGHT, [left, moved])


def _range(values: list[float], log: bool) -> tuple[float, float]:
    if log:
        positive = [value for value in values if value > 0]
        bottom, top = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        return (bottom - (min(values) <= 0), max(top, bottom + 1))
    bottom, top = min(values), max(values)
    margin = (top - bottom) * 0.06 or max(abs(top), 1.0) * 0.05
    return bottom - margin, top + margin


def _grid(bottom: float, top: float, log: bool) -> list[str]:
    ticks = [bottom + (top - bottom) * i / 4 for i in range(5)]
    if log:
        every = max(1, round((top - bottom) / 6))
        ticks = [float(t) for t in range(int(bottom), int(top) + 1, every)]
    drawn = []
    for tick in ticks:
        y = HEIGHT - BOTTOM - (tick - bottom) / (top - bottom) * (HEIGHT - BOTTOM - TOP)
        drawn.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e3e8ee"/>')
        drawn.append(_text(LEFT - 6, y + 4, f"1e{tick:.0f}" if log else f"{tick:.4g}", anchor="end"))
    return drawn


def _steps(first: float, last: float, across: Callable[[float], float]) -> list[str]:
    every = max(1, math.ceil((last - first) / 10))
    steps = range(int(first), int(last) + 1, every)
    return [
        *(_text(across(step), HEIGHT - 14, str(step), anchor="middle") for step in steps),
        _text(WIDTH - RIGHT, HEIGHT - 1, "step", anchor="end", size=11),
    ]


def _legend(names: list[str]) -> list[str]:
    """Above the plot, from the right, in the order of ``names``."""
    drawn, right = [], WIDTH - RIGHT
    for number, name in reversed(list(enumerate(names))):
        drawn.append(_text(right, 16, name, anchor="end", color=COLORS[number % len(COLORS)], bold=True))
        right -= round(7.2 * len(name)) + 14
    return drawn


def _scale(x: float, y: float, low: float, top: float, same: bool) -> list[str]:
    if same:
        return [_text(x, y + 12, "no difference", size=11)]
    parts = [_rect(x + 12 * i, y, 12, 10, _mix(i / 9), "") for i in range(10)]
    ends = [_text(x + 100 * i, y + 24, f"{10**end:.1g}", size=11) for i, end in enumerate((low, top))]
    return [*parts, *ends]


def _shade(value: float | None, low: float, top: float) -> str:
    if value is None:
        return "#e6e6e6"
    if value == 0:
        return "#ffffff"
    return _mix(1.0 if not math.isfinite(value) else (math.log10(value) - low) / max(top - low, 1e-9))


def _mix(part: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(round(a + (b - a) * part) for a, b in zip(LOW, HIGH, strict=True)))


def _rect(x: float, y: float, width: float, height: float, fill: str, words: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"'
    return f'<rect {place} stroke="#dde3ea" stroke-width="0.5"><title>{escape(words)}</title></rect>'


def _text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    color: str = "#44505c",
    size: int = 12,
    bold: bool = False,
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}"{weight}'
    return f"<text {place}>{escape(words)}</text>"


def _nothing(words: str) -> str:
    return _svg(WIDTH, 60, [_text(WIDTH / 2, 36, words, anchor="middle")])


def _svg(width: float, height: float, inside: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="{_NAMESPACE}" {size} role="img" font-family="sans-serif">{"".join(inside)}</svg>'


_NAMESPACE = "http://www.w3.org/2000/svg"
