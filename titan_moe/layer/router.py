"""TokenChoiceTopKRouter: which K experts each token goes to, and with what weight.

The shape legend is in ``titan_moe/layer/moe.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

from titan_moe.layer.dispatch.base import Routing
from titan_moe.layer.kernels import ops as kernels
from titan_moe.layer.layout import TokenLayout


class Selection(NamedTuple):
    """Which experts T tokens go to.

    Attributes:
        ids_TK: int64, K different ids in [0, E) per row.
        weightless_TK: bool, True for picks whose weight is 0 and gets no gradient; None where there is none.
        load_T: bool, True for tokens that count as load; None where all do.
        origin: is handed on in Routing.
    """

    ids_TK: torch.Tensor
    weightless_TK: torch.Tensor | None = None
    load_T: torch.Tensor | None = None
    origin: Any = None


class Query(NamedTuple):
    """What a router asks its selector.

    Attributes:
        live: a callable that returns the router's own top-k ids, ``(T, K)``.
        ranking: a callable that returns what they are the top of, ``(T, E)``: the biased scores, with -inf
            outside of the groups that a token may use.
        layout: where these tokens lie in the (B, L) grid; None where the caller did not say.
        biased: a callable that returns the biased scores of all groups, ``(T, E)``.
    """

    live: Callable[[], torch.Tensor]
    ranking: Callable[[], torch.Tensor]
    layout: TokenLayout | None
    biased: Callable[[], torch.Tensor]


def select_live(query: Query) -> Selection:
    """The selector of a router that decides for itself."""
    return Selection(query.live())


class TokenChoiceTopKRouter(Module):
    """Scores every expert for every token in fp32 and keeps the best K.

    1. gate: ``x @ W.T`` in explicit fp32 (fp64 input stays fp64), whatever autocast says.
    2. scores: sigmoid or softmax over the experts.
    3. selection: top-k of scores + expert bias; the bias only selects (arXiv 2408.15664), and with
       expert groups only the best groups take part (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    4. weights: the unbiased scores of the selected, normalised if ``route_norm``, times ``route_scale``.

    Scores stay in the gate's dtype in both directions.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Field names and meanings are torchtitan 0.3.0's."""

        num_experts: int  # E
        gate: Linear.Config
        num_expert_groups: int | None = None  # groups of consecutive experts; divides num_experts
        num_limited_groups: int | None = None  # groups a token may use
        top_k: int = 1  # K
        score_func: Literal["softmax", "sigmoid"] = "sigmoid"
        route_norm: bool = False
        route_scale: float = 1.0
        _debug_force_load_balance: bool = False  # benchmarks: experts in turn, scores still live

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gate = config.gate.build()
        self.selector: Callable[[Query], Selection] = select_live

    def forward(
        self,
        x_TD: torch.Tensor,
        expert_bias_E: torch.Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Routing:
        """Routes local tokens; T may be 0.

        Args:
            x_TD: ``(T, D)`` plain local tensor.
            expert_bias_E: ``(E,)`` added to the scores for selection only.
            layout: whose tokens these are, for a ``selector`` that knows them by name.
        """
        scores_TE = self._scores(x_TD)
        parts = (scores_TE.detach(), expert_bias_E)
        select, ranking, biased = (partial(f, *parts) for f in (self._select, self._ranking, _biased))
        selection = self.selector(Query(select, ranking, layout, biased))
        topk_scores_TK = scores_TE.gather(1, selection.ids_TK)
        if selection.weightless_TK is not None:
            topk_scores_TK = topk_scores_TK.masked_fill(selection.weightless_TK, 0)
        if self.config.route_norm:
            topk_scores_TK = topk_scores_TK / (topk_scores_TK.sum(-1, keepdim=True) + 1e-20)
        topk_scores_TK = topk_scores_TK * self.config.route_scale
        load_E = None if selection.load_T is None else self._count(selection.ids_TK, selection.load_T)
        counts_E = self._count(selection.ids_TK)
        return Routing(topk_scores_TK, selection.ids_TK, counts_E, load_E=load_E, origin=selection.origin)

    def _scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weight_ED = _local_gate(self.gate.weight).to(dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            if x_TD.dtype == dtype:
                logits_TE = F.linear(x_TD, weight_ED, self._gate_bias(dtype))
            else:
                logits_TE = _WideningLinear.apply(x_TD, weight_ED)
                if self.gate.bias is not None:
                    logits_TE = logits_TE + self._gate_bias(dtype)
            return logits_TE.sigmoid() if self.config.score_func == "sigmoid" else logits_TE.softmax(-1)

    def _gate_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        bias_E = self.gate.bias
        return None if bias_E is None else _local_gate(bias_E).to(dtype)

    @torch.no_grad()
    def _select(self, scores_TE: torch.Tensor, expert_bias_E: torch.Tensor | None) -> torch.Tensor:
        """``(T, K)`` int64, best first; equal scores go to the lower expert id, on every device."""
        if self.config._debug_force_load_balance:
            slots_N = torch.arange(scores_TE.shape[0] * self.config.top_k, device=scores_TE.device)
            return (slots_N % self.config.num_experts).view(-1, self.config.top_k)
        return _top_k(self._ranking(scores_TE, expert_bias_E), self.config.top_k)

    @torch.no_grad()
    def _ranking(self, scores_TE: torch.Tensor, expert_bias_E: torch.Tensor | None) -> torch.Tensor:
        biased_TE = _biased(scores_TE, expert_bias_E)
        if self.config.num_expert_groups is None:
            return biased_TE
        assert self.config.num_limited_groups is not None
        return _keep_best_groups(biased_TE, self.config.num_expert_groups, self.config.num_limited_groups)

    def _count(self, ids_TK: torch.Tensor, counts_T: torch.Tensor | None = None) -> torch.Tensor:
        """``(E,)`` int64. Integer adds: the order in which they happen cannot show."""
        ones_TK = torch.ones_like(ids_TK)
        if counts_T is not None:
            ones_TK = ones_TK * counts_T.unsqueeze(1)
        totals_E = ids_TK.new_zeros(self.config.num_experts)
        return totals_E.scatter_add_(0, ids_TK.flatten(), ones_TK.flatten())


class _WideningLinear(torch.autograd.Function):
    """``x.to(fp32) @ w.T`` that keeps the narrow x for backward, and no fp32 copy of it."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return kernels.gate(x_TD, weight_ED)

    @staticmethod
    @once_differentiable  # its type loses the parameter's name
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return kernels.gate_backward(grads[0].contiguous(), *ctx.saved_tensors)


def _biased(scores_TE: torch.Tensor, expert_bias_E: torch.Tensor | None) -> torch.Tensor:
    return scores_TE if expert_bias_E is None else scores_TE + expert_bias_E.to(scores_TE.dtype)


def _keep_best_groups(scores_TE: torch.Tensor, num_groups: int, num_limited_groups: int) -> torch.Tensor:
    """-inf for the experts outside the groups with the best sum of two."""
    scores_TGe = scores_TE.unflatten(-1, (num_groups, -1))
    group_scores_TG = scores_TGe.topk(2, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG.scatter_(-1, _top_k(group_scores_TG, num_limited_groups), True)
    return scores_TGe.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def _top_k(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest, best first, ties to the lower id.

    ``topk`` alone breaks ties as the kernel likes: equal scores would route differently with the number
    of rows or the device. So it picks from integers that are all different. It stays the op that picks
    because selective checkpointing saves its result: recomputation then routes as the forward did, even
    when its scores come out a bit different.
    """
    key_TE = _sorted_places(scores_TE) if scores_TE.dtype == torch.float64 else _keys(scores_TE)
    return key_TE.topk(k, dim=-1, sorted=True).indices


def _keys(scores_TE: torch.Tensor) -> torch.Tensor:
    """int64: the order of fp32 scores above, that of the ids, from behind, below.

    -0 is less than 0, and a NaN is beyond infinity on the side of its sign.
    """
    bits_TE = scores_TE.view(torch.int32)
    # The bits of a positive float grow with it; those of a negative one shrink.
    bits_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    num_experts = scores_TE.shape[-1]
    from_behind_E = torch.arange(num_experts - 1, -1, -1, device=scores_TE.device)
    return torch.add(from_behind_E, bits_TE, alpha=num_experts)


def _sorted_places(scores_TE: torch.Tensor) -> torch.Tensor:
    """int64: minus each score's place in a stable sort; for fp64, which leaves no bits for ids."""
    order_TE = scores_TE.sort(dim=-1, descending=True, stable=True).indices
    places_E = torch.arange(order_TE.shape[-1], device=order_TE.device)
    return torch.empty_like(order_TE).scatter_(-1, order_TE, -places_E.expand_as(order_TE))


def _local_gate(param: torch.Tensor) -> torch.Tensor:
    """The whole gate parameter as a plain tensor.

    Replicated over TP while each TP rank contributes only its part of the gradient: its own tokens
    (EP on) or its own slice of the experts' hidden dim (EP off). Hence ``Partial``; declaring it
    replicated lets TP copies drift apart (pytorch/torchtitan#2387).
    """
    if isinstance(param, DTensor):
        return param.to_local(grad_placements=[Partial()] * param.device_mesh.ndim)
    return param
