"""The experts as steps of autograd: against formulas in fp64, and one way of saving against another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from titan_moe.layer.dispatch.ops import Slots, gather_rows
from titan_moe.layer.experts import GroupedExperts, Save, swiglu_experts

D, F, T, K = 16, 24, 7, 2
COUNTS = {"some": [3, 0, 5, 1], "one": [0, 9, 0, 0], "none": [0, 0, 0, 0]}
SAVES: tuple[Save, Save] = ("all", "inputs")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAMES = ("x", "w1", "w2", "w3")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Drawn:
    """Tokens, which rows are gathered from them, and weights."""

    def __init__(self, counts: list[int], dtype: torch.dtype, device: str = "cpu") -> None:
        torch.manual_seed(3)
        rows, num_experts = sum(counts), len(counts)
        self.offsets_e = torch.tensor(counts).cumsum(0, dtype=torch.int32)
        self.counts = counts
        self.x_TD = torch.randn(T, D, dtype=dtype)
        order_R = torch.randperm(T * K)[:rows]
        present_N = torch.zeros(T * K, dtype=torch.bool).index_fill_(0, order_R, True)
        place_N = torch.zeros(T * K, dtype=torch.int64).index_copy_(0, order_R, torch.arange(rows))
        self.slots = Slots(order_R, place_N.view(T, K), present_N.view(T, K))
        self.index_R = order_R // K
        self.w1, self.w3 = torch.randn(2, num_experts, F, D, dtype=dtype) / 4
        self.w2 = torch.randn(num_experts, D, F, dtype=dtype) / 4
        self.grad_RD = torch.randn(rows, D, dtype=dtype)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.slots = Slots(*(tensor.to(device) for tensor in self.slots))

    def gradients(self, compute: Callable[..., Tensor], frozen: str = "") -> dict[str, Tensor | None]:
        """``compute(x_TD, x_RD, w1, w2, w3)``: its value, and its gradients by name."""
        leaves = {
            name: tensor.clone().requires_grad_(name != frozen)
            for name, tensor in zip(NAMES, (self.x_TD, self.w1, self.w2, self.w3), strict=True)
        }
        x_TD, *weights = leaves.values()
        out_RD = compute(x_TD, x_TD[self.index_R], *weights)
        out_RD.backward(self.grad_RD)
        return {"out": out_RD.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    def ours(self, save: Save, gathered: bool, frozen: str = "") -> dict[str, Tensor | None]:
        def compute(x_TD: Tensor, _: Tensor, *weights: Tensor) -> Tensor:
            source = self.slots.source(x_TD) if gathered else None
            x_RD = gather_rows(x_TD, self.slots)
            return swiglu_experts(x_RD, self.offsets_e, *weights, source=source, save=save)

        return self.gradients(compute, frozen)


def formula(counts: list[int]) -> Callable[..., Tensor]:
    """Expert by expert, row by row of the paper."""

    def compute(_: Tensor, x_RD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        parts = zip(x_RD.split(counts), w1, w2, w3, strict=True)
        return torch.cat(
            [((x @ up.T) * torch.sigmoid(x @ up.T) * (x @ gate.T)) @ down.T for x, up, down, gate in parts]
        )

    return compute


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("gathered", [True, False], ids=["source", "rows"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_the_formula(counts: list[int], gathered: bool, save: Save, device: str) -> None:
    drawn = Drawn(counts, torch.float64, device)
    expected = drawn.gradients(formula(counts))
    for name, value in drawn.ours(save, gathered).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_way_of_saving_has_the_same_bits(counts: list[int], dtype: torch.dtype, device: str) -> None:
    drawn = Drawn(counts, dtype, device)
    base = drawn.ours("all", gathered=False)
    for save in SAVES:
        for gathered in (True, False):
            found = drawn.ours(save, gathered)
            assert [name for name in base if not torch.equal(found[name], base[name])] == []


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("frozen", NAMES)
def test_what_is_frozen_gets_none_and_changes_nothing_else(frozen: str, save: Save) -> None:
    drawn = Drawn(COUNTS["some"], torch.bfloat16)
    found, base = drawn.ours(save, True, frozen), drawn.ours(save, True)
    assert found.pop(frozen) is None
    assert all(torch.equal(found[name], base[name]) for name in found)


@pytest.mark.parametrize("save", SAVES)
def test_backward_may_run_twice(save: Save) -> None:
    """torch's zero-bubble schedules keep the graph and go through it once for inputs, once for weights."""
    drawn = Drawn(COUNTS["some"], torch.bfloat16)
    x_RD, w1 = drawn.x_TD[drawn.index_R].requires_grad_(), drawn.w1.requires_grad_()
    out_RD = swiglu_experts(x_RD, drawn.offsets_e, w1, drawn.w2, drawn.w3, save=save)
    first = torch.autograd.grad(out_RD, (x_RD, w1), drawn.grad_RD, retain_graph=True)
    second = torch.autograd.grad(out_RD, (x_RD, w1), drawn.grad_RD)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("save", SAVES)
def test_compiles_whole(save: Save) -> None:
    """No graph break, and the same bits."""
    drawn = Drawn(COUNTS["some"], torch.bfloat16)
    compiled = torch.compile(swiglu_experts, backend="aot_eager", fullgraph=True)

    def compute(x_TD: Tensor, x_RD: Tensor, *weights: Tensor) -> Tensor:
        return compiled(x_RD, drawn.offsets_e, *weights, source=drawn.slots.source(x_TD), save=save)

    found, base = drawn.gradients(compute), drawn.ours(save, True)
    assert [name for name in base if not torch.equal(found[name], base[name])] == []


class _ThroughTheSeam(GroupedExperts):
    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        return super()._grouped_mm(A=A, B_t=B_t, offs=offs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_overridden_matmul_is_called_and_has_the_same_bits(dtype: torch.dtype) -> None:
    drawn = Drawn(COUNTS["some"], dtype)
    config = GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=4)
    counts_e = torch.tensor(drawn.counts)

    def through(kind: type[GroupedExperts]) -> Any:
        experts = kind(config)

        def compute(_: Tensor, x_RD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
            for name, weight in (("w1_EFD", w1), ("w2_EDF", w2), ("w3_EFD", w3)):
                del experts._parameters[name]
                setattr(experts, name, weight)
            return experts(x_RD, counts_e)

        return drawn.gradients(compute)

    found, base = through(_ThroughTheSeam), through(GroupedExperts)
    if dtype == torch.float64:  # autograd sums the experts of our fp64 loop in its own order
        for name in base:
            torch.testing.assert_close(found[name], base[name], rtol=1e-12, atol=1e-12)
    else:
        assert [name for name in base if not torch.equal(found[name], base[name])] == []


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_derivative_is_refused(dtype: torch.dtype, save: Save) -> None:
    """The kernels have none: a result without it would be wrong and look right."""
    drawn = Drawn(COUNTS["some"], dtype)
    leaf = drawn.x_TD.clone().requires_grad_()

    def second_derivative() -> None:
        out_RD = swiglu_experts(leaf[drawn.index_R], drawn.offsets_e, drawn.w1, drawn.w2, drawn.w3, save=save)
        (gradient,) = torch.autograd.grad(out_RD, leaf, drawn.grad_RD.requires_grad_(), create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="the experts have no second derivative"):
        second_derivative()
