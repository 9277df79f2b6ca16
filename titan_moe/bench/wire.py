"""What each dispatcher hands to the network: our receipts, and the collectives of both sides."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.bench.clock import DEVICE
from titan_moe.bench.contestants import OVER_RANKS, STOCK, LayerRun, Problem
from titan_moe.bench.ranks import on_ranks
from titan_moe.bench.report import BenchSettings, Found, Table
from titan_moe.bench.shapes import BF16, Shape

TITLE = "Wire: bytes handed to the network"
NOTE = (
    "All ranks together, rows to themselves included. Receipts: rows and what travels with them, forward. "
    "Collectives: what every all-to-all is given, counts of rows included."
)


class CollectiveBytes(TorchDispatchMode):
    """Bytes of the tensors that all-to-alls are given while it is entered, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts the first argument, what this rank sends."""
        if func._schema.name.startswith("_c10d_functional::all_to_all_single"):
            self.total += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def measure(settings: BenchSettings) -> Found:
    """Per EP degree and shape: bytes of each dispatcher, summed over ranks."""
    return {str(ep): on_ranks(bytes_on_rank, ep, settings.rank_shapes) for ep in settings.ep_sizes}


def bytes_on_rank(shapes: Sequence[Shape]) -> Found:
    """On one rank of the default process group, which is the EP mesh."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),), mesh_dim_names=("ep",))
    found: Found = {}
    for shape in shapes:
        problem = Problem.draw(shape, dist.get_rank())
        found[str(shape)] = {
            name: _sent(problem.run(build, mesh), receipts=name != STOCK)
            for name, build in OVER_RANKS.items()
        }
    return found


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A line per degree, shape and dispatcher."""
    yield [
        ["EP", "shape", "dispatcher", "receipts, forward MB", "forward MB", "backward MB", "of stock's"],
        *(
            _line(ep, shape, name, sent, by_name[STOCK])
            for ep, by_shape in found.items()
            for shape, by_name in by_shape.items()
            for name, sent in by_name.items()
        ),
    ]


def figures(found: Found) -> dict[str, float]:
    """No targets."""
    return {}


def _sent(run: LayerRun, *, receipts: bool) -> dict[str, int]:
    dispatcher: Any = run.layer.routed_experts.token_dispatcher  # type: ignore[union-attr]
    seen: list[Any] = []
    if receipts:
        plain = dispatcher.dispatch
        dispatcher.dispatch = lambda *args: seen.append(plain(*args)) or seen[-1]
    with CollectiveBytes() as forward:
        out = run.forward()
    with CollectiveBytes() as backward:
        out.backward(run.grad_BLD)
    traffic = [dispatcher.traffic(sent.metadata, BF16) for sent in seen]
    told = sum(t.dispatch_bytes + t.combine_bytes for t in traffic)
    total = torch.tensor([told, forward.total, backward.total], device=DEVICE)
    dist.all_reduce(total)
    return dict(zip(("receipts", "forward", "backward"), total.tolist(), strict=True))


def _line(ep: str, shape: str, name: str, sent: dict[str, int], stock: dict[str, int]) -> list[str]:
    whole, theirs = (side["forward"] + side["backward"] for side in (sent, stock))
    told = f"{sent['receipts'] / 1e6:.2f}" if sent["receipts"] else ""
    both = (f"{sent[way] / 1e6:.2f}" for way in ("forward", "backward"))
    return [ep, shape, name, told, *both, f"{whole / theirs:.3f}"]
