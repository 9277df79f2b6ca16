"""The MoE layer against the dense fp64 oracle, on every mesh of 4 ranks, over shapes and routing regimes."""

import itertools
from typing import Any

import pytest
import torch

from tests.backends import BACKENDS, load
from tests.faults import FAULTS
from tests.layers import Mesh, build_layer, differences, on_mesh, parallel_dims, parameters, run_layer
from tests.oracle import Case, random_case
from tests.ranks import Mode, run_ranks
from titan_moe.layer.experts import Save

RANKS, D, F, E = 4, 16, 8, 8

MESHES = [
    Mesh(tp=tp, ep=ep, sp=sp)
    for tp, ep in itertools.product((1, 2, 4), repeat=2)
    for sp in (True, False)[:tp]
]
SAVES: tuple[Save, Save] = ("all", "inputs")
BATCHES, LENGTHS = (1, 2, 3), (1, 2, 5, 7, 8)
REGIMES: dict[str, dict[str, Any]] = {
    "random": {"K": 3, "bias_scale": 0.1},
    "one_expert": {"K": 2, "routing": "one_expert"},
    "one_rank": {"K": 2, "routing": "one_rank", "ep": 4, "hot_rank": 2},
    "top1": {"K": 1},
    "all_experts": {"K": E, "route_norm": True, "score_func": "softmax"},
    "equal_scores": {"K": 3, "routing": "equal_scores"},
    "groups": {
        "K": 2,
        "num_expert_groups": 4,
        "num_limited_groups": 2,
        "route_norm": True,
        "route_scale": 2.5,
    },
}


def _case(mesh: Mesh, batch: int, length: int, regime: str, *, shared: bool = True) -> Case:
    """`batch` sequences on each data-parallel rank."""
    options = dict(REGIMES[regime])
    return random_case(
        7, batch * RANKS // mesh.tp, length, D, F, E, options.pop("K"), shared=shared, **options
    )


def _dispatchers(mesh: Mesh) -> list[str]:
    """Those that serve the mesh."""
    return [
        name
        for name in BACKENDS
        if (mesh.ep > 1 and name != "local") or (mesh.ep == 1 and not load(name).requires_ep)
    ]


def _check(case: Case, mesh: Mesh, dispatcher: str, mode: Mode, save: Save = "all") -> None:
    results = run_ranks(run_layer, RANKS, case, mesh, dispatcher, None, save, mode=mode)
    assert all(not result["none_gradients"] for result in results)
    assert differences(results, case) == []


def _param(mesh: Mesh, shape: tuple[int, int], dispatcher: str) -> Any:
    return pytest.param(mesh, shape, dispatcher, id=f"{dispatcher}-{mesh}-B{shape[0]}-L{shape[1]}")


SHAPES = list(itertools.product(BATCHES, LENGTHS))
FULL = [_param(m, shape, name) for m in MESHES for shape in SHAPES for name in _dispatchers(m)]
# Every mesh meets every length; batch sizes, dispatchers, regimes and what is saved take turns.
WIDE = [
    _param(mesh, (BATCHES[number % 3], length), _dispatchers(mesh)[number % len(_dispatchers(mesh))])
    for number, (mesh, length) in enumerate(itertools.product(MESHES, LENGTHS))
]


@pytest.mark.parametrize(
    ("number", "mesh", "shape", "dispatcher"),
    [pytest.param(number, *param.values, id=param.id) for number, param in enumerate(WIDE)],
)
def test_layer_equals_oracle_on_simulated_ranks(
    number: int, mesh: Mesh, shape: tuple[int, int], dispatcher: str
) -> None:
    regime = list(REGIMES)[number % len(REGIMES)]
    _check(_case(mesh, *shape, regime), mesh, dispatcher, "local_tensor", SAVES[number % 2])


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("mesh", "shape", "dispatcher"), FULL)
def test_layer_equals_oracle_in_full(
    mesh: Mesh, shape: tuple[int, int], dispatcher: str, regime: str
) -> None:
    save = SAVES[(sum(shape) + len(regime)) % 2]
    _check(_case(mesh, *shape, regime), mesh, dispatcher, "local_tensor", save)


GLOO = [
    (Mesh(tp=2, ep=2), (3, 7), "random"),
    (Mesh(tp=2, ep=4), (2, 5), "groups"),
    (Mesh(tp=2, ep=2, sp=False), (3, 7), "one_rank"),
    (Mesh(tp=4, ep=4), (3, 7), "equal_scores"),
    (Mesh(tp=4, ep=4), (1, 2), "one_expert"),  # ranks without tokens, ranks that receive none, idle experts
    (Mesh(tp=4, ep=4), (1, 1), "top1"),
    (Mesh(tp=4, ep=2), (2, 5), "all_experts"),
    (Mesh(tp=4), (3, 7), "random"),
    (Mesh(tp=2, sp=False), (2, 5), "groups"),
    (Mesh(ep=4), (1, 1), "one_expert"),
    (Mesh(ep=2), (2, 5), "random"),
]


@pytest.mark.parametrize(
    ("mesh", "shape", "regime", "dispatcher"),
    [
        pytest.param(
            mesh, shape, regime, dispatcher, id=f"{dispatcher}-{mesh}-B{shape[0]}-L{shape[1]}-{regime}"
        )
        for mesh, shape, regime in GLOO
        for dispatcher in _dispatchers(mesh)
    ],
)
def test_layer_equals_oracle_on_real_ranks(
    mesh: Mesh, shape: tuple[int, int], regime: str, dispatcher: str
) -> None:
    _check(_case(mesh, *shape, regime), mesh, dispatcher, "gloo")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 0), (0, 3)], ids=["B3-L7", "one-token", "L0", "B0"])
