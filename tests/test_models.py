"""Our MoE inside torchtitan's models: same names, same shapes, same numbers; and attention on CPU."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel
from torch.nn.attention.flex_attention import and_masks, create_block_mask
from torchtitan.models.common import attention
from torchtitan.models.common import moe as upstream
from torchtitan.models.common.attention import (
    FlexAttention,
    VarlenAttention,
    get_causal_mask_mod,
    get_document_mask_mod,
)

from titan_moe.layer.dispatch import DISPATCHERS
from titan_moe.layer.experts import GroupedExperts
from titan_moe.layer.load_balance import attach_load_balancer
from titan_moe.layer.moe import MoE, RoutedExperts
from titan_moe.layer.router import TokenChoiceTopKRouter
from titan_moe.models import MODELS, build_spec, flavors
from titan_moe.models.attention import PackedSDPA
from titan_moe.models.swap import swap_attention, swap_moe, swap_spec
from titan_moe.parallel.parallelize import parallelize

# torchtitan's family: its flavors with MoE and how many such layers they have.
MOE_LAYERS: dict[str, dict[str, int]] = {
    "deepseek_v3": {"debugmodel": 5, "16B": 26, "236B": 59, "671B": 58},
    "qwen3": {"debugmodel_moe": 8, "30B-A3B": 48, "235B-A22B": 94},
    "qwen3_5": {"debugmodel_moe": 4, "35B-A3B": 40, "122B-A10B": 48, "397B-A17B": 60},
    "gpt_oss": {"debugmodel": 4, "20b": 24, "120b": 36},
    "kimi_k2_7": {"debugmodel": 5, "moonlight-16B-A3B": 26, "Kimi-VL-A3B": 26, "Kimi-K2.5": 60},
}
DENSE = {"llama3": "debugmodel", "muse_glimmer": "debugmodel", "qwen3": "debugmodel"}
FLAVORS = [(family, flavor) for family, sizes in MOE_LAYERS.items() for flavor in sizes]
DEBUG = [(family, flavor) for family, flavor in FLAVORS if flavor.startswith("debugmodel")]


@functools.cache
def stock_family(family: str) -> Any:
    """torchtitan's module. Qwen3.5 imports a CUDA kernel library at the top, which configs do not need."""
    missing = {} if importlib.util.find_spec("fla") else dict.fromkeys(FLA, mock.MagicMock())
    with mock.patch.dict(sys.modules, missing if family == "qwen3_5" else {}):
        return importlib.import_module(f"torchtitan.models.{family}")


FLA = [
    "fla",
    "fla.modules.conv.triton.ops",
    "fla.ops.gated_delta_rule",
    "fla.ops.gated_delta_rule.chunk",
    "fla.ops.gated_delta_rule.fused_recurrent",
]


def stock_spec(family: str, flavor: str, **options: Any) -> Any:
    """torchtitan's own ModelSpec, a new one each time."""
    return stock_family(family).model_registry(flavor, **options)


def on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return config.build()


def moe_configs(config: Any) -> dict[str, Any]:
    return {fqn: moe for fqn, moe, _, _ in config.traverse(upstream.MoE.Config)}


def shapes(named: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in named}


