"""A double of the DeepEP library (deepseek-ai/DeepEP 2.x, ``deep_ep.ElasticBuffer``): CPU tensors, gloo.

Written from the library's documentation, its host's checks and what its kernels do (commit 0297fc80), not
from titan_moe. Tests that use it say that titan_moe keeps the contract as it is written down here. They say
nothing about the library: not its kernels, its streams, its memory, its speed, nor whether it runs at all.

Only what a training step uses is there: rows in bf16, one per token and rank (``do_expand=False``). Every
breach of the contract raises `ContractError` on all ranks, also where the library would not notice. Sizes
are checked one by one; the library compares bytes, for which that suffices on every topology.

`installed` puts it in the place of ``deep_ep``. `calls` says what was called, `alive` which buffers exist.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__version__ = "2.0.0+double"

KERNEL_HIDDEN_MULTIPLE = 256  # the combine kernel's static assertion
MAX_TOPK = 32  # a lane of a warp per pick
NUM_SMS = 24


class ContractError(RuntimeError):
    """The caller broke the library's contract."""


class Call(NamedTuple):
    """``name``: init, dispatch, cached dispatch, combine, wait or destroy; ``buffer``: which one, from 0."""

    name: str
    buffer: int
    sizes: dict[str, Any]


@dataclass(kw_only=True)
class Settings:
    """What tests may choose.

    Attributes:
        hidden_multiple: KERNEL_HIDDEN_MULTIPLE in truth; 8 is what the library's host code asks for.
        sum_order: the order of a token's addends in combine: by its first pick on each rank, as the kernels
            have it, or by rank.
        unspecified: the weight that arrives with a pick of another rank; nothing promises what it is.
    """

    hidden_multiple: int = KERNEL_HIDDEN_MULTIPLE
    sum_order: Literal["slot", "rank"] = "slot"
    unspecified: float = float("nan")


settings = Settings()
calls: list[Call] = []
alive: list["ElasticBuffer"] = []
_shuffle = torch.Generator()


@contextmanager
def installed(**chosen: Any) -> Iterator[None]:
    """``import deep_ep`` finds the double; every buffer made in here must be destroyed in here."""
    global settings
    settings = Settings(**chosen)
    calls.clear()
    alive.clear()
    _shuffle.manual_seed(0)
    sys.modules["deep_ep"] = sys.modules[__name__]
    try:
        yield
        _require(not alive, f"{len(alive)} buffers were not destroyed: they hold memory on every rank")
    finally:
        del sys.modules["deep_ep"]


class EventOverlap:
    """The end of an asynchronous call."""

    def __init__(self, pending: list[tuple[Tensor, Tensor]] | None, buffer: int) -> None:
        self._pending, self._buffer = pending, buffer

    def current_stream_wait(self) -> None:
        """From here on the results are there. Waiting again changes nothing."""
        _require(self._pending is not None, "a synchronous call has no event to wait for")
        calls.append(Call("wait", self._buffer, {}))
        for result, value in self._pending or []:
            result.data.copy_(value)  # .data: to autograd this is no change in place
        self._pending = []


@dataclass(kw_only=True, eq=False)
class EPHandle:
    """The receipt of a dispatch. Names without an underscore are the library's."""

    num_experts: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor  # this rank's own, cloned
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    do_expand: bool = False
    expert_alignment: int = 1
    _sources: list[tuple[int, int]] = field(repr=False)  # (rank, token) of each received row
    _recv_topk_idx: Tensor = field(repr=False)


