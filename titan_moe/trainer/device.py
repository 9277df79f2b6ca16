"""torchtitan 0.3.0 on a machine without an accelerator: each gap filled once, here.

Importing ``titan_moe.trainer`` calls ``fill_gaps``. Train, plan, bench and the override import it; the layer
alone does not. On CUDA the part for CPUs is not called. Two more CPU facts live where their code is: FSDP's
reduction (parallel/parallelize.py) and attention (models/attention.py).
"""

import functools
import inspect
import math
import os
import platform
import resource
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed import distributed_c10d
from torch.distributed.pipelining import PipelineStage, schedules

_KERNELS = torch.library.Library("aten", "IMPL")  # ours live as long as this object does

# An expert's rows change every step, and oneDNN compiles a kernel for each number of them. It keeps 1024, and
# a rank of 30 steps of debug_local.toml peaked at 5.1 GB; with 512 at 3.7, as fast; with 256 at 3.0, but then
# a layer of 64 experts took twice as long.
ONEDNN_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}


def fill_gaps() -> None:
    """Fills what torchtitan 0.3.0 misses in this torch and on this device. Safe to call twice."""
    if not hasattr(dist, "set_timeout"):
        # distributed/utils.py, set_pg_timeouts, on any device: public in torch 2.14, private in 2.13.
        setattr(dist, "set_timeout", distributed_c10d._set_pg_timeout)  # noqa: B010
    for schedule in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
        if "arg_mbs" not in inspect.signature(schedule.step).parameters:
            setattr(schedule, "step", _step_by_microbatch)  # noqa: B010
    learn_shapes = getattr(PipelineStage, "_compute_outputs", None)  # None: config/rules/mesh.py refuses PP
    if learn_shapes is not None and not stages_leave_buffers() and not hasattr(learn_shapes, "__wrapped__"):
        setattr(PipelineStage, "_compute_outputs", _leaving_buffers(learn_shapes))  # noqa: B010
    if not torch.accelerator.is_available():
        _become_cpu()


def norms_keep_short_shards() -> bool:
    """Whether a norm leaves a sequence shorter than its TP ranks sharded, as torchtitan's RMSNorm demands.

    From torch 2.14 DTensor replicates it. Nothing to look at but the number.
    """
    return Version(torch.__version__) < Version("2.14.dev")


def stages_leave_buffers() -> bool:
    """Whether torch itself puts a pipeline stage's buffers back after it learned its shapes: from 2.14."""
    return "_metadata_inference_buffer_backup" in PipelineStage.__init__.__code__.co_names


