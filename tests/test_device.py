"""What `import titan_moe.trainer` does to torchtitan on a machine without an accelerator, and only there."""

import datetime
import importlib
import math
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.nn.utils import clip_grad
from torchtitan.tools import utils

from tests.matrix import refusal
from tests.ranks import RankContext, run_ranks
from titan_moe.trainer import device

on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")

CONSUMERS = [  # of device_type or device_module, by value
    "torchtitan.components.metrics",
    "torchtitan.distributed.parallel_dims",
    "torchtitan.distributed.utils",
    "torchtitan.models.common.token_dispatcher",
    "torchtitan.tools.profiler",
]


def not_cpu() -> list[str]:
    """Names in loaded torchtitan modules that still mean another device."""
    wrong = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith("torchtitan."):
            if getattr(module, "device_type", "cpu") != "cpu":
                wrong.append(f"{name}.device_type")
            if getattr(module, "device_module", utils.device_module) is not utils.device_module:
                wrong.append(f"{name}.device_module")
    return wrong


@on_cpu
class TestOnCPU:
    def test_every_torchtitan_module_says_cpu(self) -> None:
        loaded = [importlib.import_module(name) for name in CONSUMERS]
        assert all(hasattr(m, "device_type") or hasattr(m, "device_module") for m in loaded)
        assert not_cpu() == []
        assert utils.device_type == "cpu"

    def test_a_module_that_kept_the_old_value_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        metrics = importlib.import_module("torchtitan.components.metrics")
        monkeypatch.setattr(metrics, "device_module", torch.cuda)
        assert not_cpu() == ["torchtitan.components.metrics.device_module"]

    def test_modules_that_loaded_earlier_are_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when torchtitan is imported first: both names, in the module and wherever they were copied."""
        consumers = [importlib.import_module(name) for name in CONSUMERS]
        for module in [utils, *consumers]:
            for name, stale in (("device_type", "cuda"), ("device_module", torch.cuda)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, stale)
        mine = types.ModuleType("my_model")
        vars(mine)["device_type"] = "cuda"
        monkeypatch.setitem(sys.modules, "my_model", mine)
        other: Any = types.ModuleType("torchtitan.other")
        other.device_module = types.ModuleType("xpu")
        monkeypatch.setitem(sys.modules, "torchtitan.other", other)
        with warnings.catch_warnings():
            device.fill_gaps()
        for module in [utils, *consumers]:
            assert getattr(module, "device_type", "cpu") == "cpu", module
            assert getattr(module, "device_module", utils.device_module) is utils.device_module, module
        assert utils.device_module is not torch.cuda
        assert vars(mine)["device_type"] == "cuda", "only torchtitan's own"
        assert other.device_module.__name__ == "xpu", "a third device is not ours to replace"

    def test_twice_is_harmless(self) -> None:
        before = (
            utils.device_module,
            torch.nn.utils.get_total_norm,
            list(warnings.filters),
            dist.set_timeout,
        )
        device.fill_gaps()
        device.fill_gaps()
        after = (utils.device_module, torch.nn.utils.get_total_norm, list(warnings.filters), dist.set_timeout)
        assert after == before

    def test_device_module_answers_torchtitan(self) -> None:
        module: Any = utils.device_module
        assert module.current_device() == 0
        assert module.get_device_name(torch.device("cpu"))
        gib = 2**30
        assert gib / 4 < module.get_device_properties(0).total_memory < 2**20 * gib
        peaks = module.memory_stats()
        assert peaks["active_bytes.all.peak"] == peaks["reserved_bytes.all.peak"] > gib / 16
        module.reset_peak_memory_stats()
        module.empty_cache()
        module.synchronize()
        module.set_device(torch.device("cpu"))
        assert module.device_count() == 1

    def test_torchtitans_memory_monitor_works(self) -> None:
        metrics: Any = importlib.import_module("torchtitan.components.metrics")
        stats = metrics.build_device_memory_monitor().get_peak_stats()
        assert 0 < stats.max_active_gib < 2**20
        assert 0 < stats.max_active_pct <= 100

    def test_clipping_uses_our_norm(self) -> None:
        distributed: Any = importlib.import_module("torchtitan.distributed.utils")
        parameter = torch.nn.Parameter(torch.zeros(2_000_000))
        parameter.grad = gradient(2_000_000)
        exact = exact_norm([parameter.grad])
        assert abs(distributed.clip_grad_norm_([parameter], 1.0).item() / exact - 1) < 1e-7
        assert abs(exact_norm([parameter.grad]) - 1) < 1e-5


class TestOnAnAccelerator:
    def test_nothing_of_torchtitan_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded = {name: m for name, m in sys.modules.items() if name.startswith("torchtitan.")}
        monkeypatch.setattr(utils, "device_type", "cuda")
        monkeypatch.setattr(utils, "device_module", torch.cuda)
        before = {name: dict(vars(module)) for name, module in loaded.items()}
        called: list[str] = []
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(device, "_become_cpu", lambda: called.append("_become_cpu"))
        monkeypatch.setattr(torch.nn.utils, "get_total_norm", clip_grad._get_total_norm)
        device.fill_gaps()
        assert called == []
        assert utils.device_type == "cuda"
        assert torch.nn.utils.get_total_norm is clip_grad._get_total_norm
        changed = {
            f"{name}.{attribute}"
            for name, module in loaded.items()
            for attribute, value in vars(module).items()
            if value is not before[name].get(attribute)
        }
        assert changed == set()

    def test_without_one_it_is_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[str] = []
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(device, "_become_cpu", lambda: called.append("_become_cpu"))
        device.fill_gaps()
        assert called == ["_become_cpu"]


class TestSetTimeout:
    def test_a_missing_one_is_filled_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in torch 2.13."""
        monkeypatch.delattr(dist, "set_timeout")
        device.fill_gaps()
        assert callable(vars(dist)["set_timeout"])

    def test_works_as_torchtitan_calls_it(self) -> None:
        """Timeout first, group second; on the group of a real backend."""
        assert run_ranks(timeouts, 4) == [[7.0, 300.0]] * 4

    def test_an_existing_one_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        newer = object()
        monkeypatch.setattr(dist, "set_timeout", newer)
        device.fill_gaps()
        assert vars(dist)["set_timeout"] is newer