class TestSwapMoE:
    @pytest.mark.parametrize(("family", "flavor"), FLAVORS)
    def test_replaces_every_layer_and_keeps_every_name(self, family: str, flavor: str) -> None:
        config = stock_spec(family, flavor).model
        stock = on_meta(config)
        number = sum(type(module).__name__.endswith("MoE") for module in stock.modules())
        assert swap_moe(config, dispatcher="local") == number == MOE_LAYERS[family][flavor]
        ours = on_meta(config)
        assert sum(isinstance(module, MoE) for module in ours.modules()) == number
        for stale in (upstream.MoE, upstream.RoutedExperts, upstream.TokenChoiceTopKRouter):
            assert not any(isinstance(module, stale) for module in ours.modules())
        assert shapes(ours.named_parameters()) == shapes(stock.named_parameters())
        buffers = shapes(ours.named_buffers())
        counters = {name for name in buffers if name.endswith(".traffic")}  # ours alone, and never saved
        assert len(counters) == number
        assert {name: buffers[name] for name in buffers.keys() - counters} == shapes(stock.named_buffers())
        assert shapes(ours.state_dict().items()) == shapes(stock.state_dict().items())
        dtypes = {name: tensor.dtype for name, tensor in ours.state_dict().items()}
        assert dtypes == {name: tensor.dtype for name, tensor in stock.state_dict().items()}

    @pytest.mark.parametrize(("family", "flavor"), FLAVORS)
    def test_keeps_every_option(self, family: str, flavor: str) -> None:
        """All fields of all parts but the dispatcher, which is ours."""
        model = stock_spec(family, flavor).model
        stock = moe_configs(model)
        options = {fqn: _options(config) for fqn, config in stock.items()}
        swap_moe(model, dispatcher="local")
        assert moe_configs(model).keys() == stock.keys()
        for fqn, ours in moe_configs(model).items():
            config = stock[fqn]
            assert type(ours) is MoE.Config
            assert type(ours.router) is TokenChoiceTopKRouter.Config
            assert type(ours.routed_experts) is RoutedExperts.Config
            dispatcher = ours.routed_experts.token_dispatcher
            assert (dispatcher.num_experts, dispatcher.top_k) == (config.num_experts, config.router.top_k)
            assert _options(ours) == options[fqn]

    @pytest.mark.parametrize("dispatcher", DISPATCHERS)
    def test_dispatcher_by_name(self, dispatcher: str) -> None:
        config = stock_spec("deepseek_v3", "debugmodel").model
        swap_moe(config, dispatcher=dispatcher)
        module, _ = DISPATCHERS[dispatcher].split(":")
        kinds = {type(moe.routed_experts.token_dispatcher).__module__ for moe in moe_configs(config).values()}
        assert kinds == {module}

    def test_unknown_dispatcher(self) -> None:
        config = stock_spec("deepseek_v3", "debugmodel").model
        with pytest.raises(
            ValueError, match=rf"'locl' is not a dispatcher \(there are: {', '.join(DISPATCHERS)}"
        ):
            swap_moe(config, dispatcher="locl")
        assert not any(isinstance(moe, MoE.Config) for moe in moe_configs(config).values())

    def test_mtp_layers_too(self) -> None:
        config = stock_spec("deepseek_v3", "debugmodel", num_mtp_layers=2).model
        stock = on_meta(config)
        assert swap_moe(config, dispatcher="local") == MOE_LAYERS["deepseek_v3"]["debugmodel"] + 2
        assert shapes(on_meta(config).named_parameters()) == shapes(stock.named_parameters())

    @pytest.mark.parametrize(("family", "flavor"), DENSE.items())
    def test_dense_models_have_nothing_to_swap(self, family: str, flavor: str) -> None:
        assert swap_moe(stock_spec(family, flavor).model, dispatcher="local") == 0

    def test_twice_is_harmless(self) -> None:
        config = stock_spec("deepseek_v3", "debugmodel").model
        counts = [swap_moe(config, dispatcher=name) for name in ("local", "all_to_all")]
        assert counts == [5, 5]
        dispatchers = [moe.routed_experts.token_dispatcher for moe in moe_configs(config).values()]
        assert {type(dispatcher).__module__ for dispatcher in dispatchers} == {
            "titan_moe.layer.dispatch.all_to_all"
        }

    def test_a_forward_of_its_own_is_refused(self) -> None:
        config = stock_spec("deepseek_v3", "debugmodel").model
        layer = config.layers[2]
        fields = {f.name: getattr(layer.moe, f.name) for f in dataclasses.fields(layer.moe)}
        layer.moe = LoudMoE.Config(**fields)
        with pytest.raises(ValueError, match=r"layers\.2\.moe: LoudMoE computes more than torchtitan's MoE"):
            swap_moe(config, dispatcher="local")
        assert not any(isinstance(moe, MoE.Config) for moe in moe_configs(config).values()), "half swapped"

    def test_a_router_with_a_forward_of_its_own_is_refused(self) -> None:
        config = stock_spec("deepseek_v3", "debugmodel").model
        moe = config.layers[2].moe
        fields = {f.name: getattr(moe.router, f.name) for f in dataclasses.fields(moe.router)}
        moe.router = LoudRouter.Config(**fields)
        with pytest.raises(ValueError, match=r"layers\.2\.moe\.router: LoudRouter computes more"):
            swap_moe(config, dispatcher="local")

    def test_other_experts_are_kept(self) -> None:
        config = stock_spec("gpt_oss", "debugmodel").model
        swap_moe(config, dispatcher="local")
        kinds = {type(moe.routed_experts.inner_experts).__qualname__ for moe in moe_configs(config).values()}
        assert kinds == {"GptOssGroupedExperts.Config"}

    def test_experts_of_another_kind_save_what_they_save(self) -> None:
        config = stock_spec("gpt_oss", "debugmodel").model
        with pytest.raises(ValueError, match=r"moe.save 'inputs': .* own kind \(GptOssGrouped.*use 'all'"):
            swap_moe(config, dispatcher="local", save="inputs")


