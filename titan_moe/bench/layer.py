"""The whole layer, forward and backward, on one rank; and the experts' GEMMs alone, in the same turns."""

from collections.abc import Iterator
from typing import Any

from titan_moe.bench.clock import busy_seconds, matmul_flops
from titan_moe.bench.contestants import FLOOR, LAYERS, OURS, STOCK, Floor, Problem, check_same
from titan_moe.bench.interleave import Contestant, geometric_mean, interleaved, ratio, spread
from titan_moe.bench.report import BenchSettings, Found, Table

TITLE = "Layer: router, dispatch, experts, combine; floor: its GEMMs alone"
NOTE = (
    "Forward and backward, no shared experts; bf16 parameters and rows, the same weights and routes; medians "
    "(quartiles) of ms and of ratios of neighbouring runs. Threads: torch's default."
)
REPEATS, WARMUP = 15, 2


def measure(settings: BenchSettings) -> Found:
    """Per shape: seconds of stock, of ours and of the floor; how far ours is from stock."""
    found: Found = {}
    for shape in settings.layer_shapes:
        problem = Problem.draw(shape)
        runs: dict[str, Any] = {name: problem.run(build) for name, build in LAYERS.items()}
        agreement = {name: check_same(runs[STOCK], run) for name, run in runs.items() if name != STOCK}
        runs[FLOOR] = Floor(problem)
        found[str(shape)] = {
            "seconds": interleaved(runs, repeats=settings.repeats(REPEATS), warmup=WARMUP),
            "busy_seconds": {name: _busy(run) for name, run in runs.items()},
            "distance_from_stock": agreement,
            "gemm_flops": shape.gemm_flops,
        }
    if (ceiling := matmul_flops()) is not None:
        for sides in found.values():
            sides["matmul_flops_per_second"] = ceiling
    return found


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A line per shape and one of geometric means; on a GPU, its own time and TFLOP/s too."""
    names = list(next(iter(found.values()))["seconds"])
    mine = [name for name in names if name not in (STOCK, FLOOR)]
    pairs = [pair for name in mine for pair in ((STOCK, name), (name, FLOOR))]
    lines = [["shape", *(f"{name} ms" for name in names), *(" / ".join(pair) for pair in pairs)]]
    for shape, sides in found.items():
        seconds = sides["seconds"]
        times = (spread([1e3 * taken for taken in seconds[name]]).show(1) for name in names)
        lines.append([shape, *times, *(ratio(seconds[a], seconds[b]).show() for a, b in pairs)])
    means = (f"{geometric_mean(_ratios(found, *pair)):.2f}" for pair in pairs)
    yield [*lines, ["geometric mean", *[""] * len(names), *means]]
    if any("matmul_flops_per_second" in sides for sides in found.values()):
        yield _gpu_alone(found, names, pairs)
        yield _speeds(found, names)


def figures(found: Found) -> dict[str, float]:
    """Of the variant that targets are for, and of a layer that would be its GEMMs and nothing else."""
    against_stock, limits = _ratios(found, STOCK, OURS), _ratios(found, STOCK, FLOOR)
    return {
        "layer.mean": geometric_mean(against_stock),
        "layer.mean.limit": geometric_mean(limits),
        "layer.worst": min(against_stock),
        "layer.worst.limit": min(limits),
        "floor.mean": geometric_mean(_ratios(found, OURS, FLOOR)),
    }


def _ratios(found: Found, above: str, below: str) -> list[float]:
    return [ratio(sides["seconds"][above], sides["seconds"][below]).median for sides in found.values()]


def _busy(run: Contestant) -> float | None:
    run.clear()
    taken = busy_seconds(run.run)
    run.clear()
    return taken


def _gpu_alone(found: Found, names: list[str], pairs: list[tuple[str, str]]) -> Table:
    """Ms of all kernels of one run; what is missing to the time above, the GPU waited for Python."""
    lines = [["shape", *(f"{name} GPU ms" for name in names), *(" / ".join(pair) for pair in pairs)]]
    for shape, sides in found.items():
        busy = sides["busy_seconds"]
        ratios = (f"{busy[a] / busy[b]:.2f}" for a, b in pairs)
        lines.append([shape, *(f"{1e3 * busy[name]:.2f}" for name in names), *ratios])
    return lines


def _speeds(found: Found, names: list[str]) -> Table:
    """TFLOP/s of the experts' GEMMs over the whole time, and how much of one large matmul's that is."""
    lines = [["shape", *(f"{name} TFLOP/s (of a matmul's)" for name in names)]]
    for shape, sides in found.items():
        speeds = [sides["gemm_flops"] / spread(sides["seconds"][name]).median for name in names]
        ceiling = sides["matmul_flops_per_second"]
        lines.append([shape, *(f"{speed / 1e12:.1f} ({speed / ceiling:.0%})" for speed in speeds)])
    return lines
