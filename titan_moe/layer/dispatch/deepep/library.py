"""Rows carried by the DeepEP library (deepseek-ai/DeepEP >= 2, ``ElasticBuffer``).

torchtitan 0.3.0's wrapper of it is not used: it has one buffer per process, not per group, rounds the
scores' gradient to bf16, and drops picks whose score is 0 together with their gradient.
"""

import importlib
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from titan_moe.layer.dispatch.base import Dispatched, DispatchLimits, DispatchMetadata, Routing, Traffic
from titan_moe.layer.dispatch.ops import Slots, gather_rows, slots_by_key, weighted_sum
from titan_moe.layer.layout import TokenLayout

logger = logging.getLogger(__name__)

# From commit 655d77e on, combine's weights are right across nodes; from 2.5 on, there is no ElasticBuffer.
INSTALL = (
    "install DeepEP 2 (before 2.5, commit 655d77e or later) from https://github.com/deepseek-ai/DeepEP; it "
    "needs torch >= 2.10, NCCL >= 2.30.4 and SM90, and PyPI's deep_ep is not it"
)
HIDDEN_MULTIPLE, MAX_TOP_K = 256, 32  # what its combine kernels are written for
NUM_SMS = 20  # where its estimate fails


def why_not(limits: DispatchLimits) -> str | None:
    """Why the library cannot serve these limits here, in words; None when it can."""
    if limits.device_type != "cuda":
        return f"the DeepEP library works on CUDA, not on {limits.device_type}"
    if limits.dtype != torch.bfloat16:
        dtype = str(limits.dtype).removeprefix("torch.")
        return f"the DeepEP library moves bfloat16 rows, training.mixed_precision_param is {dtype}"
    if limits.dim % HIDDEN_MULTIPLE or limits.top_k > MAX_TOP_K:
        return (
            f"the DeepEP library has kernels for dims that are multiples of {HIDDEN_MULTIPLE} and at most "
            f"{MAX_TOP_K} experts per token; this layer has {limits.dim} and {limits.top_k}"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "the DeepEP library needs a GPU of SM90 (Hopper) or newer"
    if limits.compiled:
        return "the DeepEP library cannot be traced by torch.compile"
    try:
        library = importlib.import_module("deep_ep")
    except Exception as error:  # its import checks NCCL and starts a compiler, and may fail in any way
        return f"the DeepEP library does not load ({' '.join(str(error).split())}); {INSTALL}"
    if not hasattr(library, "ElasticBuffer"):
        version = getattr(library, "__version__", "of unknown version")
        return f"the deep_ep found here ({version}) has no ElasticBuffer; {INSTALL}"
    return None


class Sizes(NamedTuple):
    """What a buffer is made for, the same on all ranks of its group."""

    num_tokens: int
    dim: int
    top_k: int


@dataclass
class _Shared:
    """One buffer and the number of layers that use it."""

    buffer: Any
    sizes: Sizes
    users: int = 0


# A buffer takes memory on every peer, so the layers of a group share one. Empty when all are released.
_BUFFERS: dict[dist.ProcessGroup, _Shared] = {}


@dataclass(frozen=True, kw_only=True)
class LibraryMetadata(DispatchMetadata):
    """The library's own receipt, and the R rows as slots of the arrived (U, K) grid."""

    handle: Any
    experts: Slots
    scores_UK: torch.Tensor


class SumsInFlight(NamedTuple):
    """Padded sums that the library's stream still works on, until ``event`` is waited for.

    ``z_UD`` is kept so that its memory is not given away before that.
    """

    out_QD: torch.Tensor
    event: Any
    z_UD: torch.Tensor


class Library:
    """Each rank weighs and sums a token's rows in fp32 and returns one; the library sums over ranks."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, limits: DispatchLimits) -> None:
        """Makes the group's buffer, or takes part in it. Collective where it is made or has to grow."""
        self.group, self.num_experts = group, num_experts
        sizes = Sizes(limits.num_max_tokens_per_rank, limits.dim, limits.top_k)
        shared = _BUFFERS.get(group)
        if shared is None:
            shared = _BUFFERS[group] = _Shared(_make_buffer(group, sizes), sizes)
        elif (most := Sizes(*map(max, sizes, shared.sizes))) != shared.sizes:
            shared.buffer.destroy()
            shared.buffer, shared.sizes = _make_buffer(group, most), most
        shared.users += 1

    def release(self) -> None:
        """The last layer's frees the buffer, which is collective."""
        shared = _BUFFERS[self.group]
        shared.users -= 1
        if not shared.users:
            del _BUFFERS[self.group]
            shared.buffer.destroy()

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout
    ) -> Dispatched[LibraryMetadata]:
        """One host sync, inside the library."""
        shared = _BUFFERS[self.group]
        padded = layout.num_local_tokens_after_padding
        if padded > shared.sizes.num_tokens:
            raise ValueError(
                f"{padded} tokens on a rank exceed the {shared.sizes.num_tokens} that the DeepEP buffer was "
                "made for (training.local_batch_size * training.seq_len, split over TP)"
            )
        scores_TK, ids_TK, present_TK = (*routing[:2], routing.present_TK)
        if present_TK is not None:
            ids_TK = torch.where(present_TK, ids_TK, -1)
        # Rows without picks: an empty tensor is a null pointer, which the library refuses (sglang#25397).
        pad = (0, 0, 0, max(padded, 1) - x_TD.shape[0])
        x_UD, scores_UK, local_ids_UK, handle = _Send.apply(
            F.pad(x_TD, pad), F.pad(scores_TK, pad), F.pad(ids_TK, pad, value=-1), shared, self.num_experts
        )
        num_rows = sum(handle.num_recv_tokens_per_expert_list)
        here_UK = local_ids_UK >= 0
        experts = slots_by_key(local_ids_UK, here_UK, num_rows)
        scores_UK = torch.where(here_UK, scores_UK, 0)  # the library does not say what the others are
        ends_e = handle.psum_num_recv_tokens_per_expert.to(torch.int64)
        counts_e = ends_e.diff(prepend=ends_e.new_zeros(1))
        metadata = LibraryMetadata.extend(
            layout, handle=handle, experts=experts, scores_UK=scores_UK, source=experts.source(x_UD)
        )
        return Dispatched(gather_rows(x_UD, experts), counts_e, metadata)

    def start_combine(self, y_RD: torch.Tensor, metadata: LibraryMetadata) -> SumsInFlight:
        """(R, D) to the padded (Q, D) sums, in flight."""
        z_UD = weighted_sum(y_RD, metadata.scores_UK, metadata.experts)
        out_QD, event = _Back.apply(z_UD, metadata.handle, _BUFFERS[self.group].buffer)
        return SumsInFlight(out_QD, event, z_UD)

    def finish_combine(self, in_flight: SumsInFlight, metadata: LibraryMetadata) -> torch.Tensor:
        """(T, D), ready for the current stream."""
        in_flight.event.current_stream_wait()
        return in_flight.out_QD[: metadata.num_local_tokens]

    def traffic(self, metadata: LibraryMetadata, itemsize: int) -> Traffic:
        """The rows that arrived: over all ranks, those sent. With each, K int64 ids and fp32 scores."""
        rows, top_k = metadata.scores_UK.shape
        row_bytes = metadata.dim * itemsize
        return Traffic(rows, rows * (row_bytes + top_k * (8 + 4)), rows, rows * row_bytes)