def timeouts(_ctx: RankContext) -> list[float]:
    """The seconds that each of two calls leaves on the default group."""
    seen = []
    group: Any = dist.group.WORLD
    for seconds in (7, 300):  # the second is what tests.ranks had set
        set_timeout: Any = vars(dist)["set_timeout"]
        set_timeout(datetime.timedelta(seconds=seconds), group)
        seen.append(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    return seen


def gradient(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def exact_norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(tensor.double().square().sum().item() for tensor in tensors))


class TestTotalNorm:
    def test_two_million_elements(self) -> None:
        """One rounding to fp32 off, where torch's own is a hundred times worse."""
        tensors = [gradient(2_000_000)]
        exact = exact_norm(tensors)
        ours = device._total_norm(tensors)
        theirs = clip_grad._get_total_norm(tensors)
        assert ours.dtype == torch.float32
        assert abs(ours.item() / exact - 1) < 1e-7
        assert abs(theirs.item() / exact - 1) > 1e-6

    def test_does_not_hang_on_how_it_is_cut(self) -> None:
        whole = gradient(2_000_000)
        norms = {device._total_norm(whole.chunk(parts)).item() for parts in (1, 2, 3, 7, 64)}
        assert len(norms) == 1
        assert len({clip_grad._get_total_norm(whole.chunk(parts)).item() for parts in (1, 2, 3, 7, 64)}) > 1

    @pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
    def test_other_norms_and_dtypes(self, norm_type: float) -> None:
        tensors = [gradient(100, 1), gradient(50, 2).bfloat16(), gradient(1, 3).double()]
        everything = torch.cat([tensor.double() for tensor in tensors])
        expected = torch.linalg.vector_norm(everything, norm_type).float()
        torch.testing.assert_close(device._total_norm(tensors, norm_type), expected, rtol=1e-7, atol=0)

    def test_overflow_of_fp32_squares(self) -> None:
        """Elements of 1e30 have a norm in fp32, though their squares do not."""
        norm = device._total_norm([torch.full((4,), 1e30)])
        torch.testing.assert_close(norm, torch.tensor(2e30), rtol=1e-6, atol=0)

    def test_nothing_to_clip(self) -> None:
        assert device._total_norm([]).item() == 0.0
        assert device._total_norm(iter([torch.empty(0), torch.tensor([3.0, 4.0])])).item() == 5.0

    def test_a_nan_raises_when_asked(self) -> None:
        """torch's third argument, which torchtitan's clip_grad_norm_ hands on."""
        with pytest.raises(RuntimeError, match="non-finite"):
            clip_grad._get_total_norm([torch.tensor([1.0, math.nan])], 2.0, True)
        with pytest.raises(RuntimeError, match="non-finite"):
            device._total_norm([torch.tensor([1.0, math.nan])], 2.0, True)

    def test_a_nan_shows(self) -> None:
        assert device._total_norm([torch.tensor([1.0, math.nan])]).isnan()


@on_cpu
def test_torchtitan_may_be_imported_first() -> None:
    """In a process of its own: the trainer and all it loads have the wrong device until titan_moe comes."""
    code = """
import sys
import torchtitan.trainer
from torchtitan.tools import utils
assert utils.device_type == "cuda", utils.device_type
stale = [n for n, m in sys.modules.items() if n.startswith("torchtitan.") and hasattr(m, "device_type")]
assert len(stale) > 3, stale
import titan_moe.parallel.parallelize
assert titan_moe.parallel.parallelize.device_type == "cuda", "the layer alone changes nothing"
import titan_moe.trainer
assert titan_moe.parallel.parallelize.device_type == "cpu", "imported by value, before"
assert utils.get_peak_flops("EPYC") == float("inf"), "no A100"
wrong = [n for n in stale if sys.modules[n].device_type != "cpu"]
assert not wrong, wrong
modules = {id(m.device_module) for n, m in sys.modules.items()
           if n.startswith("torchtitan.") and hasattr(m, "device_module")}
assert modules == {id(utils.device_module)}, modules
stats = torchtitan.components.metrics.build_device_memory_monitor().get_peak_stats()
assert stats.max_active_gib > 0
print(torchtitan.components.metrics.device_type, utils.device_module.current_device())
"""
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stdout.split()) == (0, ["cpu", "0"]), ran.stderr[-2000:]