class LoudMoE(upstream.MoE):
    """A layer that a swap would lose something of."""

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.MoE.Config):
        pass

    def forward(self, x_BLD: Tensor) -> Tensor:
        return 2 * super().forward(x_BLD)


class LoudRouter(upstream.TokenChoiceTopKRouter):
    """A router that a swap must not lose."""

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.TokenChoiceTopKRouter.Config):
        """No fields of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stock's, as far as anyone can tell."""
        return super().forward(*args, **kwargs)


def _options(config: Any) -> Any:
    """A config as plain data, without its types, its dispatcher, and ``save``, which is ours alone."""
    if dataclasses.is_dataclass(config):
        names = [f.name for f in dataclasses.fields(config) if f.name not in ("token_dispatcher", "save")]
        return {name: _options(getattr(config, name)) for name in names}
    if isinstance(config, dict):
        return {key: _options(value) for key, value in config.items()}
    return repr(config) if callable(config) else config  # partials compare by identity


def test_a_lost_option_is_noticed() -> None:
    config = next(iter(moe_configs(stock_spec("deepseek_v3", "16B").model).values()))
    before = _options(config)
    for part, name in (
        (config, "load_balance_coeff"),
        (config.router, "route_scale"),
        (config.router, "param_init"),
    ):
        setattr(part, name, 123.0)
        assert _options(config) != before
        before = _options(config)


@pytest.mark.parametrize(
    ("ours", "theirs", "own"),
    [
        (MoE, upstream.MoE, {}),
        (RoutedExperts, upstream.RoutedExperts, {}),
        (GroupedExperts, upstream.GroupedExperts, {"save": ("all", dataclasses.MISSING)}),
        (TokenChoiceTopKRouter, upstream.TokenChoiceTopKRouter, {}),
    ],
)
def test_config_fields_are_torchtitans(ours: Any, theirs: Any, own: dict[str, Any]) -> None:
    def fields(cls: Any) -> dict[str, Any]:
        return {f.name: (f.default, f.default_factory) for f in dataclasses.fields(cls.Config)}

    assert fields(ours) == fields(theirs) | own


