"""What one rank's collectives send to other ranks, counted where they are called, by mesh axis.

A tensor of X bytes in a group of n ranks, by the ring algorithms: an all-gather of it sends ``(n - 1) * X``,
a reduce-scatter ``(n - 1) / n * X``, an all-reduce twice that, an all-to-all what its splits give to others.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "cplib")
# They move no tensor, or what they move is counted where it is sent.
_SILENT = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv"}

_Share = Callable[[int, int], float]  # (bytes of the tensors given, ranks) -> bytes sent
_SHARES: dict[str, _Share] = {
    "all-gather": lambda given, ranks: (ranks - 1) * given,
    "reduce-scatter": lambda given, ranks: (ranks - 1) / ranks * given,
    "all-reduce": lambda given, ranks: 2 * (ranks - 1) / ranks * given,
    "broadcast": lambda given, ranks: (ranks - 1) / ranks * given,
    "send": lambda given, ranks: given,
}
# What the collective is, and the arguments with the tensors given. An all-to-all's splits say what is sent.
_COLLECTIVES: dict[str, tuple[str, str]] = {
    "_allgather_base_": ("all-gather", "input_tensor"),
    "allgather_": ("all-gather", "input_tensors"),
    "allgather_into_tensor_coalesced_": ("all-gather", "inputs"),
    "all_gather_into_tensor": ("all-gather", "input"),
    "all_gather_into_tensor_out": ("all-gather", "input"),
    "all_gather_into_tensor_coalesced": ("all-gather", "inputs"),
    "_reduce_scatter_base_": ("reduce-scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", "inputs"),
    "reduce_scatter_tensor": ("reduce-scatter", "input"),
    "reduce_scatter_tensor_out": ("reduce-scatter", "input"),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", "inputs"),
    "allreduce_": ("all-reduce", "tensors"),
    "allreduce_coalesced_": ("all-reduce", "tensors"),
    "all_reduce": ("all-reduce", "input"),
    "all_reduce_": ("all-reduce", "input"),
    "all_reduce_coalesced": ("all-reduce", "inputs"),
    "all_reduce_coalesced_": ("all-reduce", "inputs"),
    "broadcast": ("broadcast", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "send": ("send", "tensors"),
    "isend": ("send", "tensor"),
    "all_to_all_single": ("all-to-all", "input"),
    "alltoall_base_": ("all-to-all", "input"),
    "shard_dim_alltoall": ("all-to-all", "input"),
    "flex_cp_allgather": ("all-gather", "k v"),
    "flex_cp_allgather_backward": ("reduce-scatter", "grad_full_k grad_full_v"),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One kind of traffic: the mesh axis, the collective and the dtype of what it moves."""

    axis: str
    collective: str
    dtype: torch.dtype


class Wire(TorchDispatchMode):
    """Counts, while entered, what this rank sends.

    Attributes:
        sent: bytes to other ranks, by ``Call``.
    """

    def __init__(self, axis_of_group: dict[str, str]) -> None:
        """Takes each mesh axis's name by the name of its process group."""
        super().__init__()
        self.axis_of_group = axis_of_group
        self.sent: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if wraps_another(types):
            return NotImplemented
        kwargs = kwargs or {}
        if getattr(func, "namespace", None) in _NAMESPACES:
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs
        group = _group(given)
        if group is None or name in _SILENT:
            return
        if name not in _COLLECTIVES:
            raise RuntimeError(f"titan_moe/plan/wire.py does not know the collective {func}")
        kind, named = _COLLECTIVES[name]
        tensors = list(_tensors([given[argument] for argument in named.split()]))
        if kind == "all-to-all":
            sent = _to_others(tensors[0], given.get("input_split_sizes"), group)
        else:
            sent = _SHARES[kind](sum(map(_bytes, tensors)), group.size())
        call = Call(self.axis_of_group.get(group.group_name, "world"), kind, tensors[0].dtype)
        self.sent[call] += round(sent)


def wraps_another(types: Any) -> bool:
    """Whether DTensor or a pending collective must unwrap first; a mode then sees what happens inside."""
    return any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types)


def _group(given: dict[str, Any]) -> dist.ProcessGroup | None:
    """The collective's; None where nothing is sent, as in a wait."""
    if "process_group" in given:
        return dist.ProcessGroup.unbox(given["process_group"])
    name: Any = given.get("group_name", given.get("pg_name"))
    return name if name is None or isinstance(name, dist.ProcessGroup) else _resolve_process_group(name)


def _to_others(tensor: torch.Tensor, splits: list[int] | None, group: dist.ProcessGroup) -> float:
    if not splits:
        return _bytes(tensor) * (group.size() - 1) / group.size()
    row = _bytes(tensor) // max(1, tensor.shape[0])
    return row * (sum(splits) - splits[group.rank()])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