class ElasticBuffer:
    """Making, destroying, dispatching and combining are collective over ``group``."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        deterministic: bool = False,
        allow_multiple_reduction: bool = True,
        explicitly_destroy: bool = False,
        **others: Any,
    ) -> None:
        _not_modelled(others)
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.deterministic, self.explicitly_destroy, self.destroyed = deterministic, explicitly_destroy, False
        self._number = sum(call.name == "init" for call in calls)
        sizes = {"num_max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden, "num_topk": num_topk}
        options = {"deterministic": deterministic, "allow_multiple_reduction": allow_multiple_reduction}
        problem = _first(
            (num_max_tokens_per_rank > 0 and hidden > 0, f"sizes must be positive, got {sizes}"),
            (num_topk <= MAX_TOPK, f"num_topk {num_topk} exceeds {MAX_TOPK}"),
            (hidden % settings.hidden_multiple == 0, f"no kernel for hidden {hidden}"),
        )
        self._exchange("init", problem, (), sizes | options | {"explicitly_destroy": explicitly_destroy})
        alive.append(self)

    def destroy(self) -> None:
        """Collective. A second call does nothing."""
        _require(self.explicitly_destroy, "destroy() needs explicitly_destroy=True")
        if self.destroyed:
            return
        groups = dist.distributed_c10d._world.pg_map
        _require(self.group in groups, "the process group ended before the buffer that uses it")
        self._exchange("destroy", "", (), {})
        self.destroyed = True
        alive.remove(self)

    def get_theoretical_num_sms(self, num_experts: int | None, num_topk: int) -> int:
        """An estimate by bandwidths, in which the library divides by a function of num_experts."""
        _require(num_experts is not None, "num_sms was not given and cannot be estimated without num_experts")
        return NUM_SMS

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        num_sms: int = 0,
        async_with_compute_stream: bool = False,
        handle: EPHandle | None = None,
        do_cpu_sync: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, EPHandle, EventOverlap]:
        """Each token once to every rank that owns one of its experts; along ``handle``, if there is one."""
        _not_modelled(others)
        self._check_usable()
        num_topk = (handle.topk_idx if handle else topk_idx).shape[1]  # type: ignore[union-attr]
        num_sms = num_sms or self.get_theoretical_num_sms(num_experts, num_topk)  # before it reads the handle
        if handle is not None:
            constants = (num_experts, num_max_tokens_per_rank)
            nothing = topk_idx is None and topk_weights is None and not do_cpu_sync
            parts, weights = self._dispatch_again(x, handle, nothing, constants), None
        else:
            _require(do_cpu_sync is not False, "the double always says how many rows arrived")
            num_max = num_max_tokens_per_rank or self.num_max_tokens_per_rank
            problem = self._problem_of_rows(x, num_max) or _problem_of_picks(
                x, topk_idx, topk_weights, num_experts, self
            )
            sizes = {"rows": len(x), "num_max_tokens_per_rank": num_max, "num_experts": num_experts}
            parts = self._exchange("dispatch", problem, (x, topk_idx, topk_weights), sizes)
            handle, weights = self._new_handle(parts, num_experts or 0, num_max, num_sms)
        rows = [parts[rank][0][token] for rank, token in handle._sources]
        recv_x = torch.stack(rows) if rows else x.new_empty(0, x.shape[1])
        results = (recv_x, handle._recv_topk_idx.clone(), weights)
        return *results, handle, self._finish(results, async_with_compute_stream)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        *,
        async_with_compute_stream: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Each token's rows back, summed in fp32 and rounded once; each pick's weight from its rank."""
        _not_modelled(others)
        self._check_usable()
        shape, given = tuple(handle._recv_topk_idx.shape), topk_weights is not None
        problem = self._problem_of_tensor(x) or _first(
            (len(x) == handle.num_recv_tokens, f"{len(x)} rows, {handle.num_recv_tokens} were received"),
            (not given or _is(topk_weights, torch.float32, shape), f"topk_weights must be float32 {shape}"),
        )
        own = (x, topk_weights, handle._sources)
        parts = self._exchange("combine", problem, own, {"rows": len(x), "weights": given})
        results = self._reduce(x.shape[1], handle, parts, weights=given)
        return *results, self._finish(results, async_with_compute_stream)

    def _dispatch_again(
        self, x: Tensor, handle: EPHandle, nothing: bool, constants: tuple[int | None, int | None]
    ) -> list[Any]:
        """Along a handle. ``nothing``: neither picks nor a host sync are asked for."""
        own = (handle.num_experts, handle.num_max_tokens_per_rank)
        problem = self._problem_of_rows(x, handle.num_max_tokens_per_rank) or _first(
            (nothing, "with a handle topk_idx and topk_weights must be None, do_cpu_sync must not be True"),
            (all(a in (None, b) for a, b in zip(constants, own, strict=True)), f"the handle's are {own}"),
            (len(x) == len(handle.topk_idx), f"{len(x)} rows for a handle of {len(handle.topk_idx)}"),
        )
        return self._exchange("cached dispatch", problem, (x,), {"rows": len(x)})

    def _exchange(self, name: str, problem: str, own: tuple[Any, ...], sizes: dict[str, Any]) -> list[Any]:
        """Every rank's part; raises on all ranks if one broke the contract or does something else."""
        gathered: list[Any] = [None] * self.num_ranks
        same = (name, {key: value for key, value in sizes.items() if key != "rows"})
        own = tuple(part.detach() if isinstance(part, Tensor) else part for part in own)
        dist.all_gather_object(gathered, (problem, same, own), group=self.group)
        for rank, (told, theirs, _) in enumerate(gathered):
            _require(not told, f"{name} on rank {rank}: {told}")
            _require(theirs == same, f"rank {rank} calls {theirs}, rank {self.rank_idx} {same}")
        calls.append(Call(name, self._number, sizes))
        return [part for *_, part in gathered]

    def _check_usable(self) -> None:
        _require(not self.destroyed, "the buffer was destroyed")
        filled: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        filled = filled and torch.are_deterministic_algorithms_enabled()
        _require(not filled, "torch.utils.deterministic.fill_uninitialized_memory must be False")

    def _problem_of_rows(self, x: Tensor, num_max: int) -> str:
        capacity = self.num_max_tokens_per_rank
        return self._problem_of_tensor(x) or _first(
            (len(x) > 0, "no rows: an empty tensor is a null pointer"),
            (len(x) <= num_max, f"{len(x)} rows exceed num_max_tokens_per_rank {num_max}"),
            (num_max <= capacity, f"num_max_tokens_per_rank {num_max}, the buffer's is {capacity}"),
        )

    def _problem_of_tensor(self, x: Tensor) -> str:
        return _first(
            (_is(x, torch.bfloat16) and x.dim() == 2, "x must be contiguous bfloat16 [num_tokens, hidden]"),
            (x.shape[-1] <= self.hidden, f"hidden {x.shape[-1]}, the buffer's is {self.hidden}"),
            (x.shape[-1] % settings.hidden_multiple == 0, f"no kernel for hidden {x.shape[-1]}"),
        )

    def _new_handle(
        self, parts: list[Any], num_experts: int, num_max: int, num_sms: int
    ) -> tuple[EPHandle, Tensor]:
        """The handle, and the weights as they arrive."""
        num_local = num_experts // self.num_ranks
        ids = [idx - self.rank_idx * num_local for _, idx, _ in parts]
        ids = [torch.where((idx >= 0) & (idx < num_local), idx, -1) for idx in ids]
        sources = [(s, t) for s, idx in enumerate(ids) for t, row in enumerate(idx.tolist()) if max(row) >= 0]
        per_rank = torch.tensor([sum(s == rank for s, _ in sources) for rank in range(self.num_ranks)])
        if not self.deterministic:
            sources = [sources[i] for i in torch.randperm(len(sources), generator=_shuffle).tolist()]
        own_idx = parts[self.rank_idx][1]
        recv_idx = own_idx.new_empty(len(sources), own_idx.shape[1])
        sent = torch.empty(recv_idx.shape)
        for row, (rank, token) in enumerate(sources):
            recv_idx[row], sent[row] = ids[rank][token], parts[rank][2][token]
        counts = torch.bincount(recv_idx[recv_idx >= 0], minlength=num_local)
        handle = EPHandle(
            num_experts=num_experts,
            num_max_tokens_per_rank=num_max,
            num_sms=num_sms,
            topk_idx=own_idx.clone(),
            num_recv_tokens=len(sources),
            num_recv_tokens_per_expert_list=counts.tolist(),
            psum_num_recv_tokens_per_scaleup_rank=per_rank.cumsum(0).to(torch.int32),
            psum_num_recv_tokens_per_expert=counts.cumsum(0).to(torch.int32),
            _sources=sources,
            _recv_topk_idx=recv_idx,
        )
        return handle, torch.where(recv_idx >= 0, sent, settings.unspecified)

    def _reduce(
        self, hidden: int, handle: EPHandle, parts: list[Any], *, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's tokens: the sums, and the weights if there are any."""
        num_local = handle.num_experts // self.num_ranks
        sums, returned = torch.zeros(len(handle.topk_idx), hidden), torch.zeros(handle.topk_idx.shape)
        row_of = [{source: row for row, source in enumerate(sources)} for *_, sources in parts]
        for token, ids in enumerate(handle.topk_idx.tolist()):
            rank_of_slot = {slot: id_ // num_local for slot, id_ in enumerate(ids) if id_ >= 0}
            ranks = list(dict.fromkeys(rank_of_slot.values()))
            for rank in ranks if settings.sum_order == "slot" else sorted(ranks):
                sums[token] += parts[rank][0][row_of[rank][self.rank_idx, token]].float()
            for slot, rank in rank_of_slot.items() if weights else ():
                returned[token, slot] = parts[rank][1][row_of[rank][self.rank_idx, token], slot]
        return sums.to(torch.bfloat16), returned if weights else None

    def _finish(self, results: tuple[Tensor | None, ...], in_flight: bool) -> EventOverlap:
        """Where the caller does not wait yet, the results hold nothing of use until it does."""
        if not in_flight:
            return EventOverlap(None, self._number)
        pending = [(result, result.clone()) for result in results if result is not None]
        for result, _ in pending:
            result.fill_(torch.nan if result.is_floating_point() else torch.iinfo(result.dtype).min)
        return EventOverlap(pending, self._number)


def _problem_of_picks(
    x: Tensor, topk_idx: Any, topk_weights: Any, num_experts: int | None, buffer: ElasticBuffer
) -> str:
    """Of a dispatch without a handle."""
    count, shape = num_experts or 0, (len(x), topk_idx.shape[-1])
    problem = _first(
        (count > 0 and count % buffer.num_ranks == 0, f"{num_experts} experts on {buffer.num_ranks} ranks"),
        (_is(topk_idx, torch.int64, shape), "topk_idx must be contiguous int64 [num_tokens, num_topk]"),
        (_is(topk_weights, torch.float32, shape), "topk_weights must be contiguous float32, like topk_idx"),
        (shape[1] <= buffer.num_topk, f"num_topk {shape[1]}, the buffer's is {buffer.num_topk}"),
    )
    picks = [[id_ for id_ in row if id_ != -1] for row in topk_idx.tolist()]
    return problem or _first(
        (all(0 <= id_ < count for row in picks for id_ in row), "an expert id is out of range"),
        (all(len(row) == len(set(row)) for row in picks), "a token picked an expert twice"),
    )


def _is(value: Any, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> bool:
    if not isinstance(value, Tensor) or value.dtype != dtype or not value.is_contiguous():
        return False
    return shape is None or tuple(value.shape) == shape


def _first(*rules: tuple[bool, str]) -> str:
    """What the first rule that does not hold says; empty if all hold."""
    return next((words for holds, words in rules if not holds), "")


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ContractError(words)


def _not_modelled(others: dict[str, Any]) -> None:
    if others:
        raise NotImplementedError(f"the double has no {', '.join(others)}")