def layer_pair(family: str, flavor: str, fault: str = "") -> tuple[Any, Any]:
    """torchtitan's first MoE layer and ours, with the same state; `fault` changes an option of ours."""
    torch.manual_seed(0)
    configs = [stock_spec(family, flavor).model for _ in range(2)]
    swap_moe(configs[1], dispatcher="local")
    stock, ours = (next(iter(moe_configs(config).values())).build() for config in configs)
    for layer in (stock, ours):
        layer.init_states()
    if stock.expert_bias_E is not None:
        stock.expert_bias_E.copy_(torch.linspace(-0.05, 0.05, len(stock.expert_bias_E)))
    ours.load_state_dict(stock.state_dict(), strict=True)
    config = ours.router.config
    if fault == "route_scale":
        ours.router.config = dataclasses.replace(config, route_scale=config.route_scale * 1.1)
    elif fault == "score_func":
        other = "softmax" if config.score_func == "sigmoid" else "sigmoid"
        ours.router.config = dataclasses.replace(config, score_func=other)
    elif fault == "expert_bias":
        ours.expert_bias_E.copy_(ours.expert_bias_E.flip(0))
    return stock, ours


def largest_errors(stock: Any, ours: Any) -> dict[str, float]:
    """Of output, gradients and counts, relative to the largest element; fp32 weights and tokens."""
    generator = torch.Generator().manual_seed(1)
    width = ours.router.gate.weight.shape[1]
    x_BLD, grad_BLD = (torch.randn(2, 16, width, generator=generator) for _ in range(2))
    results = []
    for layer in (stock, ours):
        # GPT-OSS's experts answer in bf16 whatever they are asked in, which upstream's own combine refuses.
        layer.routed_experts.inner_experts.register_forward_hook(lambda _m, args, out: out.to(args[0].dtype))
        x = x_BLD.clone().requires_grad_()
        out = layer(x)
        out.backward(grad_BLD)
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"out": out.detach(), "x": x.grad, "counts": layer.tokens_per_expert_E, **gradients})
    stale, new = results
    assert stale.keys() == new.keys()
    return {name: float((new[name] - t).abs().max() / t.abs().max()) for name, t in stale.items()}


@pytest.mark.parametrize(("family", "flavor"), DEBUG)
class TestAgainstStock:
    def test_a_state_dict_loads_strictly(self, family: str, flavor: str) -> None:
        stock, ours = layer_pair(family, flavor)
        theirs, mine = stock.state_dict(), ours.state_dict()
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
        stock.load_state_dict(mine, strict=True)

    def test_a_layer_computes_the_same(self, family: str, flavor: str) -> None:
        """Within the bf16 to which stock casts its experts' tokens and weights."""
        errors = largest_errors(*layer_pair(family, flavor))
        assert errors.pop("counts") == 0
        assert max(errors.values()) < 0.02, errors

    @pytest.mark.parametrize("fault", ["route_scale", "score_func", "expert_bias"])
    def test_another_layer_does_not(self, family: str, flavor: str, fault: str) -> None:
        """What that bound is worth."""
        stock, ours = layer_pair(family, flavor, fault)
        errors = largest_errors(stock, ours)
        assert max(errors.values()) > 0.05, errors


def test_a_whole_model_loads_stock_weights() -> None:
    torch.manual_seed(0)
    config = stock_spec("deepseek_v3", "debugmodel").model
    stock = config.build()
    stock.init_states()
    swap_moe(config, dispatcher="local")
    ours = config.build()
    assert not list(ours.load_state_dict(stock.state_dict(), strict=True).missing_keys)
    mine = ours.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in stock.state_dict().items())


