"""The row kernels on a CPU, compiled and as custom ops, against eager; and without a compiler."""

import ctypes
import logging
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernel_cases import CASES, FAULTS, FUNCTIONS, by_halves, inputs
from titan_moe.layer.kernels import eager, native, ops

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@needs_compiler
def test_there_is_a_library() -> None:
    """Without one, the cases below would compare eager with itself."""
    assert native.library() is not None


@pytest.mark.parametrize("name", CASES)
def test_native(name: str) -> None:
    assert CASES[name](native, "cpu") == ""


@pytest.mark.parametrize("name", [name for name in CASES if "7x2x130" in name or "x" not in name])
def test_as_custom_ops(name: str) -> None:
    assert CASES[name](torch.ops.titan_moe, "cpu") == ""


@pytest.mark.parametrize(("function", "dtype", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(function, dtype, fault):
    case = CASES["position-fp32" if fault is by_halves else f"{function}-{dtype}-5x3x48"]
    assert case(eager, "cpu") == ""
    faulty = SimpleNamespace(**{name: getattr(eager, name) for name in FUNCTIONS} | {function: fault})
    assert case(faulty, "cpu") != ""


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_do_not_change_a_bit(dtype: torch.dtype, threads: int) -> None:
    given = inputs(dtype, (64, 3, 130), "cpu")
    args = (given.grad_TD, given.y_ND, given.scores_TK, given.order_N)
    alone = native.weighted_sum_backward(*args)
    torch.set_num_threads(threads)
    try:
        together = native.weighted_sum_backward(*args)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 5, 255, 256, 257, 511, 513, 1025])
def test_the_gate_by_blocks(tokens: int) -> None:
    """Within fp32's rounding of the whole matmul; no block of one row among many."""
    x_TD, w_ED, grad_TE = torch.randn(tokens, 32).bfloat16(), torch.randn(8, 32), torch.randn(tokens, 8)
    sizes = [block.shape[0] for block in native._blocks(x_TD)]
    assert sum(sizes) == tokens
    assert max(sizes) < 512
    assert min(sizes) > 1 or tokens <= 1
    torch.testing.assert_close(ops.gate(x_TD, w_ED), eager.gate(x_TD, w_ED))
    grad_x_TD, grad_w_ED = ops.gate_backward(grad_TE, x_TD, w_ED)
    want_x_TD, want_w_ED = eager.gate_backward(grad_TE, x_TD, w_ED)
    torch.testing.assert_close(grad_x_TD, want_x_TD)
    torch.testing.assert_close(grad_w_ED, want_w_ED, rtol=1e-4, atol=1e-4)


def _arguments(name: str) -> tuple[Any, ...]:
    given = inputs(torch.bfloat16, (7, 2, 16), "cpu")
    gate = (given.y_ND, torch.randn(4, 16))
    return {
        "sum_rows": (given.y_ND, given.place_TK, given.present_TK),
        "weighted_sum": (given.y_ND, given.scores_TK, given.place_TK, None),
        "weighted_sum_backward": (given.grad_TD, given.y_ND, given.scores_TK, given.order_N),
        "swiglu": (given.gate_ND, given.up_ND),
        "swiglu_backward": (given.y_ND, given.gate_ND, given.up_ND),
        "gate": gate,
        "gate_backward": (torch.randn(14, 4), *gate),
    }[name]


@pytest.mark.parametrize("name", [*FUNCTIONS, "gate", "gate_backward"])
def test_torch_accepts_the_op(name: str) -> None:
    """Schema, fake tensors, and torch.compile's dispatch: what torch.library.opcheck looks at."""
    torch.library.opcheck(getattr(torch.ops.titan_moe, name).default, _arguments(name))


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_without_triton_takes_eager(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
        monkeypatch.delitem(sys.modules, "titan_moe.layer.kernels.gpu", raising=False)
        monkeypatch.delattr("titan_moe.layer.kernels.gpu", raising=False)
    ops.gpu_kernels.cache_clear()
    name = ops.gpu_kernels().__name__
    ops.gpu_kernels.cache_clear()
    assert name == ("titan_moe.layer.kernels.gpu" if installed else "titan_moe.layer.kernels.eager")


class TestWithoutALibrary:
    @pytest.fixture(autouse=True)
    def _own_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        native.library.cache_clear()
        yield
        native.library.cache_clear()

    def _works(self) -> None:
        given = inputs(torch.bfloat16, (5, 3, 48), "cpu")
        args = (given.y_ND, given.scores_TK, given.place_TK, None)
        assert torch.equal(native.weighted_sum(*args), eager.weighted_sum(*args))

    def test_no_compiler_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CC", "no-such-compiler")
        with caplog.at_level(logging.WARNING):
            self._works()
            self._works()
        assert native.library() is None
        (record,) = caplog.records
        assert "as torch ops, which is slower: there is no C compiler (no-such-compiler)" in record.message

    @needs_compiler
    def test_a_source_that_does_not_compile_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(native, "SOURCE", tmp_path / "native.c")
        native.SOURCE.write_text("no C")
        with caplog.at_level(logging.WARNING):
            self._works()
        assert "error" in caplog.text
        assert not list((tmp_path / "cache").rglob("*.so"))

    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("TITAN_MOE_KERNELS", "eager")
        self._works()
        assert native.library() is None
        assert not (tmp_path / "cache").exists()

    @needs_compiler
    def test_a_damaged_cache_is_not_used(self, tmp_path: Path) -> None:
        assert isinstance(native.library(), ctypes.CDLL)
        (file,) = (tmp_path / "cache").rglob("*.so")
        # Another file: this process holds the old one's pages.
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[: len(data) // 2])
        native.library.cache_clear()
        assert isinstance(native.library(), ctypes.CDLL)
        self._works()

    @needs_compiler
    def test_no_place_for_a_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert isinstance(native.library(), ctypes.CDLL)
        self._works()

    @needs_compiler
    def test_four_at_once(self, tmp_path: Path) -> None:
        """None waits for another, and one file is left."""
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: native._cached(), range(4)))
        assert all(isinstance(library, ctypes.CDLL) for library in found)
        assert len(list((tmp_path / "cache").rglob("*"))) == 2  # the folder titan_moe, and the library
