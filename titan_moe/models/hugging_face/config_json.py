"""A model as Hugging Face's config.json: what transformers must be told to compute what ours computes."""

import math
from collections.abc import Iterable
from typing import Any

from torchtitan.models.common import ComplexRoPE, CosSinRoPE, RoPE
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.linear import Linear
from torchtitan.models.deepseek_v3.model import Attention as LatentAttention

# transformers' DeepSeek builds kv_a_layernorm and q_a_layernorm without reading rms_norm_eps.
LATENT_NORM_EPS = 1e-6

# What transformers takes where config.json has no such key.
_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": None,
    "tie_word_embeddings": False,
    "topk_method": None,
    "use_sliding_window": False,
}
# Keys that say nothing about what a model computes, or that have a rule of their own.
_NOT_COMPARED = (
    "architectures",
    "initializer_range",
    "max_position_embeddings",
    "num_nextn_predict_layers",
    "use_cache",
)


class HuggingFaceError(ValueError):
    """What cannot be converted, in one line: the place, both values, the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def hf_config(model: Decoder.Config) -> dict[str, Any]:
    """``model`` as the keys of a config.json, in the form that transformers 4 and 5 and vLLM read.

    Raises:
        HuggingFaceError: ``model`` computes something that no config.json can say.
    """
    attention = model.layers[0].attention
    if not any(layer.moe is not None for layer in model.layers):
        raise HuggingFaceError("the model has no MoE layer; torchtitan's own adapters convert dense models")
    linears: Any = model.traverse(Linear.Config)
    for fqn, linear, _, _ in linears:
        if linear.bias:
            raise HuggingFaceError(f"{fqn} has a bias, which has no name in Hugging Face's format")
    if isinstance(attention, LatentAttention.Config):
        return _common(model) | _deepseek(model)
    if isinstance(attention, GQAttention.Config):
        return _common(model) | _qwen3_moe(model)
    raise HuggingFaceError(f"{type(attention).__qualname__} is the attention of neither DeepSeek nor Qwen3")


def difference(model: Decoder.Config, given: dict[str, Any]) -> str:
    """Where the folder's config.json, ``given``, says another computation than ``model``; "" if nowhere.

    Raises:
        HuggingFaceError: as ``hf_config``.
    """
    ours, theirs = _normal(hf_config(model)), _normal(given)
    if all(layer.moe is not None for layer in model.layers):
        ours.pop("intermediate_size")
    for key, mine in ours.items():
        if key in ("scoring_func", "topk_method") and theirs.get(key) is None:
            continue  # transformers writes neither for DeepSeek-V3
        if key not in theirs:
            return f"config.json has no {key}, and the model's is {mine}"
        if theirs[key] != mine:
            return f"{key} is {theirs[key]} in config.json and {mine} in the model"
    return ""


def routes_by_bias(model: Decoder.Config) -> bool:
    """Whether the Hugging Face model has an expert bias: of the three, DeepSeek-V3 does."""
    layers = [layer.moe for layer in model.layers if layer.moe is not None]
    return isinstance(model.layers[0].attention, LatentAttention.Config) and all(
        moe.router.score_func == "sigmoid" for moe in layers
    )


def has_expert_bias(model: Decoder.Config) -> bool:
    """Whether ours has one."""
    return any(layer.moe is not None and layer.moe.load_balance_coeff is not None for layer in model.layers)


def _common(model: Decoder.Config) -> dict[str, Any]:
    moe = [layer.moe for layer in model.layers if layer.moe is not None]
    dense = [layer.feed_forward for layer in model.layers if layer.moe is None]
    norms = [model.norm] + [n for layer in model.layers for n in (layer.attention_norm, layer.ffn_norm)]
    hidden = _one("the experts' hidden_dim", (m.routed_experts.inner_experts.hidden_dim for m in moe))
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": len(model.layers),
        "intermediate_size": _one("the hidden size", [f.w1.out_features for f in dense]) if dense else hidden,
        "moe_intermediate_size": hidden,
        "num_experts_per_tok": _one("top_k", (m.router.top_k for m in moe)),
        "norm_topk_prob": _one("route_norm", (m.router.route_norm for m in moe)),
        "num_attention_heads": _one("n_heads", (layer.attention.n_heads for layer in model.layers)),
        "rms_norm_eps": _one("the norms' eps", (norm.eps for norm in norms)),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": model.enable_weight_tying,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _deepseek(model: Decoder.Config) -> dict[str, Any]:
    """DeepSeek-V3; DeepSeek-V2 where the router is a plain softmax."""
    moe = [layer.moe for layer in model.layers if layer.moe is not None]
    attention: list[Any] = [layer.attention for layer in model.layers]
    first = next(i for i, layer in enumerate(model.layers) if layer.moe is not None)
    if any(layer.moe is None for layer in model.layers[first:]):
        raise HuggingFaceError("a dense layer after a MoE layer: DeepSeek has all dense layers first")
    for norm in [n for a in attention for n in (a.kv_norm, *([a.q_norm] if a.q_lora_rank else []))]:
        if norm.eps != LATENT_NORM_EPS:
            raise HuggingFaceError(
                f"kv_norm.eps or q_norm.eps ({norm.eps}): transformers fixes both at {LATENT_NORM_EPS}; set "
                f"model.norm_eps = {LATENT_NORM_EPS}"
            )
    shared = _one("the shared experts' hidden size", (_width(m.shared_experts) for m in moe))
    hidden = _one("the experts' hidden_dim", (m.routed_experts.inner_experts.hidden_dim for m in moe))
    if not shared or shared % hidden:
        raise HuggingFaceError(f"shared experts of {shared} hidden units are not n times {hidden}, n >= 1")
    heads = _one("n_heads", (a.n_heads for a in attention))
    mscale = _one("mscale", (a.mscale for a in attention))
    config: dict[str, Any] = {
        name: _one(name, (getattr(a, name) for a in attention))
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    }
    return config | {
        "q_lora_rank": _one("q_lora_rank", (a.q_lora_rank for a in attention)) or None,  # 0 would be a matrix
        "num_key_value_heads": heads,
        "n_routed_experts": _one("num_experts", (m.num_experts for m in moe)),
        "n_shared_experts": shared // hidden,
        "routed_scaling_factor": _one("route_scale", (m.router.route_scale for m in moe)),
        "first_k_dense_replace": first,
        "moe_layer_freq": 1,
        **_rope(attention, ComplexRoPE.Config, mscale),
        **_deepseek_router(moe),
        "num_nextn_predict_layers": len(getattr(model, "mtp_layers", [])),
    }


def _deepseek_router(moe: list[Any]) -> dict[str, Any]:
    score_func = _one("score_func", (m.router.score_func for m in moe))
    groups = _one("num_expert_groups", (m.router.num_expert_groups for m in moe))
    limited = _one("num_limited_groups", (m.router.num_limited_groups for m in moe))
    if score_func == "sigmoid":
        return {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "n_group": groups or 1,
            "topk_group": limited if groups else 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",  # vLLM makes room for the expert bias only then
            "rope_interleave": True,
        }
    if groups or _one("route_norm", (m.router.route_norm for m in moe)):
        raise HuggingFaceError(
            "a softmax router with expert groups or route_norm: transformers' DeepSeek-V3 is sigmoid only, "
            "and its DeepSeek-V2 neither normalises nor ranks groups by the sum of two"
        )
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "scoring_func": "softmax",
        "topk_method": "greedy",
    }


def _qwen3_moe(model: Decoder.Config) -> dict[str, Any]:
    moe = [layer.moe for layer in model.layers if layer.moe is not None]
    attention: list[Any] = [layer.attention for layer in model.layers]
    for layer in moe:
        router = layer.router
        found = (router.score_func, router.num_expert_groups, router.route_scale, layer.shared_experts)
        if found != ("softmax", None, 1.0, None):
            raise HuggingFaceError(
                "Qwen3-MoE has a softmax router without expert groups or route_scale, and no shared experts"
            )
    for norm in (a.qk_norm for a in attention):
        if norm is None or norm.eps != model.norm.eps:
            raise HuggingFaceError("Qwen3-MoE normalises q and k per head, with the eps of all its norms")
    heads = _one("n_heads", (a.n_heads for a in attention))
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": _one("n_kv_heads", (a.n_kv_heads or heads for a in attention)),
        "head_dim": _one("head_dim", (a.head_dim or model.dim // heads for a in attention)),
        "num_experts": _one("num_experts", (m.num_experts for m in moe)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(model.layers) if layer.moe is None],
        "use_sliding_window": False,
        **_rope(attention, CosSinRoPE.Config, None),
    }


def _rope(attention: list[Any], kind: type[RoPE.Config], mscale: float | None) -> dict[str, Any]:
    """``mscale`` of the softmax scale (DeepSeek); None: yarn leaves it alone, as torchtitan's Qwen3 does."""
    if any(not isinstance(a.rope, kind) for a in attention):
        raise HuggingFaceError(f"rope is not a {kind.__qualname__}, and Hugging Face's weights suppose one")
    names = ("theta", "scaling", "rope_factor", "beta_fast", "beta_slow", "original_seq_len", "truncate")
    theta, scaling, factor, fast, slow, original, truncate = (
        _one(f"rope.{name}", (getattr(a.rope, name) for a in attention)) for name in names
    )
    length = _one("rope.max_seq_len", (a.rope.max_seq_len for a in attention))
    if scaling == "none" or (scaling == "yarn" and factor <= 1):
        return {"max_position_embeddings": length, "rope_theta": theta, "rope_scaling": None}
    if scaling != "yarn":
        raise HuggingFaceError(f"rope.scaling ({scaling!r}) may be 'none' or 'yarn'")
    if mscale == 0:
        raise HuggingFaceError("mscale (0) with yarn: transformers takes a zero for 'not given'; use another")
    # mscale over mscale_all_dim would scale cos and sin, which torchtitan never does.
    factors = {"attention_factor": 1.0} if mscale is None else {"mscale": mscale, "mscale_all_dim": mscale}
    yarn = {"type": "yarn", "rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow}
    yarn |= {"original_max_position_embeddings": original, **factors} | (
        {} if truncate else {"truncate": False}
    )
    return {"max_position_embeddings": round(original * factor), "rope_theta": theta, "rope_scaling": yarn}


def _normal(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without what is not compared, with defaults; rope and dense layers in one spelling."""
    keys = _DEFAULTS | {
        key: value for key, value in config.items() if value is not None or key == "q_lora_rank"
    }
    if "num_local_experts" in keys:  # transformers 5 writes Qwen3-MoE's number under this name
        keys["num_experts"] = keys.pop("num_local_experts")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    for key in ("rope_parameters", "rope_scaling", *_NOT_COMPARED):
        keys.pop(key, None)
    keys |= {
        "rope_theta": scaling.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_scaling.type": kind,
    }
    keys |= _scaling(scaling) if kind != "default" else {}
    step = keys.pop("decoder_sparse_step")
    layers = range(config.get("num_hidden_layers", 0))
    keys["mlp_only_layers"] = [i for i in layers if i in keys["mlp_only_layers"] or (i + 1) % step]
    if keys.get("model_type") == "deepseek_v2":
        keys.pop("norm_topk_prob", None)  # transformers reads it and does nothing
    return keys


def _scaling(scaling: dict[str, Any]) -> dict[str, Any]:
    factor, all_dim = scaling.get("factor"), scaling.get("mscale_all_dim") or 0

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor and factor > 1 else 1.0

    by_default = magnitude(1)
    if scaling.get("mscale") and all_dim:
        by_default = magnitude(scaling["mscale"]) / magnitude(all_dim)
    found = {
        "factor": factor,
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings"),
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
        "mscale_all_dim": all_dim,
        "attention_factor": scaling.get("attention_factor") or by_default,
        "truncate": scaling.get("truncate", True),
    }
    return {f"rope_scaling.{key}": value for key, value in found.items()}


def _width(shared: Any) -> int:
    return shared.w1.out_features if shared is not None else 0


def _one(what: str, values: Iterable[Any]) -> Any:
    """The value that all layers share."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise HuggingFaceError(f"{what} is not the same in all layers: {found[0]} and {found[1]}")
    return found[0]