class TestBuildSpec:
    @pytest.mark.parametrize(
        ("name", "flavor"), [(name, flavor) for name in MODELS for flavor in flavors(name)]
    )
    def test_every_flavor(self, name: str, flavor: str) -> None:
        """Our layers, our parallelize, our balancer; on CPU an attention that has a backward."""
        spec = build_spec(name, flavor, dispatcher="all_to_all")
        assert spec.parallelize_fn is parallelize
        assert spec.post_optimizer_build_fn is attach_load_balancer
        assert spec.state_dict_adapter is not None
        layers = moe_configs(spec.model).values()
        assert layers
        assert all(type(moe) is MoE.Config for moe in layers)
        assert not list(spec.model.traverse(VarlenAttention.Config))
        kinds = {type(attention) for _, attention, _, _ in spec.model.traverse(FlexAttention.Config)}
        assert kinds == {PackedSDPA.Config}

    @pytest.mark.parametrize("name", MODELS)
    def test_hugging_face_checkpoints(self, name: str) -> None:
        """torchtitan's adapter gives the same names and shapes for our model as for its own, both ways."""
        family, flavor = {"qwen3_moe": ("qwen3", "debugmodel_moe")}.get(name, (name, "debugmodel"))
        names = []
        for spec in (stock_spec(family, flavor), build_spec(name, "debugmodel")):
            adapter = spec.state_dict_adapter(spec.model, None)
            exported = adapter.to_hf(on_meta(spec.model).state_dict())
            names.append((shapes(exported.items()), shapes(adapter.from_hf(exported).items())))
        assert len(names[0][0]) > 100
        assert names[0] == names[1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ("deepseek_v2", "16B"),
                r"'deepseek_v2' is not a model .*deepseek_v3, qwen3_moe\); .*'deepseek_v3'",
            ),
            (("llama", "8B"), r"'llama' is not a model \(there are: deepseek_v3, qwen3_moe\)$"),
            (
                ("deepseek_v3", "debugmodl"),
                r"'debugmodl' is not a flavor of deepseek_v3 \(there are: debugmodel, 16B, 671B\)"
                r"; did you mean 'debugmodel'\?",
            ),
            (
                ("qwen3_moe", "30B"),
                r"not a flavor of qwen3_moe \(there are: debugmodel, 30B-A3B, 235B-A22B\)",
            ),
            (("qwen3_moe", "zzz"), r"'zzz' is not a flavor .*235B-A22B\)$"),
        ],
    )
    def test_unknown_names(self, arguments: tuple[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_spec(*arguments)

    def test_flavors_of_an_unknown_family(self) -> None:
        with pytest.raises(ValueError, match=r"did you mean 'qwen3_moe'\?"):
            flavors("qwen3_mo")

    def test_unknown_dispatcher(self) -> None:
        with pytest.raises(ValueError, match=r"did you mean 'all_to_all'\?"):
            build_spec("deepseek_v3", "debugmodel", dispatcher="all2all")

    def test_specs_do_not_share_state(self) -> None:
        one = build_spec("deepseek_v3", "debugmodel", dispatcher="local")
        build_spec("deepseek_v3", "debugmodel", dispatcher="all_to_all")
        dispatchers = [moe.routed_experts.token_dispatcher for moe in moe_configs(one.model).values()]
        assert {type(dispatcher).__module__ for dispatcher in dispatchers} == {
            "titan_moe.layer.dispatch.local"
        }


# Documents per sequence: lengths that sum to L. The last: one document, one token each.
DOCUMENTS = [[3, 1, 6], [10], [1] * 10, [9, 1]]
HEADS = {
    "mha": {"q": (4, 8), "k": (4, 8), "v": (4, 8)},
    "gqa": {"q": (4, 8), "k": (2, 8), "v": (2, 8)},
    "mla": {"q": (4, 24), "k": (4, 24), "v": (4, 16)},
}


def positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS])


def attention_loop(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, scale: float) -> Tensor:
    """One sequence, document, head and query at a time."""
    num_heads, num_groups = q_BLNH.shape[2], k_BLNH.shape[2]
    rows = []
    for b, lengths in enumerate(DOCUMENTS):
        start = 0
        for length in lengths:
            for query in range(start, start + length):
                for head in range(num_heads):
                    group = head * num_groups // num_heads
                    keys_SH = k_BLNH[b, start : query + 1, group]
                    weights_S = (keys_SH @ q_BLNH[b, query, head] * scale).softmax(0)
                    rows.append(weights_S @ v_BLNH[b, start : query + 1, group])
            start += length
    return torch.stack(rows).view(*q_BLNH.shape[:3], -1)


