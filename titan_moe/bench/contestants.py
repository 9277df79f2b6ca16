"""torchtitan's MoE layer, ours, and the GEMMs alone, on the same weights, tokens and routes.

Parameters and rows are bf16 on both sides, as under FSDP's mixed precision; buffers keep their fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common import moe as upstream
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from titan_moe.bench.clock import DEVICE
from titan_moe.bench.shapes import Shape
from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.base import DispatchLimits
from titan_moe.layer.experts import Save
from titan_moe.models.swap import swap_layer

STOCK, OURS, INPUTS, FLOOR = "stock", "ours", "save inputs", "floor"
_GATE, _EXPERTS = "router.gate.weight", "routed_experts.inner_experts"
Build = Callable[[Shape], nn.Module]


def stock(shape: Shape, dispatcher: type[LocalTokenDispatcher] = LocalTokenDispatcher) -> nn.Module:
    """torchtitan 0.3.0's layer, without shared experts."""
    # Its gate asks for fp32 autocast, which a CPU does not have: there it warns, and scores in bf16.
    return _stock_config(shape, dispatcher).build()


def ours(shape: Shape, dispatcher: str = "local", save: Save = "all", **options: Any) -> nn.Module:
    """Our layer; ``options`` are its dispatcher's."""
    return swap_layer("MoE", _stock_config(shape), dispatcher=dispatcher, save=save, **options).build()


# What is compared. Another variant of ours is another line; targets are held by OURS.
LAYERS: dict[str, Build] = {
    STOCK: stock,
    OURS: ours,
    INPUTS: partial(ours, save="inputs"),
}
ALL_TO_ALL, PER_RANK = "all_to_all", "deepep per_rank"  # the names of dispatch.variants()
OVER_RANKS: dict[str, Build] = {
    STOCK: partial(stock, dispatcher=AllToAllTokenDispatcher),
    **{
        name: partial(ours, dispatcher=variant.dispatcher, **variant.options)
        for name, variant in dispatch.variants().items()
        if variant.build().serves_ep
    },
}


class DifferentLayers(RuntimeError):
    """Two contestants that do not compute the same thing."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Weights and tokens on which every layer chooses the same experts, whatever its scores are rounded to.

    The gate's rows are orthonormal and the tokens are moved along them, so that the logits of the K experts
    in ``ids_TK`` are above 0.5 and all others below -0.5. Without that, bf16 scores tie.
    """

    shape: Shape
    weights: dict[str, torch.Tensor]
    x_TD: torch.Tensor
    grad_TD: torch.Tensor
    ids_TK: torch.Tensor

    @classmethod
    def draw(cls, shape: Shape, rank: int = 0) -> "Problem":
        """The same weights on every rank; its own tokens and routes, all choices of experts alike."""
        assert shape.E <= shape.D, f"{shape}: no {shape.E} orthogonal rows of {shape.D} columns"
        random = torch.Generator().manual_seed(0)
        gate_ED = torch.linalg.qr(torch.randn(shape.D, shape.E, generator=random)).Q.T
        sizes = {"w1_EFD": (shape.F, shape.D), "w2_EDF": (shape.D, shape.F), "w3_EFD": (shape.F, shape.D)}
        weights = {_GATE: gate_ED} | {
            f"{_EXPERTS}.{name}": torch.randn(shape.E, *size, generator=random) / size[1] ** 0.5
            for name, size in sizes.items()
        }
        random.manual_seed(1 + rank)
        ids_TK = torch.rand(shape.T, shape.E, generator=random).topk(shape.K).indices
        logits_TE = torch.rand(shape.T, shape.E, generator=random) - 1.5
        logits_TE.scatter_add_(1, ids_TK, torch.full(ids_TK.shape, 2.0))
        x_TD, grad_TD = torch.randn(2, shape.T, shape.D, generator=random)
        x_TD = x_TD + (logits_TE - x_TD @ gate_ED.T) @ gate_ED
        return cls(
            shape=shape,
            weights={name: _bf16(weight) for name, weight in weights.items()},
            x_TD=_bf16(x_TD),
            grad_TD=_bf16(grad_TD),
            ids_TK=ids_TK.to(DEVICE),
        )

    def run(self, build: Build, ep_mesh: DeviceMesh | None = None) -> "LayerRun":
        """A layer with these weights, its experts over ``ep_mesh``, on these tokens."""
        set_spmd_backend("partial_dtensor")
        layer = build(self.shape).to(DEVICE)
        size, rank = (1, 0) if ep_mesh is None else (ep_mesh.size(), ep_mesh.get_local_rank())
        assert dict(layer.named_parameters()).keys() == self.weights.keys()
        for name, parameter in layer.named_parameters():
            weight = self.weights[name]
            parameter.data = (weight.chunk(size)[rank] if name.startswith(_EXPERTS) else weight).clone()
        if ep_mesh is not None:
            _bind(layer, self.shape, ep_mesh)
        return LayerRun(layer, self)