def _num_sms(buffer: Any, num_experts: int, top_k: int) -> int:
    try:
        return buffer.get_theoretical_num_sms(num_experts, top_k)
    except ZeroDivisionError:  # it read a bandwidth of 0 off some multi-node networks
        return NUM_SMS


def _make_buffer(group: dist.ProcessGroup, sizes: Sizes) -> Any:
    if torch.cuda.is_available():
        # NCCL connects with the first collective, and the library takes a communicator that is not there yet
        # for one that is (deepseek-ai/DeepEP#726).
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    buffer = importlib.import_module("deep_ep").ElasticBuffer(
        group,
        num_max_tokens_per_rank=sizes.num_tokens,
        hidden=sizes.dim,
        num_topk=sizes.top_k,
        deterministic=True,  # rows arrive by source rank, then by token: the contract's order
        allow_multiple_reduction=False,  # one rounding per token
        explicitly_destroy=True,  # or the garbage collector runs its barrier, on some ranks only
    )
    logger.info(f"DeepEP buffer made for {sizes}")
    return buffer


class _Send(torch.autograd.Function):
    """The backward of a dispatch is a combine (the library's own duality)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, shared: _Shared, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        x_UD, ids_UK, scores_UK, handle, _ = shared.buffer.dispatch(
            x.contiguous(),
            topk_idx=ids.contiguous(),
            topk_weights=scores.contiguous(),
            num_experts=num_experts,
            num_sms=_num_sms(shared.buffer, num_experts, ids.shape[1]),
            num_max_tokens_per_rank=shared.sizes.num_tokens,  # the same on all ranks
            do_cpu_sync=True,
        )
        ctx.buffer, ctx.handle = shared.buffer, handle
        ctx.mark_non_differentiable(ids_UK)
        return x_UD, scores_UK, ids_UK, handle

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_UD, grad_UK, *_ = grads
        grad_x, grad_scores, _ = ctx.buffer.combine(
            grad_UD.contiguous(), ctx.handle, topk_weights=grad_UK.contiguous()
        )
        return grad_x, grad_scores, None, None, None


class _Back(torch.autograd.Function):
    """The backward of a combine is a dispatch along the same handle."""

    @staticmethod
    def forward(ctx: Any, z_UD: torch.Tensor, handle: Any, buffer: Any) -> tuple[torch.Tensor, Any]:
        ctx.buffer, ctx.handle = buffer, handle
        out_QD, _, event = buffer.combine(z_UD.contiguous(), handle, async_with_compute_stream=True)
        return out_QD, event

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None, None]:
        handle = ctx.handle
        # num_sms: or the library would estimate it from num_experts before it has read the handle.
        grad_UD, *_ = ctx.buffer.dispatch(
            grads[0].contiguous(), handle=handle, num_sms=handle.num_sms, do_cpu_sync=False
        )
        return grad_UD, None, None
