"""Bodies for `run_ranks` that put one MoE layer on a mesh and bring everything back under oracle names."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_single, all_reduce
from torch.distributed.tensor import DTensor, Replicate, Shard
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear

from tests import backends
from tests.faults import FAULTS
from tests.oracle import Case
from tests.ranks import RankContext
from titan_moe.layer.dispatch.base import DispatchLimits
from titan_moe.layer.experts import GroupedExperts, Save
from titan_moe.layer.moe import MoE, RoutedExperts
from titan_moe.layer.router import TokenChoiceTopKRouter
from titan_moe.parallel.sharding import shard_moe


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees over the ranks of a run; data parallelism takes what TP leaves."""

    tp: int = 1
    ep: int = 1
    sp: bool = True

    def __str__(self) -> str:
        return f"tp{self.tp}-ep{self.ep}" + ("-sp" if self.sp and self.tp > 1 else "")


_GLOO_DIMS: dict[
    tuple[int, int], ParallelDims
] = {}  # in a worker: groups are dear, and live as long as it does


def parallel_dims(ctx: RankContext, mesh: Mesh) -> ParallelDims:
    """torchtitan's meshes for `mesh`."""
    key = (mesh.tp, mesh.ep)
    if ctx.mode == "gloo" and key in _GLOO_DIMS:
        return _GLOO_DIMS[key]
    dims = ParallelDims(
        dp_replicate=1,
        dp_shard=ctx.world_size // mesh.tp,
        cp=1,
        tp=mesh.tp,
        pp=1,
        ep=mesh.ep,
        world_size=ctx.world_size,
        spmd_backend="partial_dtensor",
    )
    if ctx.mode == "gloo":
        _GLOO_DIMS[key] = dims
    return dims


def build_layer(case: Case, dispatcher: str = "local", save: Save = "all") -> MoE:
    """Our layer with `case`'s weights, in their dtype, on one rank."""
    num_experts, hidden_dim, dim = case.params["w1_EFD"].shape
    options = dict(case.options)
    top_k = options.pop("top_k")
    shared = None
    if "shared_w1_FD" in case.params:
        width = case.params["shared_w1_FD"].shape[0]
        up, down = (
            Linear.Config(in_features=i, out_features=o, bias=False) for i, o in ((dim, width), (width, dim))
        )
        shared = FeedForward.Config(w1=up, w2=down, w3=dataclasses.replace(up))
    layer = MoE.Config(
        num_experts=num_experts,
        router=TokenChoiceTopKRouter.Config(
            num_experts=num_experts,
            gate=Linear.Config(in_features=dim, out_features=num_experts, bias=False),
            top_k=top_k,
            **options,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(
                dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, save=save
            ),
            token_dispatcher=backends.config(dispatcher, num_experts=num_experts, top_k=top_k),
        ),
        shared_experts=shared,
    ).build()
    for name, (module, attribute) in oracle_names(layer).items():
        setattr(module, attribute, torch.nn.Parameter(case.params[name].detach().clone()))
    if case.expert_bias_E is not None:
        layer.expert_bias_E = case.expert_bias_E.clone()
    return layer


def oracle_names(layer: MoE) -> dict[str, tuple[torch.nn.Module, str]]:
    """Where the oracle's parameters live in the layer: module and attribute."""
    experts = layer.routed_experts.inner_experts
    named = {"gate_ED": (layer.router.gate, "weight")} | {
        n: (experts, n) for n in ("w1_EFD", "w2_EDF", "w3_EFD")
    }
    if layer.shared_experts is not None:
        shapes = {"w1": "FD", "w2": "DF", "w3": "FD"}
        named |= {
            f"shared_{n}_{dims}": (getattr(layer.shared_experts, n), "weight") for n, dims in shapes.items()
        }
    return named


def parameters(layer: MoE) -> dict[str, torch.nn.Parameter]:
    """The layer's parameters under the oracle's names."""
    return {name: getattr(module, attribute) for name, (module, attribute) in oracle_names(layer).items()}


def on_mesh(layer: MoE, dims: ParallelDims, mesh: Mesh) -> MoE:
    """What `parallelize` does to a layer, short of FSDP."""
    shard_moe(layer, ep=mesh.ep > 1, sp=mesh.sp)
    if mesh.tp > 1 or mesh.ep > 1:
        layer.parallelize(dims)
    experts = layer.config.routed_experts.inner_experts
    limits = DispatchLimits(
        num_experts=experts.num_experts,
        top_k=layer.config.router.top_k,
        dim=experts.dim,
        ep_size=mesh.ep,
        num_max_tokens_per_rank=64,
    )
    layer.routed_experts.token_dispatcher.bind(dims.get_optional_mesh("ep"), limits)
    return layer