class LayerRun:
    """Forward and backward of one layer; a contestant."""

    def __init__(self, layer: nn.Module, problem: Problem) -> None:
        self.layer = layer
        self.x_BLD = problem.x_TD.unsqueeze(0).clone().requires_grad_()
        self.grad_BLD = problem.grad_TD.unsqueeze(0)

    def forward(self) -> torch.Tensor:
        """``(1, T, D)``."""
        return self.layer(self.x_BLD)

    def run(self) -> None:
        """Forward and backward; leaves gradients."""
        self.forward().backward(self.grad_BLD)

    def clear(self) -> None:
        """No gradients."""
        self.x_BLD.grad = None
        self.layer.zero_grad(set_to_none=True)

    def results(self) -> dict[str, torch.Tensor]:
        """Output, chosen experts (sorted) and every gradient, from one run."""
        seen: dict[str, torch.Tensor] = {}
        hook = self.layer.router.register_forward_hook(lambda *args: seen.update(ids=args[-1][1]))  # type: ignore[union-attr,operator]
        self.clear()
        seen["out"] = self.forward()
        hook.remove()
        seen["out"].backward(self.grad_BLD)
        seen |= {name: parameter.grad for name, parameter in self.layer.named_parameters()}  # type: ignore[misc]
        ids_TK = seen.pop("ids").flatten(0, -2).sort(-1).values
        seen |= {"x": self.x_BLD.grad, "ids": ids_TK}  # type: ignore[dict-item]
        self.clear()
        return {name: tensor.detach() for name, tensor in seen.items()}


class Floor:
    """The experts' GEMMs alone, laid out as autograd calls them: 3 forward, 6 backward. A contestant."""

    def __init__(self, problem: Problem) -> None:
        shape = problem.shape
        self.w1_EFD, self.w2_EDF, self.w3_EFD = (
            problem.weights[f"{_EXPERTS}.{name}"] for name in ("w1_EFD", "w2_EDF", "w3_EFD")
        )
        counts_E = torch.bincount(problem.ids_TK.flatten(), minlength=shape.E)
        self.offsets_E = counts_E.cumsum(0, dtype=torch.int32)
        order_N = problem.ids_TK.flatten().argsort(stable=True) // shape.K
        self.x_ND, self.grad_ND = problem.x_TD[order_N], problem.grad_TD[order_N]
        self.h_NF, self.grad_NF = (
            _bf16(torch.randn(shape.N, shape.F)),
            _bf16(torch.randn(shape.N, shape.F)),
        )

    def run(self) -> None:
        """Nine grouped matmuls."""
        mm = partial(torch._grouped_mm, offs=self.offsets_E)
        for w_EFD in (self.w1_EFD, self.w3_EFD):
            mm(self.x_ND, w_EFD.transpose(-2, -1))
        mm(self.h_NF, self.w2_EDF.transpose(-2, -1))
        mm(self.grad_ND.transpose(-2, -1), self.h_NF)
        mm(self.grad_ND, self.w2_EDF)
        for w_EFD in (self.w1_EFD, self.w3_EFD):
            mm(self.grad_NF.transpose(-2, -1), self.x_ND)
            mm(self.grad_NF, w_EFD)

    def clear(self) -> None:
        """Nothing is kept."""


def check_same(base: LayerRun, other: LayerRun, *, tolerance: float = 0.02) -> dict[str, float]:
    """How far ``other`` is from ``base``: relative norms of the output's and every gradient's difference.

    Raises:
        DifferentLayers: other routes, or a distance beyond ``tolerance``, five of bf16's roundings.
    """
    theirs, mine = base.results(), other.results()
    if not torch.equal(mine.pop("ids"), theirs.pop("ids")):
        raise DifferentLayers("the layers chose different experts")
    distances = {
        name: ((mine[name].float() - theirs[name].float()).norm() / theirs[name].float().norm()).item()
        for name in theirs
    }
    if beyond := {name: off for name, off in distances.items() if not off <= tolerance}:
        raise DifferentLayers(f"relative distances beyond {tolerance}: {beyond}")
    return distances


def _stock_config(
    shape: Shape, dispatcher: type[LocalTokenDispatcher] = LocalTokenDispatcher
) -> upstream.MoE.Config:
    return upstream.MoE.Config(
        num_experts=shape.E,
        router=upstream.TokenChoiceTopKRouter.Config(
            num_experts=shape.E,
            gate=Linear.Config(in_features=shape.D, out_features=shape.E),
            top_k=shape.K,
        ),
        routed_experts=upstream.RoutedExperts.Config(
            inner_experts=upstream.GroupedExperts.Config(
                dim=shape.D, hidden_dim=shape.F, num_experts=shape.E
            ),
            token_dispatcher=dispatcher.Config(num_experts=shape.E, top_k=shape.K),
        ),
    )


def _bind(layer: Any, shape: Shape, ep_mesh: DeviceMesh) -> None:
    dispatcher = layer.routed_experts.token_dispatcher
    if isinstance(dispatcher, LocalTokenDispatcher):
        dispatcher.wire_meshes(ep_mesh=ep_mesh)
        return
    limits = DispatchLimits(
        num_experts=shape.E,
        top_k=shape.K,
        dim=shape.D,
        ep_size=ep_mesh.size(),
        num_max_tokens_per_rank=shape.T,
        device_type=DEVICE,
    )
    dispatcher.bind(ep_mesh, limits)


def _bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(DEVICE, torch.bfloat16).contiguous()
