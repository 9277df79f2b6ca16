"""Dispatch without EP: every expert is on this rank, tokens are only reordered."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_moe.layer.dispatch.base import (
    Dispatched,
    DispatchLimits,
    DispatchMetadata,
    Routing,
    TokenDispatcher,
    Traffic,
)
from titan_moe.layer.dispatch.ops import Slots, gather_rows, slots_by_key, weighted_sum
from titan_moe.layer.layout import TokenLayout


@dataclass(frozen=True, kw_only=True)
class LocalMetadata(DispatchMetadata):
    """The N routed slots by expert."""

    topk_scores_TK: torch.Tensor
    slots: Slots


class LocalDispatcher(TokenDispatcher[LocalMetadata]):
    """Sorts tokens by expert, and sums the K results of each token on the way back. R == N."""

    requires_ep = False
    serves_ep = False
    needs_host_sync = False  # but for masked picks: how many are left decides a shape
    bitwise_equal_to = "local"
    moves = "nothing"
    needs = "EP off"
    choose = "without EP"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenDispatcher.Config):
        """No keys of its own."""

        def validate(self, limits: DispatchLimits) -> None:
            """Refuses EP: this backend never leaves the rank."""
            if limits.ep_size > 1:
                raise ValueError(
                    "moe.dispatcher 'local' cannot serve parallelism.expert_parallel_degree "
                    f"({limits.ep_size}) > 1; use 'all_to_all' or expert_parallel_degree 1"
                )

    def bind(self, ep_mesh: DeviceMesh | None, limits: DispatchLimits) -> None:
        """See the contract in ``base``; a mesh of more than one rank is refused."""
        if ep_mesh is not None and ep_mesh.size() > 1:
            raise ValueError(f"the local dispatcher cannot be bound to an EP mesh of {ep_mesh.size()} ranks")
        super().bind(ep_mesh, limits)

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout
    ) -> Dispatched[LocalMetadata]:
        """See the contract in ``base``. No communication."""
        slots = slots_by_key(routing.topk_expert_ids_TK, routing.present_TK)
        metadata = LocalMetadata.extend(
            layout, topk_scores_TK=routing.topk_scores_TK, slots=slots, source=slots.source(x_TD)
        )
        return Dispatched(gather_rows(x_TD, slots), routing.num_tokens_per_expert_E, metadata)

    def start_combine(self, y_RD: torch.Tensor, metadata: LocalMetadata) -> torch.Tensor:
        """See the contract in ``base``. No communication."""
        return y_RD

    def finish_combine(self, in_flight: torch.Tensor, metadata: LocalMetadata) -> torch.Tensor:
        """See the contract in ``base``."""
        return weighted_sum(in_flight, metadata.topk_scores_TK, metadata.slots)

    def traffic(self, metadata: LocalMetadata, itemsize: int) -> Traffic:
        """None."""
        return Traffic()

    def uniform_rows_per_token(self, limits: DispatchLimits) -> tuple[float, float]:
        """None."""
        return 0.0, 0.0