def run_layer(
    ctx: RankContext,
    case: Case,
    mesh: Mesh,
    dispatcher: str,
    fault: str | None = None,
    save: Save = "all",
) -> dict[str, Any]:
    """Forward and backward of `case` on `mesh`: whole output, scores, counts and gradients, by oracle name.

    The batch is split over the data-parallel ranks, so B must be a multiple of ``world_size / tp``.
    `fault` names one of `tests.faults.FAULTS`, planted before the forward.
    """
    dims = parallel_dims(ctx, mesh)
    layer = on_mesh(build_layer(case, dispatcher, save), dims, mesh)
    if fault is not None:
        FAULTS[fault](layer)
    seen = watch(layer)
    dp_rank_of = [rank // mesh.tp for rank in range(ctx.world_size)]
    x_BLD = ctx.per_rank([local_rows(case.params["x_BLD"], rank, dims) for rank in dp_rank_of])
    grad_BLD = ctx.per_rank([local_rows(case.grad_out_BLD, rank, dims) for rank in dp_rank_of])
    out_BLD = _whole(layer(placed(x_BLD, dims, mesh)))
    out_BLD.backward(grad_BLD)
    results = {
        "out_BLD": _gather_dp(out_BLD.detach(), dims),
        "x_BLD": _gather_dp(x_BLD.grad, dims),
        "topk_scores_TK": _gather_dp(_tokens(seen, seen["scores"].grad, dims), dims),
        "counts_E": _total_count(layer, dims, mesh),
        "none_gradients": [name for name, p in parameters(layer).items() if p.grad is None],
    }
    for name, parameter in parameters(layer).items():
        results[name] = _sum_dp(_whole(parameter.grad), dims, over_ep=name.startswith("w") and mesh.ep > 1)
    return results


def watch(layer: MoE) -> dict[str, Any]:
    """Catches the router's scores, to read their gradient, and where the tokens sit."""
    seen: dict[str, Any] = {}

    def catch(_module: Any, args: tuple[Any, ...]) -> None:
        _, routing, seen["layout"] = args
        seen["scores"] = routing.topk_scores_TK
        seen["scores"].retain_grad()

    layer.routed_experts.register_forward_pre_hook(catch)
    return seen


def local_rows(x_BLD: Tensor, dp_rank: int, dims: ParallelDims) -> Tensor:
    return x_BLD.chunk(dims.dp_shard)[dp_rank].detach().clone().requires_grad_(x_BLD.requires_grad)


def placed(x_BLD: Tensor, dims: ParallelDims, mesh: Mesh) -> Tensor:
    """As torchtitan's models hand it over: Shard(1) over TP with SP, replicated without, plain without TP."""
    if mesh.tp == 1:
        return x_BLD
    x = DTensor.from_local(x_BLD, dims.get_mesh("tp"), [Replicate()], run_check=False)
    return x.redistribute(placements=[Shard(1)]) if mesh.sp else x


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tokens(seen: dict[str, Any], local_TK: Tensor, dims: ParallelDims) -> Tensor:
    """A token-shaped tensor of the local region, whole over TP: parts at their global places, summed."""
    layout = seen["layout"]
    whole = local_TK.new_zeros(layout.local_batch_size * layout.global_seq_len, local_TK.shape[1])
    whole = whole.index_copy(0, layout.global_token_indices(), local_TK)
    return all_reduce(whole, "sum", dims.get_mesh("tp")) if dims.tp_enabled else whole


def _gather_dp(tensor: Tensor, dims: ParallelDims) -> Tensor:
    return all_gather_single(tensor.contiguous(), 0, dims.get_mesh("fsdp")) if dims.dp_shard > 1 else tensor


def _sum_dp(tensor: Tensor, dims: ParallelDims, *, over_ep: bool) -> Tensor:
    """What FSDP's reduction does: experts over efsdp when EP is on, all else over fsdp."""
    mesh = dims.get_mesh("efsdp" if over_ep else "fsdp")
    return all_reduce(tensor, "sum", mesh) if mesh.size() > 1 else tensor


def _total_count(layer: MoE, dims: ParallelDims, mesh: Mesh) -> Tensor:
    """As LoadBalancer sums: over data ranks, and over TP where TP ranks hold different tokens."""
    counts_E = layer.tokens_per_expert_E
    for axis, different in (("fsdp", dims.dp_shard > 1), ("tp", mesh.tp > 1 and mesh.ep > 1)):
        counts_E = all_reduce(counts_E, "sum", dims.get_mesh(axis)) if different else counts_E
    return counts_E


def differences(results: list[dict[str, Any]], case: Case, *, rtol: float = 1e-10) -> list[str]:
    """What `run_layer`'s results get wrong, by oracle name, largest error first; empty when all is right.

    A tensor is right when no element is further off than `rtol` times the tensor's largest.
    """
    out, gradients = case.run_with_gradients()
    expected = {"out_BLD": out.out_BLD.detach(), **gradients}
    found: dict[str, float] = {}
    for result in results:
        for name, tensor in expected.items():
            if name in result["none_gradients"] or result[name].shape != tensor.shape:
                found[name] = float("inf")
                continue
            error = (result[name] - tensor).abs().max() / tensor.abs().max().clamp_min(
                torch.finfo(tensor.dtype).tiny
            )
            if not error <= rtol:
                found[name] = max(found.get(name, 0.0), error.item())
        if not torch.equal(result["counts_E"], out.counts_E):
            found["counts_E"] = float("inf")
    return sorted(found, key=found.__getitem__, reverse=True)
