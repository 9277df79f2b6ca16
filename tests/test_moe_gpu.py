"""The MoE layer of one process against the dense fp64 oracle: on a GPU, and the same cases on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.layers import build_layer, parameters
from tests.oracle import Case, random_case
from tests.test_moe import REGIMES, D, E, F
from titan_moe.experts import Save

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(1, 1), (3, 7)]
SAVES: tuple[Save, Save] = ("all", "inputs")
# Of each tensor's largest. In fp32 the kernels run; in fp64 their reference does.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def case_of(regime: str, shape: tuple[int, int]) -> Case:
    options = dict(REGIMES[regime])
    return random_case(7, *shape, D, F, E, options.pop("K"), shared=True, **options)


def run(
    case: Case, device: str, dtype: torch.dtype, save: Save = "all", fault: float = 0
) -> dict[str, Tensor]:
    """Output, counts, and gradients of the input and of every parameter, by oracle name.

    Args:
        fault: how much too large, relatively, w2 is.
    """
    layer = build_layer(case, save=save).to(device, dtype)
    parameters(layer)["w2_EDF"].data *= 1 + fault
    x_BLD = case.params["x_BLD"].detach().to(device, dtype).requires_grad_()
    out_BLD = layer(x_BLD)
    out_BLD.backward(case.grad_out_BLD.to(device, dtype))
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in parameters(layer).items()}
    found = {"out_BLD": out_BLD.detach(), "x_BLD": x_BLD.grad, "counts_E": layer.tokens_per_expert_E}
    return {name: tensor.cpu() for name, tensor in (found | gradients).items()}


def differences(found: dict[str, Tensor], case: Case, bound: float) -> list[str]:
    """Names of what is further from the oracle than ``bound`` times the tensor's largest."""
    out, gradients = case.run_with_gradients()
    del gradients["topk_scores_TK"]
    expected = {"out_BLD": out.out_BLD.detach(), **gradients}
    assert found.keys() == expected.keys() | {"counts_E"}
    wrong = [] if torch.equal(found["counts_E"].long(), out.counts_E) else ["counts_E"]
    for name, tensor in expected.items():
        largest = tensor.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        if not (found[name].double() - tensor).abs().max() <= bound * largest:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_equals_the_oracle(regime: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    case = case_of(regime, shape)
    for save in SAVES:
        assert differences(run(case, device, dtype, save), case, BOUNDS[dtype]) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_fault_is_seen(dtype: torch.dtype, device: str) -> None:
    case = case_of("all_experts", (3, 7))
    assert "out_BLD" in differences(run(case, device, dtype, fault=100 * BOUNDS[dtype]), case, BOUNDS[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_again_and_whatever_is_saved_the_same_bits(device: str) -> None:
    case = case_of("random", (3, 7))
    base = run(case, device, torch.bfloat16)
    for save in (*SAVES, *SAVES):
        found = run(case, device, torch.bfloat16, save)
        assert [name for name in base if not torch.equal(found[name], base[name])] == []