BY_FP32 = """
import warnings
warnings.simplefilter("error")
import torch
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False  # a CPU without AVX-512
import titan_moe.trainer
torch.manual_seed(0)
torch.set_num_threads(1)
aten = torch.ops.aten
a, b, c = torch.randn(3, 5, 48, 48)
offsets = torch.tensor([0, 1, 20, 48, 48], dtype=torch.int32)
cases = {
    "mm": (aten.mm, (a[0], b[0]), {}),
    "mm of transposed": (aten.mm, (a[0].t(), b[0].t()), {}),
    "mm of no rows": (aten.mm, (a[0][:0], b[0]), {}),
    "mm over no columns": (aten.mm, (a[0][:, :0], b[0][:0]), {}),
    "addmm": (aten.addmm, (c[0], a[0], b[0]), {"beta": 2, "alpha": 3}),
    "addmm of a bias": (aten.addmm, (c[0, 0], a[0], b[0]), {}),
    "bmm": (aten.bmm, (a, b), {}),
    "baddbmm": (aten.baddbmm, (c, a, b), {"alpha": 3}),
    "grouped": (aten._grouped_mm, (a[0], b, offsets), {}),
    "grouped over rows": (aten._grouped_mm, (a[0].t(), b[0], offsets), {}),
}
for name, (op, args, kwargs) in cases.items():
    narrow = [arg.bfloat16() if arg.is_floating_point() else arg for arg in args]
    wide = [arg.float() if arg.is_floating_point() else arg for arg in narrow]
    expected = op(*wide, **kwargs)
    assert expected.dtype == torch.float32
    got = op(*narrow, **kwargs)
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected.bfloat16()), name
    if op is not aten._grouped_mm:
        for of in (narrow, wide):
            out = torch.empty_like(op(*of, **kwargs))
            assert op.out(*of, **kwargs, out=out) is out and torch.equal(out, op(*of, **kwargs)), name
narrow = a[0].bfloat16()
for mixed in ((narrow, b[0]), (b[0], narrow), (narrow, torch.ones(48, 48, dtype=torch.int64))):
    try:
        torch.mm(*mixed)
    except RuntimeError as error:
        assert "dtype" in str(error), error
    else:
        raise AssertionError("a mix of dtypes went through")
for out in (torch.empty(48, 48), torch.empty(0, dtype=torch.bfloat16)):
    try:
        torch.mm(narrow, narrow, out=out)
    except RuntimeError as error:
        assert out.dtype == torch.float32 and "dtype" in str(error), error
    else:
        assert torch.equal(out, narrow @ narrow)
weight = b[0].bfloat16().requires_grad_()
torch.nn.functional.linear(a.bfloat16(), weight).backward(c.bfloat16())
exact = torch.einsum("blf,bld->fd", c.bfloat16().double(), a.bfloat16().double())
assert (weight.grad - exact).abs().max() < exact.abs().max() / 256
print("held")
"""