def _leaving_buffers(compute_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline stage learns its shapes by a whole forward: an MoE layer would count made-up tokens."""

    @functools.wraps(compute_outputs)
    def compute(self: Any, *args: Any, module: torch.nn.Module, **kwargs: Any) -> Any:
        before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
        outputs = compute_outputs(self, *args, module=module, **kwargs)
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:  # the others may be saved for the backward that follows
                    buffer.copy_(value)
        return outputs

    return compute


def _step_by_microbatch(
    self: Any,
    *,
    arg_mbs: list[tuple[torch.Tensor, ...]] | None = None,
    kwarg_mbs: list[dict[str, Any]] | None = None,
    target_mbs: list[torch.Tensor] | None = None,
    target: None = None,
    losses: list[torch.Tensor] | None = None,
    loss_kwargs: dict[str, Any] | None = None,
    return_outputs: bool = False,
) -> None:
    """A pipeline schedule's step on microbatches that are already apart, as torch 2.14 has it.

    trainer.py, pp_forward_backward_step, and validate.py call it so; torch 2.13's own cuts a whole batch.

    Args:
        target: None; what torch 2.13's ``eval`` adds.
    """
    if return_outputs or target is not None:
        raise TypeError("torchtitan 0.3.0 asks a pipeline schedule for losses, not for outputs")
    if self._has_backward and not torch.is_grad_enabled():
        raise RuntimeError("a pipeline schedule's step needs gradients; eval is the one without")
    for stage in getattr(self, "_stages", None) or [self._stage]:
        stage.has_backward = self._has_backward
        stage.clear_runtime_states()
    self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, False, loss_kwargs=loss_kwargs)


def _become_cpu() -> None:
    """Makes torchtitan see the CPU as its device."""
    from torchtitan.tools import utils

    if utils.device_type == "cpu":
        return
    if not multiplies_bf16():
        _multiply_bf16_as_fp32()
    for variable, number in ONEDNN_KERNELS.items():
        os.environ.setdefault(variable, number)
    # tools/utils.py, get_device_info: falls back to "cuda" when torch finds no accelerator.
    stale_module, cpu_module = utils.device_module, _cpu_device_module()
    # metrics.py, parallel_dims.py and others import these names by value.
    for loaded in [
        module for name, module in sys.modules.items() if name.startswith(("torchtitan.", "titan_moe."))
    ]:
        if getattr(loaded, "device_type", None) == "cuda":
            vars(loaded)["device_type"] = "cpu"
        if getattr(loaded, "device_module", None) is stale_module:
            vars(loaded)["device_module"] = cpu_module
    # tools/utils.py, get_peak_flops: takes a CPU for an A100, after it looked for lspci. MFU is 0 then.
    utils.get_peak_flops = lambda device_name: math.inf
    # distributed/utils.py, clip_grad_norm_: takes the norm from here.
    torch.nn.utils.get_total_norm = _total_norm


def multiplies_bf16() -> bool:
    """Whether torch has bf16 matmuls for this CPU (oneDNN: x86 from AVX-512 on, or AMX)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _multiply_bf16_as_fp32() -> None:
    """Gives bf16 matmuls to fp32's kernels: products are exact there, and sums are rounded once, at the end.

    ATen's own, CPUBlas.cpp, gemm_notrans_, is a loop over scalars: a debug step took minutes. Forms in place
    (addmm_) stay as they are: no model here calls them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators,  other operators")
        for name in ("mm", "addmm", "bmm", "baddbmm"):  # _grouped_mm calls mm.out, expert by expert
            plain, plain_out = (
                torch.library.get_kernel(f"aten::{op}", "CPU") for op in (name, f"{name}.out")
            )
            _KERNELS.impl(name, functools.partial(_multiply, plain), "CPU", with_keyset=True)
            into = functools.partial(_multiply_into, plain, plain_out)
            _KERNELS.impl(f"{name}.out", into, "CPU", with_keyset=True)


def _multiply(plain: Any, keys: Any, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    if not _all_bf16(args):  # a mix is for ATen to refuse
        return plain.call_boxed(keys, *args, **kwargs)
    return plain.call_boxed(keys, *(arg.float() for arg in args), **kwargs).to(torch.bfloat16)


def _multiply_into(
    plain: Any, plain_out: Any, keys: Any, *args: torch.Tensor, out: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    if not _all_bf16((*args, out)):
        return plain_out.call_boxed(keys, *args, out=out, **kwargs)
    product = plain.call_boxed(keys, *(arg.float() for arg in args), **kwargs)
    if out.shape != product.shape:
        out.resize_(product.shape)
    return out.copy_(product)


def _all_bf16(tensors: Iterable[torch.Tensor]) -> bool:
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors)


def _cpu_device_module() -> types.ModuleType:
    """``torch.cpu`` with what torchtitan asks of a device module."""
    module = types.ModuleType("titan_moe.cpu_device_module")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    module.__dict__.update(
        # distributed/utils.py, set_pg_timeouts: barrier(device_ids=...) wants integers, torch.cpu says "cpu".
        current_device=lambda: 0,
        # components/metrics.py, DeviceMemoryMonitor: name, capacity and peaks.
        get_device_name=lambda device=None: platform.processor() or platform.machine(),
        get_device_properties=lambda device=None: types.SimpleNamespace(total_memory=total_memory),
        memory_stats=lambda device=None: _peak_memory(),
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
    )
    return module


def _total_norm(
    tensors: Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """``torch.nn.utils.get_total_norm`` accumulating in fp64.

    The CPU's fp32 norm of two million elements is 3e-5 off; the error depends on how FSDP cuts the
    parameters, so that gradient clipping would make meshes diverge.
    """
    norms = [torch.linalg.vector_norm(tensor, norm_type, dtype=torch.float64) for tensor in tensors]
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type).to(torch.float32)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is non-finite ({total})")
    return total


def _peak_memory() -> dict[str, int]:
    """This process's peak resident bytes under CUDA's names. The kernel keeps one peak; it never resets."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}
