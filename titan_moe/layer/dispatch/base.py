"""The dispatcher contract, field by field. The shape legend is in ``titan_moe/layer/moe.py``."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import Configurable

from titan_moe.layer.layout import TokenLayout


class RowSource(NamedTuple):
    """What rows were gathered from: row r is ``rows_TD[index_R[r]]``; token t has the rows ``place_TK[t]``.

    It is kept for backward in place of the rows. Backward adds the K row gradients of each token.
    ``present_TK`` is bool, True where slot (t, k) has a row; None where every slot has one.
    """

    rows_TD: torch.Tensor
    index_R: torch.Tensor
    place_TK: torch.Tensor
    present_TK: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DispatchMetadata(TokenLayout):
    """What ``dispatch`` did, for ``combine`` to undo: the tokens' layout, and what each backend adds to it.

    It is frozen, so that several forwards may be in flight, and a recomputation has a receipt of its own.
    """

    source: RowSource | None = None  # of the rows that dispatch made; None where it kept nothing smaller

    @classmethod
    def extend(cls, layout: TokenLayout, **receipt: Any) -> Self:
        """``layout`` plus what a backend's ``combine`` needs, as that backend's own class."""
        return cls(**{**vars(layout), **receipt})


class Routing(NamedTuple):
    """What the router decided for T tokens.

    Attributes:
        topk_scores_TK: weights of the chosen experts, fp32 (fp64 when the gate ran in fp64).
        topk_expert_ids_TK: int64, K different ids in [0, E) per row; the column is the top-k slot.
        num_tokens_per_expert_E: int64, this rank's own tokens per expert; masked picks do not count.
        present_TK: bool. Where it is False, the pick is masked and its id may be -1: the pick goes to no
            expert, adds nothing to the output, and its score gets a zero gradient. None masks no pick.
        load_E: int64, the tokens per expert that count as load; None where all of them do.
        origin: says where the ids come from, for the check of a routing replay. Dispatchers ignore it.
    """

    topk_scores_TK: torch.Tensor
    topk_expert_ids_TK: torch.Tensor
    num_tokens_per_expert_E: torch.Tensor
    present_TK: torch.Tensor | None = None
    load_E: torch.Tensor | None = None
    origin: Any = None

    @property
    def counted_E(self) -> torch.Tensor:
        """``(E,)`` int64: the tokens that count as load."""
        return self.num_tokens_per_expert_E if self.load_E is None else self.load_E


class Traffic(NamedTuple):
    """What one rank hands to the network in one forward, including the rows that it sends to itself.

    The bytes are those of the rows and of what travels with each row (ids, scores). The exchange of counts is
    not in them. Backward sends the same the other way round, except where a dispatcher says otherwise.
    """

    dispatch_rows: int = 0
    dispatch_bytes: int = 0
    combine_rows: int = 0
    combine_bytes: int = 0


M = TypeVar("M", bound=DispatchMetadata)


class Dispatched(NamedTuple, Generic[M]):
    """The rows for the local experts, and the receipt for the way back.

    Attributes:
        x_RD: the rows, ordered by expert, then by source rank, then by local token; there is no padding row.
        num_tokens_per_local_expert_e: int64, the rows of each expert; they sum to R.
        metadata: the receipt. It is immutable; ``combine`` needs nothing else, and may run twice with the
            same bits.
    """

    x_RD: torch.Tensor
    num_tokens_per_local_expert_e: torch.Tensor
    metadata: M


@dataclass(frozen=True, kw_only=True)
class DispatchLimits:
    """The sizes that a dispatcher may rely on for a whole run. They are the same on every rank."""

    num_experts: int  # E
    top_k: int  # K
    dim: int  # D
    ep_size: int
    num_max_tokens_per_rank: int  # num_local_tokens_after_padding of the longest batch
    dtype: torch.dtype = torch.bfloat16  # of the rows
    device_type: str = "cpu"
    compiled: bool = False  # the layer runs under torch.compile
    num_expert_groups: int | None = None  # G, with group-limited routing
    num_limited_groups: int | None = None  # groups a token may use


class TokenDispatcher(Configurable, ABC, Generic[M]):
    """Moves tokens to the ranks that own their experts, and the results back.

    Not a Module: it has no parameters and keeps nothing between calls, so recomputation, several
    microbatches in flight and two models in one process need no special care.
    """

    requires_ep: ClassVar[bool]  # refuses to run without an EP mesh
    serves_ep: ClassVar[bool] = True  # can be bound to an EP mesh of several ranks
    needs_host_sync: ClassVar[bool]  # dispatch waits for the device once
    bitwise_equal_to: str | None  # "local" when outputs carry the same bits, else None
    moves: str  # for docs/dispatchers.md: what leaves a rank
    needs: str  # and what it takes
    choose: str  # and when to choose it
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # Config keys the contract tests go through

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        """num_experts and top_k have the names and meaning they have in torchtitan 0.3.0."""

        num_experts: int  # E
        top_k: int  # K

        def validate(self, limits: DispatchLimits) -> None:
            """Raises ValueError when this backend cannot work within ``limits``."""
            if limits.num_experts % limits.ep_size:
                raise ValueError(
                    f"num_experts ({limits.num_experts}) must be divisible by "
                    f"parallelism.expert_parallel_degree ({limits.ep_size})"
                )

    def __init__(self, config: Config) -> None:
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.ep_mesh: DeviceMesh | None = None
        self.limits: DispatchLimits | None = None

    def bind(self, ep_mesh: DeviceMesh | None, limits: DispatchLimits) -> None:
        """Ties the dispatcher to its EP mesh; None means that EP is off.

        It is called once, before the first step. ``ownership.py`` says which rank owns which expert.
        """
        self.ep_mesh, self.limits = ep_mesh, limits

    def unbind(self) -> None:
        """Gives back what ``bind`` took. It is collective, and called once, before the process groups end."""

    @abstractmethod
    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout) -> Dispatched[M]:
        """Sends each token to its K experts. It is collective over the EP mesh; T may be 0 on any rank."""

    def combine(self, y_RD: torch.Tensor, metadata: M) -> torch.Tensor:
        """Returns ``(T, D)``: the score-weighted sum of each token's K expert outputs, on its own rank.

        It multiplies and accumulates in fp32 (fp64 for fp64 rows), in the order of the top-k slots, and
        rounds once, to the dtype of ``y_RD``. A variant that sums before it sends rounds once more per rank
        and says so: its ``bitwise_equal_to`` is None.
        """
        return self.finish_combine(self.start_combine(y_RD, metadata), metadata)

    @abstractmethod
    def start_combine(self, y_RD: torch.Tensor, metadata: M) -> Any:
        """The first half of ``combine``: it launches the communication and does not wait for it."""

    @abstractmethod
    def finish_combine(self, in_flight: Any, metadata: M) -> torch.Tensor:
        """The second half of ``combine``: it waits for what ``start_combine`` returned, and sums."""

    @abstractmethod
    def traffic(self, metadata: M, itemsize: int) -> Traffic:
        """What a forward with this receipt sends, as numbers that the host knows without a sync.

        Args:
            itemsize: bytes per element of the rows.
        """

    @abstractmethod
    def uniform_rows_per_token(self, limits: DispatchLimits) -> tuple[float, float]:
        """The rows that ``dispatch`` and ``combine`` send per token, expected under uniform routing."""
