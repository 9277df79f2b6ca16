"""layer/kernels/gpu.py against eager: in Triton's interpreter on a CPU, as PTX, and on a GPU, if any.

The interpreter must be chosen before Triton is imported, so one subprocess (this module) runs
every case there. It runs the kernels' text in numpy: indices, masks, order and rounding of each operation.
Fusion, the GPU's exp and the order of its sums within a row are the compiler's: see the PTX and GPU tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernel_cases import CASES, difference
from titan_moe.layer.kernels import eager

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------
# In the interpreter.


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    """What every case says in the interpreter."""
    env = os.environ | {"TRITON_INTERPRET": "1", "TITAN_MOE_KERNELS": "auto", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_kernels_gpu"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name, verdicts):
    assert verdicts[name] == ""


def interpret() -> None:
    """The subprocess: prints ``{case: verdict}``."""
    torch.set_num_threads(1)
    convert_bf16_as_torch_does()
    from titan_moe.layer.kernels import gpu

    print(json.dumps({name: case(gpu, "cpu") for name, case in CASES.items()}))


def convert_bf16_as_torch_does() -> None:
    """Triton 3.7.1's interpreter cuts fp32 off to bf16 and loses bf16's subnormals; a GPU does neither."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    its_own = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        both = (source.dtype.scalar, dtype.scalar)
        if both == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(source.data).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if both == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype("uint32") << 16).view("float32"), tl.float32)
        return its_own(self, source, dtype)

    InterpreterBuilder.cast_impl = cast


# ---------------------------------------------------------------------------------------------------
# As PTX: Triton compiles for a GPU that is not there.


def instructions(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> set[str]:
    """Of a kernel for Hopper: ``{"add.rn.f32", "ld.global.v4.b32", ...}``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # What launch finds for itself: aligned pointers, a multiple of 16 columns.
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name not in constants}
    source = ASTSource(kernel, types, constants, attrs)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return set(re.findall(r"^\s*(?:@%p\d+ )?([a-z]\w*\.[\w.:]+)", ptx, re.MULTILINE))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The instructions of the two kernels with sums of products: as launched, and with fusion."""
    from titan_moe.layer.kernels import gpu

    bf16, fp32, ints = "*bf16", "*fp32", {"place": "*i64", "order": "*i64", "D": "i32"}
    forward = {"out": bf16, "y": bf16, "also": bf16, "scores": fp32, "present": "*i1", **ints}
    backward = {"grad_y": bf16, "grad_score": fp32, "grad": bf16, "y": bf16, "scores": fp32, **ints}
    kernels = ((gpu.sum_kernel, forward), (gpu.weighted_sum_backward_kernel, backward))
    constants = {"K": 2, "BLOCK": gpu.BLOCK}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return {
            fusion: [instructions(*kernel, constants, **gpu.LAUNCH | fusion_option) for kernel in kernels]
            for fusion, fusion_option in ((False, {}), (True, {"enable_fp_fusion": True}))
        }


def test_compiled_operations_round_each_and_to_nearest(compiled):
    for found in compiled[False]:
        assert {"mul.rn.f32", "add.rn.f32", "cvt.rn.bf16x2.f32"} <= found
        assert not {name for name in found if name.startswith("fma.") or "ftz" in name or "atom" in name}


def test_compiled_accesses_are_wide_and_offsets_64_bits(compiled):
    for found in compiled[False]:
        assert {"ld.global.v4.b32", "st.global.v4.b32", "mul.lo.s64"} <= found


def test_fusion_would_be_seen(compiled):
    for found in compiled[True]:
        assert "fma.rn.f32" in found


# ---------------------------------------------------------------------------------------------------
# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name):
    import titan_moe.layer.kernels.ops  # noqa: F401  (registers them)

    assert CASES[name](torch.ops.titan_moe, "cuda") == ""


@pytest.mark.gpu
def test_on_the_gpu_past_2_31_elements():
    from titan_moe.layer.kernels import gpu

    N, D = 2**20 + 8, 2048
    if torch.cuda.mem_get_info()[0] < 12 * N * D:
        pytest.skip("needs 25 GiB of GPU memory")
    y_ND = torch.zeros(N, D, dtype=torch.bfloat16, device="cuda")
    y_ND[-2:] = torch.randn(2, D, device="cuda")
    last_TK = torch.tensor([[N - 1, N - 2]], device="cuda")
    ones_11 = torch.ones(1, 1, device="cuda")
    few_ND, first_TK = y_ND[-2:].clone(), torch.tensor([[1, 0]], device="cuda")
    assert difference(gpu.sum_rows(y_ND, last_TK), eager.sum_rows(few_ND, first_TK), "sum") == ""
    assert difference(gpu.swiglu(y_ND, y_ND)[-2:], gpu.swiglu(few_ND, few_ND), "swiglu") == ""
    zeros_N = torch.zeros(N, dtype=torch.int64, device="cuda")
    grad_y_ND, grad_score_N = gpu.weighted_sum_backward(few_ND[:1], y_ND, ones_11, zeros_N)
    assert (grad_y_ND[-1] == few_ND[0]).all()
    assert grad_score_N[-2] == gpu.weighted_sum_backward(few_ND[:1], few_ND, ones_11, zeros_N[:2])[1][0]


if __name__ == "__main__":
    interpret()