class TestPackedSDPA:
    @pytest.mark.parametrize("scale", [None, 0.3])
    @pytest.mark.parametrize("heads", HEADS)
    def test_equals_a_loop_over_documents(self, heads: str, scale: float | None) -> None:
        inputs, grad = self._inputs(heads)
        out = self._attend(inputs, heads, scale)
        expected = attention_loop(*inputs, scale or inputs[0].shape[-1] ** -0.5)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(out, inputs, grad),
            torch.autograd.grad(expected, inputs, grad),
            rtol=1e-10,
            atol=1e-12,
        )

    @pytest.mark.parametrize("heads", HEADS)
    def test_plain_causal_attention_does_not(self, heads: str) -> None:
        inputs, _ = self._inputs(heads)
        q, k, v = (x.transpose(1, 2) for x in inputs)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads == "gqa").transpose(
            1, 2
        )
        error = (causal - attention_loop(*inputs, inputs[0].shape[-1] ** -0.5)).abs().amax((1, 2, 3))
        assert (error > 1e-3).tolist() == [True, False, True, True], "sequence 1 is one document"

    def test_other_documents_do_not_reach_in(self) -> None:
        """Queries 4..9 of sequence 0 are one document, so their gradients stay there."""
        inputs, grad = self._inputs("mla")
        grad[0, :4] = 0
        grad[1:] = 0
        gradients = torch.autograd.grad(self._attend(inputs, "mla", None), inputs, grad)
        q_reached, k_reached, v_reached = (
            {tuple(place) for place in (g.abs().amax((2, 3)) > 0).nonzero().tolist()} for g in gradients
        )
        document = {(0, token) for token in range(4, 10)}
        assert k_reached == v_reached == document
        assert q_reached == document - {(0, 4)}, "its first token has one key, so its query does not matter"

    def _inputs(self, heads: str) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(0)
        size = (len(DOCUMENTS), 10)

        def draw(shape: tuple[int, int]) -> Tensor:
            return torch.randn(*size, *shape, generator=generator, dtype=torch.float64)

        inputs = [draw(shape).requires_grad_() for shape in HEADS[heads].values()]
        return inputs, draw((HEADS[heads]["q"][0], HEADS[heads]["v"][1]))

    def _attend(self, inputs: list[Tensor], heads: str, scale: float | None) -> Tensor:
        rule = and_masks(get_causal_mask_mod(), get_document_mask_mod(positions()))
        mask = create_block_mask(rule, len(DOCUMENTS), None, 10, 10, device="cpu")
        attention: Any = PackedSDPA.Config().build()
        return attention(*inputs, attention_masks=mask, scale=scale, enable_gqa=heads == "gqa")


class TestSwapAttention:
    @pytest.mark.parametrize("module", [attention, context_parallel])
    def test_the_mask_is_not_compiled(self, module: Any) -> None:
        """That takes longer than a run on CPU; under another name it would come back."""
        swap_attention(stock_spec("deepseek_v3", "debugmodel").model)
        assert module._compiled_create_block_mask is create_block_mask
        assert "_compiled_create_block_mask" in inspect.getsource(module)

    @pytest.mark.parametrize("backend", ["flex", "varlen"])
    def test_replaces_all(self, backend: str) -> None:
        config = stock_spec("deepseek_v3", "debugmodel", attn_backend=backend).model
        swap_attention(config)
        model = on_meta(config)
        attentions = [m for n, m in model.named_modules() if n.endswith("inner_attention")]
        assert len(attentions) == 6
        assert {type(attention) for attention in attentions} == {PackedSDPA}

    def test_only_on_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("titan_moe.models.attention.device_type", "cuda")
        spec = swap_spec(stock_spec("deepseek_v3", "debugmodel"), dispatcher="local", dispatcher_options={})
        assert not [a for _, a, _, _ in spec.model.traverse(PackedSDPA.Config)]
        assert list(spec.model.traverse(FlexAttention.Config))
