"""Bytes that a rank holds: of what a model and its optimizer keep, and of all that is alive in a step."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_moe.layer.names import plain_name
from titan_moe.plan.wire import wraps_another


class Held(NamedTuple):
    """Bytes of this rank's shards between two steps."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int


def held(model_parts: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> Held:
    """What this rank's model and optimizers hold; gradients and state only where they exist by now."""
    parameters = [parameter for part in model_parts for parameter in part.parameters()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    buffers = [buffer for part in model_parts for buffer in part.buffers()]
    kinds = (parameters, gradients, states, buffers)
    return Held(*(sum(map(local_bytes, tree_leaves(kind))) for kind in kinds))


def largest_unit(model: nn.Module, dtype: torch.dtype) -> tuple[str, int]:
    """The name and the bytes of the FSDP unit with the most parameters, gathered over FSDP, in ``dtype``."""
    sizes: dict[str, int] = {}
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    for name, parameter in model.named_parameters():
        unit = max((unit for unit in units if not unit or name.startswith(f"{unit}.")), key=len)
        sizes[unit] = sizes.get(unit, 0) + _gathered_numel(parameter) * dtype.itemsize
    name = max(sizes, key=lambda unit: sizes[unit])
    return plain_name(name), sizes[name]


def _gathered_numel(parameter: torch.Tensor) -> int:
    """What TP or EP leave of a parameter, rounded up."""
    numel = parameter.numel()
    if not isinstance(parameter, DTensor):
        return numel
    for axis, placement in zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True):
        if axis in ("tp", "ep") and not placement.is_replicate():
            numel = -(-numel // parameter.device_mesh[axis].size())
    return numel


def local_bytes(tensor: Any) -> int:
    """Of this rank's part of a tensor; 0 of anything else."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


class Alive(TorchDispatchMode):
    """Bytes of the storages made while entered that are still alive, and their peak.

    For real tensors and for fake ones.

    Attributes:
        now: alive at this moment.
        peak: the most since the start, or since ``reset_peak``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}  # by the storage's address

    def reset_peak(self) -> None:
        """The peak starts again from what is alive."""
        self.peak = self.now

    def __enter__(self) -> Any:
        plain = self._plain_resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            self._see(storage)
            return result

        # FSDP2 fills and frees its unsharded parameters by this method, which no mode sees.
        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        setattr(torch.UntypedStorage, "resize_", self._plain_resize)  # noqa: B010
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if wraps_another(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        known = None
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not wraps_another((type(tensor),)):
                if known is None:
                    known = {_address(given) for given in tree_leaves((args, kwargs))}
                if _address(tensor) not in known:  # what was there before is not this mode's
                    self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(address)
        if before is None:
            farewell: Any = weakref.finalize(storage, self._forget, address)
            farewell.atexit = False
        self._sizes[address] = size
        self._add(size - (before or 0))

    def _forget(self, address: int) -> None:
        self._add(-self._sizes.pop(address))

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _address(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or wraps_another((type(value),)):
        return None
    return value.untyped_storage()._cdata
