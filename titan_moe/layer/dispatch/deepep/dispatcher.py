"""DeepEP-style dispatch: one row per token and rank, instead of one per chosen expert.

Under uniform routing over S ranks that is ``S * (1 - C(E - E/S, K) / C(E, K))`` rows per token where
all_to_all sends K. It is an algorithm on c10d collectives; the DeepEP library is one way to carry it.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_moe.layer.dispatch.base import (
    Dispatched,
    DispatchLimits,
    Routing,
    TokenDispatcher,
    Traffic,
)
from titan_moe.layer.dispatch.deepep import library
from titan_moe.layer.dispatch.deepep.c10d import PerRank, PerSlot
from titan_moe.layer.dispatch.deepep.library import Library
from titan_moe.layer.dispatch.uniform import ranks_per_token
from titan_moe.layer.layout import TokenLayout


class DeepEPDispatcher(TokenDispatcher[Any]):
    """On any c10d backend, or on the DeepEP library.

    ``per_rank``: the expert's rank weighs and sums a token's rows in fp32 and returns one row, rounded to
    the rows' dtype; fewest bytes, one rounding more per rank. ``per_slot``: it returns all K rows, forward
    and backward; the bytes of all_to_all on that way, and its bits.
    """

    requires_ep = True
    needs_host_sync = True
    moves = "a row per token and rank that owns one of its experts, both ways; 8 bytes per chosen expert"
    needs = "EP; any c10d backend, or the DeepEP library with CUDA and bf16"
    choose = "with many experts per token and few EP ranks, or with group-limited routing"
    variants = (
        {"transport": "c10d", "combine": "per_rank"},
        {"transport": "c10d", "combine": "per_slot"},
    )

    @dataclass(kw_only=True, slots=True)
    class Config(TokenDispatcher.Config):
        """``[moe.deepep]``."""

        # Who carries the rows. auto: the DeepEP library where it works with combine, else c10d.
        transport: Literal["auto", "c10d", "deep_ep"] = "auto"
        combine: Literal["per_rank", "per_slot"] = "per_rank"

        def validate(self, limits: DispatchLimits) -> None:
            """Refuses a library that was asked for by name and cannot work."""
            TokenDispatcher.Config.validate(self, limits)
            if self.transport == "deep_ep" and (reason := self.why_not_library(limits)):
                raise ValueError(f"moe.deepep.transport 'deep_ep': {reason}; or use 'c10d'")

        def why_not_library(self, limits: DispatchLimits) -> str | None:
            """Why c10d carries the rows; None when the library does."""
            if self.transport == "c10d":
                return "moe.deepep.transport is 'c10d'"
            if self.combine == "per_slot":
                return "moe.deepep.combine 'per_slot' returns K rows, the DeepEP library sums them"
            return library.why_not(limits)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.per_slot = config.combine == "per_slot"
        self.bitwise_equal_to = None
        if self.per_slot:
            self.bitwise_equal_to = "local"
            self.moves = "a row per token and rank that owns one of its experts; back, one per chosen expert"
            self.needs = "EP; any c10d backend"
            self.choose = "as above, where bits count"
        self.transport: PerRank | PerSlot | Library | None = None

    def bind(self, ep_mesh: DeviceMesh | None, limits: DispatchLimits) -> None:
        """See the contract in ``base``. Collective where the library carries the rows: it makes a buffer."""
        if ep_mesh is None:
            raise ValueError("the deepep dispatcher needs an EP mesh; use 'all_to_all' or 'local' without EP")
        super().bind(ep_mesh, limits)
        if self.config.why_not_library(limits) is None:
            self.transport = Library(ep_mesh.get_group(), self.num_experts, limits)
        else:
            self.transport = (PerSlot if self.per_slot else PerRank)(ep_mesh, self.num_experts)

    def unbind(self) -> None:
        """Frees the library's buffer with its last layer."""
        if isinstance(self.transport, Library):
            self.transport.release()
        self.transport = None

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout) -> Dispatched[Any]:
        """See the contract in ``base``. One host sync."""
        return self._bound().dispatch(x_TD, routing, layout)

    def start_combine(self, y_RD: torch.Tensor, metadata: Any) -> Any:
        """See the contract in ``base``; under per_rank, with one more rounding per rank."""
        return self._bound().start_combine(y_RD, metadata)

    def finish_combine(self, in_flight: Any, metadata: Any) -> torch.Tensor:
        """See the contract in ``base``."""
        return self._bound().finish_combine(in_flight, metadata)

    def traffic(self, metadata: Any, itemsize: int) -> Traffic:
        """See the contract in ``base``. Under per_slot, dispatch's backward sends K rows per token."""
        return self._bound().traffic(metadata, itemsize)

    def uniform_rows_per_token(self, limits: DispatchLimits) -> tuple[float, float]:
        """See the contract in ``base``."""
        rows = ranks_per_token(
            limits.num_experts,
            limits.top_k,
            limits.ep_size,
            num_expert_groups=limits.num_expert_groups,
            num_limited_groups=limits.num_limited_groups,
        )
        return rows, float(limits.top_k) if self.per_slot else rows

    def _bound(self) -> Any:
        assert self.transport is not None, "bind comes first"
        return self.transport
