"""How the layer's time grows with tokens, experts and K, and how that of its GEMMs does."""

from collections.abc import Iterator
from typing import Any

from titan_moe.bench.contestants import FLOOR, LAYERS, OURS, Floor, Problem
from titan_moe.bench.interleave import Spread, interleaved, ratio, spread
from titan_moe.bench.report import BenchSettings, Found, Table
from titan_moe.bench.shapes import Shape

TITLE = "Growth: ours and its GEMMs over tokens, experts and K"
NOTE = "Forward and backward; all sizes of a row in turns, so growth is between neighbouring runs too."
REPEATS = 7

ROWS: dict[str, dict[int, Shape]] = {
    "T": {T: Shape(T, 256, 256, 8, 3) for T in (1024, 4096, 16384, 65536)},
    "E": {E: Shape(4096, 256, 256, E, 3) for E in (8, 64, 256)},
    "K": {K: Shape(4096, 256, 256, 64, K) for K in (1, 2, 4, 8)},
}
QUICK: dict[str, dict[int, Shape]] = {
    "T": {T: Shape(T, 64, 32, 8, 2) for T in (256, 1024)},
    "E": {E: Shape(256, 64, 32, E, 2) for E in (8, 64)},
    "K": {K: Shape(256, 64, 32, 16, K) for K in (1, 8)},
}
# The figures that targets are for: from where to where.
LINEAR, EXPERTS = ("4096", "65536"), ("8", "256")


def measure(settings: BenchSettings) -> Found:
    """Per row and size: seconds of ours and of the floor."""
    rows = QUICK if settings.quick else ROWS
    return {row: _measure_row(shapes, settings.repeats(REPEATS)) for row, shapes in rows.items()}


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A table per row; growth from its first size on."""
    rows = QUICK if settings.quick else ROWS
    for row, sizes in found.items():
        first, names = next(iter(sizes)), list(next(iter(sizes.values())))
        shapes = rows[row]
        lines = [[row, *(f"{name} ms" for name in names), *(f"{name}, growth" for name in names), "shape"]]
        for size, seconds in sizes.items():
            times = (spread([1e3 * taken for taken in seconds[name]]).show(1) for name in names)
            grown = (_growth(sizes, name, first, size).show() for name in names)
            lines.append([size, *times, *grown, str(shapes[int(size)])])
        yield lines


def figures(found: Found) -> dict[str, float]:
    """Time per token at the most tokens over that at 4k; growth over experts, of what the floor's is."""
    got: dict[str, float] = {}
    if set(LINEAR) <= found["T"].keys():
        few, many = map(int, LINEAR)
        for figure, name in (("growth.tokens", OURS), ("growth.tokens.limit", FLOOR)):
            got[figure] = _growth(found["T"], name, *LINEAR).median / (many / few)
    if set(EXPERTS) <= found["E"].keys():
        ours, floor = (_growth(found["E"], name, *EXPERTS).median for name in (OURS, FLOOR))
        got["growth.experts"] = ours / floor
    return got


def _measure_row(shapes: dict[int, Shape], repeats: int) -> dict[str, dict[str, list[float]]]:
    contestants: dict[str, Any] = {}
    for size, shape in shapes.items():
        problem = Problem.draw(shape)
        contestants[f"{size} {OURS}"] = problem.run(LAYERS[OURS])
        contestants[f"{size} {FLOOR}"] = Floor(problem)
    seconds = interleaved(contestants, repeats=repeats)
    return {str(size): {name: seconds[f"{size} {name}"] for name in (OURS, FLOOR)} for size in shapes}


def _growth(sizes: dict[str, dict[str, list[float]]], name: str, first: str, last: str) -> Spread:
    return ratio(sizes[last][name], sizes[first][name])
