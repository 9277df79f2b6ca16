"""The same first weights on every mesh: a parameter is drawn by its name, not by its rank.

On a CPU, DTensor has no random number tracker, and every rank fills its shard with the same numbers: of 8
experts on 4 ranks, only 2 are different. On CUDA its tracker gives the shards different numbers, but other
ones on another mesh. Here a parameter's first value is a function of the seed, its name and the position
in the whole tensor (``titan_moe.parallel.blocks``), and of nothing else.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.protocols.model import BaseModel

from titan_moe.layer.names import plain_name
from titan_moe.parallel.blocks import Draw, Kind, fill


class InitializationError(RuntimeError):
    """A first value that would depend on more than the seed, the name and the position."""


@contextmanager
def drawn_by_name(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Inside, whatever initialises ``model`` draws numbers that are the same on every mesh.

    ``normal_`` and ``uniform_`` are caught, and with them what calls them, such as ``torch.nn.init``. A
    parameter's values then depend on ``seed``, its name in ``model`` and the position in the whole tensor.
    They do not depend on the rank, the mesh, the pipeline stage, the order of construction, the device or the
    other parameters.

        with drawn_by_name(model, seed=0):
            model.init_states()

    Args:
        model: sharded or not, on its device, no longer on meta.
        seed: None takes rank 0's ``torch.initial_seed()``, which is a collective over all ranks.

    Raises:
        InitializationError: inside, at any other random operation; the message names it.
    """
    mode = _ByName(model, _seed_of_rank_0() if seed is None else seed)
    tables: list[tuple[str, nn.Module, Any]] = [
        (fqn, module, module._param_init)
        for fqn, module in model.named_modules()
        if getattr(module, "_param_init", None)
    ]
    try:
        for fqn, module, table in tables:
            setattr(module, "_param_init", mode.naming(fqn, table))  # noqa: B010
        with mode:
            yield
    finally:
        for _, module, table in tables:
            setattr(module, "_param_init", table)  # noqa: B010


def draw_models_by_name() -> None:
    """From now on, torchtitan's models are ``drawn_by_name`` when its trainer initialises them.

    ``init_weights`` is the method that torchtitan keeps so that tools can wrap it. Safe to call twice.
    """
    if not hasattr(BaseModel.init_weights, "__wrapped__"):
        setattr(BaseModel, "init_weights", _by_name(BaseModel.init_weights))  # noqa: B010


def _by_name(init_weights: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_weights)
    def wrapped(self: BaseModel, **kwargs: Any) -> None:
        with drawn_by_name(self):
            init_weights(self, **kwargs)

    return wrapped


def _seed_of_rank_0() -> int:
    # The others' differ by their pipeline rank: distributed/utils.py, set_determinism.
    seed = [torch.initial_seed()]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(seed)
    return seed[0]


class _ByName(TorchDispatchMode):
    """Answers ``normal_`` and ``uniform_`` by the name of the parameter that is being initialised.

    torchtitan's modules have a table of initialisers by parameter, which ``naming`` wraps, so that the name
    is known. Everything else, such as ``reset_parameters``, fills a parameter in place, which is known by its
    storage. An initialiser may draw several times, also into tensors of its own: ``trunc_normal_`` draws
    again for what fell outside, and a fused QKV weight is put together from three. So the draws of a name are
    numbered.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed
        self.current: tuple[str, torch.Tensor] | None = None  # the parameter that is being initialised
        self.in_table = False  # one of the initialisers that naming wraps is running
        self.num_draws: Counter[str] = Counter()

    def naming(self, fqn: str, table: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """A module's initialisers, each of which first says whose parameter it fills."""
        return {
            name: functools.partial(self._initialize, plain_name(f"{fqn}.{name}".lstrip(".")), initializer)
            for name, initializer in table.items()
        }

    def _initialize(self, name: str, initializer: Callable[..., Any], param: torch.Tensor) -> None:
        self.current, self.in_table = (name, param), True
        initializer(param)
        self.current, self.in_table = None, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        sharded = any(isinstance(arg, DTensor) for arg in args)
        if kwargs.get("generator") is not None and not sharded:
            return func(*args, **kwargs)
        if func not in _KINDS or any(value is not None for value in kwargs.values()):
            raise InitializationError(f"{self._where()}: {func} {_NOT_BY_NAME}")
        self._fill(func, *args)
        return args[0]

    def _fill(self, func: Any, tensor: torch.Tensor, *bounds: float) -> None:
        if tensor.is_meta or (_local(tensor).numel() == 0 and not self.in_table):
            return
        name = self._name_of(func, tensor)
        number = self.num_draws[name]
        self.num_draws[name] += 1
        kind, scale, shift = _KINDS[func](*bounds)
        fill(tensor, Draw(self.seed, name, number, kind, scale, shift))

    def _name_of(self, func: Any, tensor: torch.Tensor) -> str:
        if not self.in_table:
            name = self._named.get(_storage(tensor))
            if name is not None:
                self.current = name, tensor
            elif self.current is None or self.current[1].shape != tensor.shape:
                raise InitializationError(
                    f"{self._where()}: {func} on {_described(tensor)} {_NOT_A_PARAMETER}"
                )
        assert self.current is not None
        name, param = self.current
        if isinstance(param, DTensor) != isinstance(tensor, DTensor):
            raise InitializationError(
                f"{name}: {func} on {_described(tensor)} {_NOT_A_PARAMETER}; the parameter is "
                f"{_described(param)}"
            )
        return name

    @functools.cached_property
    def _named(self) -> dict[Any, str]:
        """Parameters and buffers by storage; of the names of a tied parameter, the first in the alphabet."""
        found: dict[Any, str] = {}
        for tensors in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in tensors(remove_duplicate=False):
                storage = _storage(tensor)
                found[storage] = min(plain_name(name), found.get(storage, plain_name(name)))
        return found

    def _where(self) -> str:
        return self.current[0] if self.current is not None else type(self.model).__name__


_NOT_BY_NAME = (
    "draws random numbers that would differ from mesh to mesh; use normal_ or uniform_, or what calls them "
    "in torch.nn.init, or fill a whole plain tensor from a torch.Generator of your own"
)
_NOT_A_PARAMETER = "fills a tensor of which it is not known what part of which parameter it is"


def _normal(mean: float = 0.0, std: float = 1.0) -> tuple[Kind, float, float]:
    return "normal", std, mean


def _uniform(low: float = 0.0, high: float = 1.0) -> tuple[Kind, float, float]:
    return "uniform", high - low, low


_KINDS = {torch.ops.aten.normal_.default: _normal, torch.ops.aten.uniform_.default: _uniform}


@torch.no_grad()
def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _storage(tensor: torch.Tensor) -> tuple[Any, ...]:
    local = _local(tensor)
    return local.data_ptr(), local.shape, local.stride()


def _described(tensor: torch.Tensor) -> str:
    where = f"sharded {tensor.placements}" if isinstance(tensor, DTensor) else "plain"
    return f"a {where} tensor of shape {tuple(tensor.shape)}"
