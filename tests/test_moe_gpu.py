"""The MoE layer of one process against the dense fp64 oracle: on a GPU, and the same cases on the CPU."""

import pytest
import torch
from torch import Tensor

from tests.layers import build_layer, differences, parameters, watch
from tests.oracle import Case, random_case
from tests.test_experts import DEVICES
from tests.test_moe import REGIMES, SAVES, D, E, F
from titan_moe.layer.experts import Save

SHAPES = [(1, 1), (3, 7)]
# Of each tensor's largest. In fp32 the kernels run; in fp64 their reference does.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def case_of(regime: str, shape: tuple[int, int]) -> Case:
    options = dict(REGIMES[regime])
    return random_case(7, *shape, D, F, E, options.pop("K"), shared=True, **options)


def run(
    case: Case, device: str, dtype: torch.dtype, save: Save = "all", fault: float = 0
) -> dict[str, Tensor]:
    """Output, counts, and gradients of the input, the scores and every parameter, by oracle name.

    Args:
        fault: how much too large, relatively, w2 is.
    """
    layer = build_layer(case, save=save).to(device, dtype)
    parameters(layer)["w2_EDF"].data *= 1 + fault
    seen = watch(layer)
    x_BLD = case.params["x_BLD"].detach().to(device, dtype).requires_grad_()
    out_BLD = layer(x_BLD)
    out_BLD.backward(case.grad_out_BLD.to(device, dtype))
    found = {"out_BLD": out_BLD.detach(), "x_BLD": x_BLD.grad, "counts_E": layer.tokens_per_expert_E}
    found |= {"topk_scores_TK": seen["scores"].grad}
    found |= {name: parameter.grad for name, parameter in parameters(layer).items()}
    return {name: tensor.cpu() for name, tensor in found.items()}


def wrong(found: dict[str, Tensor], case: Case, dtype: torch.dtype) -> list[str]:
    return differences([found | {"none_gradients": []}], case, rtol=BOUNDS[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_equals_the_oracle(regime: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    case = case_of(regime, shape)
    for save in SAVES:
        assert wrong(run(case, device, dtype, save), case, dtype) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_fault_is_seen(dtype: torch.dtype, device: str) -> None:
    case = case_of("all_experts", (3, 7))
    found = wrong(run(case, device, dtype, fault=100 * BOUNDS[dtype]), case, dtype)
    assert {"out_BLD", "x_BLD", "topk_scores_TK", "w1_EFD"} <= set(found)


@pytest.mark.parametrize("device", DEVICES)
def test_again_and_whatever_is_saved_the_same_bits(device: str) -> None:
    case = case_of("random", (3, 7))
    base = run(case, device, torch.bfloat16)
    for save in (*SAVES, *SAVES):
        found = run(case, device, torch.bfloat16, save)
        assert [name for name in base if not torch.equal(found[name], base[name])] == []