def test_one_rank_without_any_mesh(shape: tuple[int, int], regime: str, save: Save) -> None:
    options = dict(REGIMES[regime])
    case = random_case(7, 3, 7, D, F, E, options.pop("K"), shared=True, **options)
    batch, length = shape
    case.params["x_BLD"] = case.params["x_BLD"][:batch, :length].detach().clone().requires_grad_()
    case.grad_out_BLD = case.grad_out_BLD[:batch, :length].contiguous()
    layer = build_layer(case, save=save)
    x_BLD = case.params["x_BLD"].detach().clone().requires_grad_()
    out_BLD = layer(x_BLD)
    out_BLD.backward(case.grad_out_BLD)
    expected, gradients = case.run_with_gradients()
    torch.testing.assert_close(out_BLD, expected.out_BLD, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x_BLD.grad, gradients["x_BLD"], rtol=1e-10, atol=1e-12)
    for name, parameter in parameters(layer).items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("save", SAVES)
def test_compiled_layer_has_the_same_bits(save: Save) -> None:
    """Whole under dynamo, forward and backward, and again for another length; meshes: tests/matrix.py."""
    case = random_case(7, 3, 7, D, F, E, 3, shared=True, dtype=torch.bfloat16)
    layer = build_layer(case, save=save)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for length in (7, 5):
        found = []
        for forward in (layer, compiled):
            layer.zero_grad()
            x_BLD = case.params["x_BLD"][:, :length].detach().clone().requires_grad_()
            out_BLD = forward(x_BLD)
            out_BLD.backward(case.grad_out_BLD[:, :length].contiguous())
            gradients = {name: parameter.grad.clone() for name, parameter in parameters(layer).items()}  # type: ignore[union-attr]
            found.append(gradients | {"out": out_BLD.detach(), "x": x_BLD.grad})
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]), length
    assert layer.tokens_per_expert_E.sum() == 2 * 3 * (7 + 5) * 3, "counted by both"


class TestPlantedFaults:
    """The checks above, on upstream's bugs."""

    @pytest.mark.parametrize("mode", ["local_tensor", "gloo"])
    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_flat_offset_is_wrong_from_two_sequences_on(self, batch: int, mode: Mode) -> None:
        mesh = Mesh(tp=4, ep=4)
        case = _case(mesh, batch, 8, "random", shared=False)
        found = differences(
            run_ranks(run_layer, RANKS, case, mesh, "all_to_all", "flat_offset", mode=mode), case
        )
        assert ("out_BLD" in found) == (batch > 1), found

    @pytest.mark.parametrize("length", [8, 7])
    def test_inferred_shape_is_wrong_for_uneven_shards(self, length: int) -> None:
        mesh = Mesh(tp=2, ep=2)
        case = _case(mesh, 2, length, "random", shared=False)
        try:
            found = differences(run_ranks(run_layer, RANKS, case, mesh, "all_to_all", "inferred_shape"), case)
        except RuntimeError as error:
            found = [str(error)]
        assert bool(found) == (length == 7), found

    def test_skipped_experts_leave_no_gradient(self) -> None:
        mesh = Mesh(ep=4)
        case = _case(mesh, 1, 2, "one_rank", shared=False)
        results = run_ranks(run_expert_gradients, RANKS, case, mesh, "all_to_all", "skipped_experts")
        idle = [result for result in results if result["rows"] == 0]
        assert idle
        assert all(result["none_gradients"] for result in idle)
        healthy = run_ranks(run_expert_gradients, RANKS, case, mesh, "all_to_all", None)
        assert not any(result["none_gradients"] for result in healthy)
        assert all(result["zero"] for result in healthy if result["rows"] == 0)

    @pytest.mark.parametrize("fault", ["unreduced_tokens", "unreduced_gate"])
    @pytest.mark.parametrize("sp", [True, False])
    def test_missing_tp_reduction_below_the_experts(self, fault: str, sp: bool) -> None:
        mesh = Mesh(tp=2, sp=sp)
        case = _case(mesh, 2, 8, "random", shared=False)
        found = differences(run_ranks(run_layer, RANKS, case, mesh, "local", fault, mode="gloo"), case)
        assert "out_BLD" not in found, "the loss would look right"
        assert ("x_BLD" if fault == "unreduced_tokens" else "gate_ED") in found, found


def run_expert_gradients(
    ctx: Any, case: Case, mesh: Mesh, dispatcher: str, fault: str | None
) -> dict[str, Any]:
    """Each rank's own experts after a backward: rows they got, and gradients that are None or all 0."""
    dims = parallel_dims(ctx, mesh)
    layer = on_mesh(build_layer(case, dispatcher), dims, mesh)
    if fault:
        FAULTS[fault](layer)
    experts = layer.routed_experts.inner_experts
    rows: list[int] = []
    experts.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[0]))
    x_BLD = case.params["x_BLD"][ctx.rank : ctx.rank + 1].detach().clone().requires_grad_()
    layer(x_BLD).backward(case.grad_out_BLD[ctx.rank : ctx.rank + 1])
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {
        "rows": rows[0],
        "none_gradients": [name for name, gradient in gradients.items() if gradient is None],
        "zero": all(g is not None and not g.to_local().any() for g in gradients.values()),
    }