class TestBf16Matmuls:
    """On a CPU for which torch has none."""

    @on_cpu
    def test_they_are_fp32s_rounded_once(self) -> None:
        """In a process of its own, which stays without them."""
        root = Path(__file__).parent.parent
        ran = subprocess.run(
            [sys.executable, "-c", BY_FP32],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (ran.returncode, ran.stdout.split()) == (0, ["held"]), ran.stderr[-2000:]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_other_dtypes_are_handed_on_as_they_are(self, dtype: torch.dtype) -> None:
        seen: list[Any] = []
        plain: Any = types.SimpleNamespace(
            call_boxed=lambda keys, *args, **kwargs: seen.append((args, kwargs))
        )
        a = torch.ones(2, 2, dtype=dtype)
        device._multiply(plain, None, a, a, beta=2)
        device._multiply_into(None, plain, None, a, a, out=a)
        assert seen == [((a, a), {"beta": 2}), ((a, a), {"out": a})]

    def test_where_torch_has_them_they_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[str] = []
        monkeypatch.setattr(device, "_multiply_bf16_as_fp32", lambda: called.append("by fp32"))
        for has in (True, False):
            monkeypatch.setattr(utils, "device_type", "cuda")
            monkeypatch.setattr(device, "multiplies_bf16", lambda has=has: has)
            device.fill_gaps()
        assert called == ["by fp32"]


KERNELS = """
import titan_moe.trainer, torch
x = torch.ones(616, 16, dtype=torch.bfloat16)
for turn in range(2):
    for rows in range(17, 617):
        x[:rows] @ x[:16]
"""


@on_cpu
@pytest.mark.skipif(not device.multiplies_bf16(), reason="oneDNN multiplies no bf16 here")
@pytest.mark.parametrize(("capacity", "made"), [(None, 1200), ("600", 600)])
def test_onednn_keeps_no_kernel_for_every_number_of_rows(capacity: str | None, made: int) -> None:
    """600 of them, in turn, twice: by default the first is gone when it comes again; a user may keep more."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {"ONEDNN_VERBOSE": "profile_create"} | ({name: capacity} if capacity else {})
    said = subprocess.run(
        [sys.executable, "-c", KERNELS],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert said.count("create:cache_miss") == made
    assert said.count("create:cache_") == 1200


class Rotated(torch.nn.Module):
    """Multiplies by a buffer, which backward needs, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor([2.0, 3.0]))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.factor


def _learn_shapes(_stage: None, *args: torch.Tensor, module: torch.nn.Module) -> Any:
    """As ``PipelineStage._compute_outputs`` before torch 2.14."""
    return module(*args)


class TestLearningShapes:
    """A pipeline stage's first forward, on made-up values."""

    def test_buffers_come_back_and_backward_still_works(self) -> None:
        module, x = Rotated(), torch.ones(2, requires_grad=True)
        out = device._leaving_buffers(_learn_shapes)(None, x, module=module)
        assert module.count.item() == 0
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.tolist() == [2.0, 3.0]

    def test_without_the_care_the_count_stays(self) -> None:
        module = Rotated()
        _learn_shapes(None, torch.ones(2), module=module)
        assert module.count.item() == 1

    def test_torch_or_we_care(self) -> None:
        assert device.stages_leave_buffers() != hasattr(PipelineStage._compute_outputs, "__wrapped__")

    def test_a_torch_that_learns_otherwise_refuses_pipelines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(PipelineStage, "_compute_outputs")
        device.fill_gaps()
        assert refusal("--parallelism.pipeline_parallel_degree 2").endswith("use 1, or torch 2.13")
