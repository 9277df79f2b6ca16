"""Puts our MoE layer into any torchtitan 0.3.0 model config."""

import dataclasses
from typing import Any

from torchtitan.models.common import moe as upstream
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec

from titan_moe.layer import dispatch
from titan_moe.layer.experts import GroupedExperts, Save
from titan_moe.layer.load_balance import attach_load_balancer
from titan_moe.layer.moe import MoE, RoutedExperts
from titan_moe.layer.router import TokenChoiceTopKRouter
from titan_moe.models.attention import swap_attention
from titan_moe.parallel.parallelize import parallelize


def swap_spec(
    spec: ModelSpec, *, dispatcher: str, dispatcher_options: dict[str, Any], save: Save = "all"
) -> ModelSpec:
    """``spec`` with our layers, parallelize and load balancer; ``spec.model`` is changed in place."""
    swap_moe(spec.model, dispatcher=dispatcher, dispatcher_options=dispatcher_options, save=save)
    swap_attention(spec.model)
    return dataclasses.replace(spec, parallelize_fn=parallelize, post_optimizer_build_fn=attach_load_balancer)


def swap_moe(
    model: BaseModel.Config,
    *,
    dispatcher: str,
    dispatcher_options: dict[str, Any] | None = None,
    save: Save = "all",
) -> int:
    """Replaces every MoE layer in ``model``, in place, MTP blocks included. Names of parameters stay.

    Experts of another kind than torchtitan's GroupedExperts (GPT-OSS) are kept: they take our call.

    Returns:
        How many layers were replaced.

    Raises:
        ValueError: a MoE layer, router or routed experts with a forward of its own, which a swap would
            silently drop; an unknown ``dispatcher``; or ``save`` for experts of another kind. The model is
            unchanged then.
    """
    found: list[Any] = list(model.traverse(upstream.MoE.Config))
    options = dispatcher_options or {}
    swapped = [
        swap_layer(fqn, config, dispatcher=dispatcher, save=save, **options) for fqn, config, _, _ in found
    ]
    for layer, (_, _, parent, attr) in zip(swapped, found, strict=True):
        setattr(parent, attr, layer)
    return len(found)


def swap_layer(
    name: str, config: upstream.MoE.Config, *, dispatcher: str, save: Save = "all", **options: Any
) -> MoE.Config:
    """``config`` as ours; see ``swap_moe``. ``options`` are the dispatcher's."""
    dispatcher_config = dispatch.load(dispatcher).Config
    _refuse_own_forward(name, config)
    routed = config.routed_experts
    token_dispatcher = dispatcher_config(num_experts=config.num_experts, top_k=config.router.top_k, **options)
    return _derive(
        MoE.Config,
        config,
        router=_derive(TokenChoiceTopKRouter.Config, config.router),
        routed_experts=_derive(
            RoutedExperts.Config,
            routed,
            inner_experts=_swap_experts(name, routed.inner_experts, save),
            token_dispatcher=token_dispatcher,
        ),
    )


def _refuse_own_forward(fqn: str, config: Any) -> None:
    """The layer and its parts must compute what torchtitan's do, or what ours do."""
    parts = {
        fqn: (config, upstream.MoE, MoE),
        f"{fqn}.router": (config.router, upstream.TokenChoiceTopKRouter, TokenChoiceTopKRouter),
        f"{fqn}.routed_experts": (config.routed_experts, upstream.RoutedExperts, RoutedExperts),
    }
    for name, (part, theirs, ours) in parts.items():
        if part._owner.forward not in (theirs.forward, ours.forward):
            raise ValueError(
                f"{name}: {part._owner.__name__} computes more than torchtitan's {theirs.__name__} "
                "and cannot be swapped"
            )


def _swap_experts(
    fqn: str, config: upstream.GroupedExperts.Config, save: Save
) -> upstream.GroupedExperts.Config:
    if type(config) is upstream.GroupedExperts.Config:
        return _derive(GroupedExperts.Config, config, save=save)
    if save != "all":
        raise ValueError(
            f"moe.save {save!r}: {fqn} has experts of its own kind ({type(config).__qualname__}); use 'all'"
        )
    return config


def _derive(config_class: type, config: Any, **changes: Any) -> Any:
    """``config``'s fields as a ``config_class``, which has the same ones."""
    return config_class(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | changes)
