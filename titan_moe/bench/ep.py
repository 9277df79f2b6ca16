"""Expert parallelism between processes of this machine: torchtitan's all-to-all and our dispatchers."""

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from titan_moe.bench.clock import BACKEND, DEVICE
from titan_moe.bench.contestants import ALL_TO_ALL, OVER_RANKS, PER_RANK, STOCK, Problem, check_same
from titan_moe.bench.interleave import geometric_mean, interleaved, ratio, spread
from titan_moe.bench.ranks import on_ranks
from titan_moe.bench.report import BenchSettings, Found, Table
from titan_moe.bench.shapes import Shape

TITLE = "EP: the layer over ranks"
NOTE = (
    f"{BACKEND}, one thread per rank, T tokens on each; ranks start together, the slowest one's time counts. "
    "deepep goes by c10d."
)
REPEATS, WARMUP = 15, 2


def measure(settings: BenchSettings) -> Found:
    """Per EP degree and shape: seconds of each dispatcher."""
    shapes, repeats = settings.rank_shapes, settings.repeats(REPEATS)
    return {str(ep): on_ranks(times_on_rank, ep, shapes, repeats) for ep in settings.ep_sizes}


def times_on_rank(shapes: Sequence[Shape], repeats: int) -> Found:
    """On one rank of the default process group, which is the EP mesh."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),), mesh_dim_names=("ep",))
    found: Found = {}
    for shape in shapes:
        problem = Problem.draw(shape, dist.get_rank())
        runs = {name: problem.run(build, mesh) for name, build in OVER_RANKS.items()}
        far = {name: check_same(runs[STOCK], run) for name, run in runs.items() if name != STOCK}
        seconds = interleaved(runs, repeats=repeats, warmup=WARMUP, over_ranks=True)
        found[str(shape)] = {"seconds": seconds, "distance_from_stock": far, "K": shape.K}
    return found


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A line per degree and shape; geometric means per degree."""
    names = list(OVER_RANKS)
    ours = [name for name in names if name != STOCK]
    pairs = [(STOCK, name) for name in ours] + [(ALL_TO_ALL, PER_RANK)]
    lines = [["EP", "shape", *(f"{name} ms" for name in names), *(" / ".join(pair) for pair in pairs)]]
    for ep, by_shape in found.items():
        for shape, sides in by_shape.items():
            seconds = sides["seconds"]
            times = (spread([1e3 * taken for taken in seconds[name]]).show(1) for name in names)
            lines.append([ep, shape, *times, *(ratio(seconds[a], seconds[b]).show() for a, b in pairs)])
        means = (f"{geometric_mean(_ratios(by_shape, *pair)):.2f}" for pair in pairs)
        lines.append([ep, "geometric mean", *[""] * len(names), *means])
    yield lines


def figures(found: Found) -> dict[str, float]:
    """Of EP 4: the geometric mean, and the worst of deepep where a token has as many experts as ranks."""
    if "4" not in found:
        return {}
    gains = [
        ratio(sides["seconds"][ALL_TO_ALL], sides["seconds"][PER_RANK]).median
        for sides in found["4"].values()
        if sides["K"] >= 4
    ]
    mean = geometric_mean(_ratios(found["4"], STOCK, ALL_TO_ALL))
    return {"ep4.mean": mean} | ({"ep4.deepep": min(gains)} if gains else {})


def _ratios(by_shape: Found, above: str, below: str) -> list[float]:
    return [ratio(sides["seconds"][above], sides["seconds"][below]).median for sides in by_shape.values()]
