"""Bytes that go through memory beside the GEMMs, counted op by op over a forward and its backward.

The same rule for both sides. A view, or an allocation that writes nothing, is free. A GEMM is left out; what
happens around it is not. Every other op reads each distinct tensor it takes once, but no more than the
storage behind it holds (expanded tensors), and writes each tensor it returns or changes once; an op in place
does both to its target. A custom op, ours or torchtitan's, is one op: what it does inside is not looked at.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_moe.bench.contestants import LAYERS, OURS, STOCK, LayerRun, Problem, check_same
from titan_moe.bench.report import BenchSettings, Found, Table
from titan_moe.bench.shapes import least_bytes

TITLE = "Traffic: bytes read and written beside the GEMMs, forward and backward"
NOTE = "Least: one pass over the inputs and outputs of each step that a layer must make."

FREE = {
    *("aten::_unsafe_view", "aten::set_"),
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
}
GEMMS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::mv", "aten::addmv"),
    *("aten::linear", "aten::linear_backward", "aten::matmul", "aten::matmul_backward"),
    *("aten::_grouped_mm", "aten::_scaled_mm", "aten::_scaled_grouped_mm", "aten::_addmm_activation"),
}
# They take a tensor for its shape and kind, and do not look into it.
SHAPED_LIKE = {
    *("aten::zeros_like", "aten::ones_like", "aten::full_like"),
    *("aten::new_zeros", "aten::new_ones", "aten::new_full"),
}


class UnseenWrite(RuntimeError):
    """An op read what no op wrote: a kernel that torch's dispatcher does not know would go uncounted."""


class ByteCounter(TorchDispatchMode):
    """Counts while it is entered, backward included.

    Attributes:
        by_op: bytes by the name of the op, ``aten::mul``.
    """

    def __init__(self, there_before: Iterable[torch.Tensor]) -> None:
        """``there_before``: every tensor that the work may read and does not make; the check needs them."""
        super().__init__()
        self.by_op: Counter[str] = Counter()
        # A weak reference keeps a storage's identity from being used again, not its memory.
        self._written: dict[int, StorageWeakRef] = {}
        for tensor in there_before:
            self._note_write(tensor)

    @property
    def total(self) -> int:
        """Read and written."""
        return sum(self.by_op.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op and counts what it moved."""
        name, kwargs = func._schema.name, kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or name in FREE:
            return out
        taken, changed = _arguments(func, args, kwargs)
        if name in SHAPED_LIKE:
            taken = {}
        self._check(name, [tensor for key, tensor in taken.items() if key not in changed])
        written = changed | _distinct(tree_leaves(out))
        for tensor in written.values():
            self._note_write(tensor)
        if name not in GEMMS:
            self.by_op[name] += sum(map(_size, taken.values())) + sum(map(_size, written.values()))
        return out

    def _note_write(self, tensor: torch.Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._written[reference.cdata] = reference

    def _check(self, name: str, read: Iterable[torch.Tensor]) -> None:
        for tensor in read:
            known = StorageWeakRef(tensor.untyped_storage()).cdata in self._written
            if not known and tensor.dim() and tensor.numel():  # numbers come as tensors without dims
                raise UnseenWrite(f"{name} reads {tuple(tensor.shape)} {tensor.dtype} that no op wrote")


def bytes_moved(run: LayerRun) -> Counter[str]:
    """By op, of one forward and backward."""
    run.clear()
    there = [*run.layer.parameters(), *run.layer.buffers(), run.x_BLD, run.grad_BLD]
    with ByteCounter(there) as counter:
        run.run()
    run.clear()
    return counter.by_op


def measure(settings: BenchSettings) -> Found:
    """Per shape: bytes by op of each layer, and the least there can be."""
    found: Found = {}
    for shape in settings.layer_shapes:
        problem = Problem.draw(shape)
        runs = {name: problem.run(build) for name, build in LAYERS.items()}
        for name in runs.keys() - {STOCK}:
            check_same(runs[STOCK], runs[name])
        by_op = {name: dict(bytes_moved(run).most_common()) for name, run in runs.items()}
        found[str(shape)] = {"least": least_bytes(shape), "by_op": by_op}
    return found


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A line per shape; and where the part is alone, each side's biggest ops."""
    names = list(next(iter(found.values()))["by_op"])
    mine = [name for name in names if name != STOCK]
    heads = ["shape", *(f"MB, {name}" for name in names), "MB, least"]
    heads += [f"{name} / {base}" for name in mine for base in (STOCK, "least")]
    yield [heads, *(_line(shape, mine, sides) for shape, sides in found.items())]
    if list(settings.only) == ["traffic"]:
        for shape, sides in found.items():
            yield [[shape, *(f"{name}: op, MB" for name in names)], *_biggest(sides["by_op"])]


def figures(found: Found) -> dict[str, float]:
    """The worst shape's ratios."""
    totals = [_totals(sides) for sides in found.values()]
    return {
        f"traffic.worst_of_{base}": max(total[OURS] / total[base] for total in totals)
        for base in (STOCK, "least")
    }


def _arguments(func: Any, args: Any, kwargs: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Distinct tensors that are read, and those that are changed."""
    read: list[Any] = []
    changed: list[Any] = []
    for number, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or number >= len(args) else args[number]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        changed += tree_leaves(value) if writes else []
        read += [] if writes and argument.kwarg_only else tree_leaves(value)  # out= is not read
    return _distinct(read), _distinct(changed)


def _distinct(values: Iterable[Any]) -> dict[Any, torch.Tensor]:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype): t for t in tensors
    }


def _size(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _totals(sides: Found) -> dict[str, int]:
    by_op = {name: sum(ops.values()) for name, ops in sides["by_op"].items()}
    return by_op | {"least": sum(sides["least"].values())}


def _line(shape: str, mine: list[str], sides: Found) -> list[str]:
    totals = _totals(sides)
    ratios = [f"{totals[name] / totals[base]:.3f}" for name in mine for base in (STOCK, "least")]
    return [shape, *(f"{total / 1e6:.1f}" for total in totals.values()), *ratios]


def _biggest(by_op: dict[str, dict[str, int]], number: int = 10) -> Iterator[list[str]]:
    ranked = [[f"`{op}` {moved / 1e6:.1f}" for op, moved in ops.items()] for ops in by_op.values()]
    for place in range(number):
        yield [str(place + 1), *(ops[place] if place < len(ops) else "" for ops in ranked)]
