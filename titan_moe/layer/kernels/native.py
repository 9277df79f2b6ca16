"""``native.c`` for CPU tensors: compiled by the C compiler at first use, called through ctypes.

Without a compiler, or with ``TITAN_MOE_KERNELS=eager``, there is no library and ``eager`` does the work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titan_moe.layer.kernels import eager

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # a * b + c rounds twice, as in torch
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    # Twice as wide as gcc's choice where there is AVX-512: SwiGLU takes a fifth less.
    *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []),
)
_ROWS_PER_BLOCK = 256
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be made."""
    if os.environ.get("TITAN_MOE_KERNELS", "auto") == "eager":
        return None
    try:
        return _cached()
    except (OSError, RuntimeError):  # no home, no place, or a damaged file in it
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="titan_moe-") as folder:
            return ctypes.CDLL(str(_compile(Path(folder))))
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        logger.warning(f"MoE's row kernels run as torch ops, which is slower: {why.strip()[-300:]}")
        return None


def runs(rows: torch.Tensor, *others: torch.Tensor, scores: torch.Tensor | None = None) -> bool:
    """Whether the library takes these: bf16 or fp32 rows, fp32 scores."""
    alike = rows.dtype in _SUFFIX and all(other.dtype == rows.dtype for other in others)
    return alike and (scores is None or scores.dtype == torch.float32) and library() is not None


def sum_rows(
    y_ND: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
    also_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """See eager."""
    if not runs(y_ND, *([] if also_ND is None else [also_ND])):
        return eager.sum_rows(y_ND, place_TK, present_TK, also_ND)
    return _sum(y_ND, also_ND, None, place_TK, present_TK)


def weighted_sum(
    y_ND: torch.Tensor,
    scores_TK: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """See eager."""
    if not runs(y_ND, scores=scores_TK):
        return eager.weighted_sum(y_ND, scores_TK, place_TK, present_TK)
    return _sum(y_ND, None, scores_TK, place_TK, present_TK)


def weighted_sum_backward(
    grad_TD: torch.Tensor, y_ND: torch.Tensor, scores_TK: torch.Tensor, order_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See eager."""
    if not runs(y_ND, grad_TD, scores=scores_TK):
        return eager.weighted_sum_backward(grad_TD, y_ND, scores_TK, order_N)
    grad_y_ND = torch.empty_like(y_ND, memory_format=torch.contiguous_format)
    grad_score_N = scores_TK.new_empty(y_ND.shape[0])
    sizes = (y_ND.shape[0], scores_TK.shape[1], y_ND.shape[1])
    _call("weighted_sum_backward", (grad_y_ND, grad_score_N, grad_TD, y_ND, scores_TK, order_N), sizes)
    return grad_y_ND, grad_score_N


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor) -> torch.Tensor:
    """See eager."""
    if not runs(gate_RF, up_RF):
        return eager.swiglu(gate_RF, up_RF)
    h_RF = torch.empty_like(gate_RF, memory_format=torch.contiguous_format)
    _call("swiglu", (h_RF, gate_RF, up_RF), gate_RF.shape)
    return h_RF


def swiglu_backward(
    grad_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See eager."""
    if not runs(gate_RF, grad_RF, up_RF):
        return eager.swiglu_backward(grad_RF, gate_RF, up_RF)
    grad_gate_RF = torch.empty_like(gate_RF, memory_format=torch.contiguous_format)
    grad_up_RF = torch.empty_like(grad_gate_RF)
    _call("swiglu_backward", (grad_gate_RF, grad_up_RF, grad_RF, gate_RF, up_RF), gate_RF.shape)
    return grad_gate_RF, grad_up_RF


def gate(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    """See eager. Some rows at a time: the copy in acc never leaves the cache."""
    return torch.cat([eager.gate(rows_TD, w_ED) for rows_TD in _blocks(x_TD)])


def gate_backward(
    grad_TE: torch.Tensor, x_TD: torch.Tensor, w_ED: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See eager; summed over the blocks of rows in their order."""
    acc = eager.accumulation_dtype(x_TD.dtype)
    grad_x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    grad_w_ED = w_ED.new_zeros(w_ED.shape, dtype=acc)
    for grad_x, grad, x in zip(*map(_blocks, (grad_x_TD, grad_TE, x_TD)), strict=True):
        grad_x.copy_(grad @ w_ED.to(acc))
        grad_w_ED.addmm_(grad.t(), x.to(acc))
    return grad_x_TD, grad_w_ED


def _blocks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """About 256 rows each, and never one row of many: that takes another path, with other bits."""
    return rows.tensor_split(max(1, rows.shape[0] // _ROWS_PER_BLOCK))


def _sum(
    y_ND: torch.Tensor,
    also_ND: torch.Tensor | None,
    scores_TK: torch.Tensor | None,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None,
) -> torch.Tensor:
    sizes = (*place_TK.shape, y_ND.shape[1])
    out_TD = y_ND.new_empty(sizes[0], sizes[2])
    _call("sum", (out_TD, y_ND, also_ND, scores_TK, place_TK, present_TK), sizes)
    return out_TD


def _call(name: str, tensors: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> None:
    """Runs a kernel of the type of the first tensor; sizes are in rows, ..., columns."""
    lib: Any = library()
    whole = [None if tensor is None else tensor.contiguous() for tensor in tensors]  # kept until the end
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in whole]
    kernel = lib[f"{name}_{_SUFFIX[tensors[0].dtype]}"]  # type: ignore[union-attr]
    kernel(*pointers, *map(ctypes.c_int64, sizes), ctypes.c_int(torch.get_num_threads()))


def _cached() -> ctypes.CDLL:
    """From the user's cache. Two processes may compile at once: each renames a whole file into place."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_moe"
    what = "\n".join([SOURCE.read_text(), *FLAGS, _compiler(), _processor()])
    path = folder / f"kernels-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                os.replace(_compile(Path(scratch)), path)
            except subprocess.SubprocessError as error:
                raise RuntimeError("does not compile") from error
    return ctypes.CDLL(str(path))


def _compile(folder: Path) -> Path:
    made, object_file = folder / "kernels.so", folder / "kernels.o"
    _run(_compiler(), *FLAGS, "-c", str(SOURCE), "-o", str(object_file))
    # No -fopenmp here: GOMP_parallel is left open, and the loader finds the one that torch brought.
    _run(_compiler(), "-shared", str(object_file), "-o", str(made))
    return made


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _compiler() -> str:
    """$CC, else the first C compiler on the path."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise OSError(f"there is no C compiler ({', '.join(names)})")
    return found


def _processor() -> str:
    """What -march=native means here: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())
