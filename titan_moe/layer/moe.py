"""The MoE layer: the only place where router, dispatch and experts meet.

Shape suffixes, one letter one dim, on tensors only; this is the one legend, other files refer to it:

    B  batch on this data-parallel rank        L  sequence
    D  model dim                               F  expert hidden dim
    E  experts                                 e  experts on this EP rank
    K  experts per token (top-k)               T  tokens on this rank, B * L
    N  routed slots, T * K                     R  rows received by the local experts
    G  expert groups                           S  EP ranks that rows come from

    M  rows sent once per token and rank    U  of them, those that arrive here
    P  places in a (B, L) grid             C  columns of replayed ids: layers, or calls of them
    Q  T, filled up to a buffer's fixed size

A capital is the logical dim even where the tensor holds a shard of it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torchtitan.models.common import moe as upstream
from torchtitan.protocols.module import Module

from titan_moe.layer.border import SHARDED_TOKENS, TokenBorder
from titan_moe.layer.dispatch.base import DispatchMetadata, Routing, Traffic
from titan_moe.layer.experts import GroupedExperts
from titan_moe.layer.layout import TokenLayout
from titan_moe.layer.load_balance import count_tokens, count_traffic


class InFlight(NamedTuple):
    """The experts' results on their way back to their tokens; ``RoutedExperts.finish`` ends the way."""

    rows: Any  # what the dispatcher's start_combine returned
    receipt: DispatchMetadata


class RoutedExperts(Module):
    """Dispatch, experts and combine, on local tensors, in two halves: other work can be done in between."""

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.RoutedExperts.Config):
        """inner_experts and token_dispatcher: ours, or experts with GroupedExperts' call."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner_experts = config.inner_experts.build()
        self.token_dispatcher = config.token_dispatcher.build()

    def forward(self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout) -> InFlight:
        """Runs the experts and starts the combine."""
        x_RD, num_tokens_per_expert_e, receipt = self.token_dispatcher.dispatch(x_TD, routing, layout)
        source = (receipt.source,) if isinstance(self.inner_experts, GroupedExperts) else ()
        y_RD = self.inner_experts(x_RD, num_tokens_per_expert_e, *source)
        y_RD = y_RD.to(x_RD.dtype)  # GPT-OSS's answer in bf16
        return InFlight(self.token_dispatcher.start_combine(y_RD, receipt), receipt)

    def finish(self, in_flight: InFlight) -> torch.Tensor:
        """Returns ``(T, D)``: the weighted sum of each local token's experts, in the dtype of x."""
        return self.token_dispatcher.finish_combine(*in_flight)


class MoE(Module):
    """A Mixture-of-Experts layer that takes torchtitan 0.3.0's place in any of its models.

    1. enter: from DTensor to this rank's own tokens.
    2. route: K experts and their weights per token.
    3. routed experts: dispatch, compute, and send the results back.
    4. count: tokens per expert and bytes sent, once per training forward.
    5. shared experts, while the results are in flight.
    6. finish: the results arrive and are summed per token.
    7. leave: back to a DTensor of the input's placements and exact global shape; the shared are added.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.MoE.Config):
        """It has torchtitan 0.3.0's fields; its parts are ours."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.load_balance_coeff = config.load_balance_coeff
        # torchtitan's order of construction: the same seed then gives the same weights.
        self.routed_experts = config.routed_experts.build()
        self.router = config.router.build()
        self.shared_experts = config.shared_experts.build() if config.shared_experts is not None else None
        self.border: TokenBorder = SHARDED_TOKENS
        self.register_buffer("expert_bias_E", None, persistent=True)
        self.register_buffer("tokens_per_expert_E", None, persistent=False)
        self.register_buffer("traffic", None, persistent=False)
        self._init_self_buffers()

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, L, D)`` in the dtype of x, as a tensor of the same kind and placements.

        Args:
            x_BLD: a plain tensor, or a DTensor on the TP mesh: ``Shard(1)`` with SP, else replicated.
        """
        x_TD, layout = self.border.enter(x_BLD)
        routing = self.router(x_TD, self.expert_bias_E, layout)
        in_flight = self.routed_experts(x_TD, routing, layout)
        self._count(routing, in_flight.receipt, x_TD.element_size())
        shared_BLD = self.shared_experts(x_BLD) if self.shared_experts is not None else None
        out_TD = self.routed_experts.finish(in_flight)
        out_BLD = self.border.leave(out_TD, layout, like=x_BLD)
        return out_BLD if shared_BLD is None else out_BLD + shared_BLD

    def _count(self, routing: Routing, receipt: DispatchMetadata, itemsize: int) -> None:
        count_tokens(self.tokens_per_expert_E, routing.counted_E, training=self.training)
        traffic = self.routed_experts.token_dispatcher.traffic(receipt, itemsize)
        count_traffic(self.traffic, traffic, training=self.training)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        if buffer_device is None and self.tokens_per_expert_E is not None:
            buffer_device = self.tokens_per_expert_E.device
        # Counts are integers: exact at any size, and untouched by a cast of the model.
        num_experts = self.config.num_experts
        self.tokens_per_expert_E = torch.zeros(num_experts, dtype=torch.int64, device=buffer_device)
        self.traffic = torch.zeros(len(Traffic._fields), dtype=torch.int64, device=buffer_device)
        if self.load_balance_coeff is not None:
            self.expert_bias_E = torch.zeros(num_experts, dtype=torch.float32, device=buffer_device)
