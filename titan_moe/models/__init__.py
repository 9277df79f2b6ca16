"""Model families by name: torchtitan's own models with our MoE layer in them."""

import difflib
import importlib
from typing import Any

from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.protocols.model_spec import ModelSpec

from titan_moe.layer.experts import Save
from titan_moe.models.hugging_face.adapter import for_hugging_face
from titan_moe.models.stock import keep_spec
from titan_moe.models.swap import swap_spec

# Lazy strings: listing the families must not import them.
MODELS: dict[str, str] = {
    "deepseek_v3": "titan_moe.models.deepseek_v3",
    "qwen3_moe": "titan_moe.models.qwen3_moe",
}


def flavors(name: str) -> list[str]:
    """The sizes of family ``name``. Raises ValueError for an unknown family."""
    return list(_family(name).FLAVORS)


def build_spec(
    name: str,
    flavor: str,
    *,
    dispatcher: str = "local",
    dispatcher_options: dict[str, Any] | None = None,
    save: Save = "all",
    norm_eps: float | None = None,
    stock: bool = False,
) -> ModelSpec:
    """A torchtitan ModelSpec of ``name``/``flavor`` with our MoE layer, sharding and load balancer.

    Args:
        dispatcher: a name in ``titan_moe.layer.dispatch.DISPATCHERS``.
        dispatcher_options: fields of that backend's Config beyond num_experts and top_k.
        save: what the experts keep for backward; see ``titan_moe.layer.experts``.
        norm_eps: of every RMSNorm; None: torchtitan's own, which for DeepSeek is not Hugging Face's.
        stock: torchtitan's own MoE layer stays, and its dispatcher; for comparisons.

    Raises:
        ValueError: unknown family, flavor or dispatcher; the message lists what there is.
    """
    family = _family(name)
    if flavor not in family.FLAVORS:
        there = ", ".join(family.FLAVORS)
        near = _near(flavor, family.FLAVORS)
        raise ValueError(f"{flavor!r} is not a flavor of {name} (there are: {there}){near}")
    spec = for_hugging_face(family.upstream_spec(family.FLAVORS[flavor]))
    if norm_eps is not None:
        set_norm_eps(spec, norm_eps)
    if stock:
        return keep_spec(spec)
    return swap_spec(spec, dispatcher=dispatcher, dispatcher_options=dispatcher_options or {}, save=save)


def set_norm_eps(spec: ModelSpec, eps: float) -> None:
    """Of every RMSNorm, in place."""
    norms: Any = spec.model.traverse(RMSNorm.Config)
    for _, norm, _, _ in norms:
        norm.eps = eps


def _family(name: str) -> Any:
    if name not in MODELS:
        raise ValueError(f"{name!r} is not a model (there are: {', '.join(MODELS)}){_near(name, MODELS)}")
    return importlib.import_module(MODELS[name])


def _near(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
