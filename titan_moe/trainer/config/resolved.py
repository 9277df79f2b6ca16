"""Dataclasses back into the file format: every key, as it is in force."""

import dataclasses
from pathlib import Path
from typing import Any

from torchtitan.trainer import Trainer

from titan_moe.layer.dispatch.base import TokenDispatcher
from titan_moe.trainer.config.build import TypedConfig, moe_layers
from titan_moe.trainer.config.sections import ALTERNATIVES, OptimizerSection, keys_of


def resolve(plan: TypedConfig) -> dict[str, Any]:
    """The nested dict that, written as TOML and loaded again, gives the same one.

    None, which TOML lacks, is the string ``"none"``.
    """
    resolved = {"model": _value("model", plan.model), "moe": _moe(plan)}
    resolved["routing_replay"] = _value("routing_replay", plan.routing_replay)
    resolved["numerics"] = _value("numerics", plan.numerics)
    for name in keys_of(Trainer.Config):
        value = getattr(plan.trainer, name)
        resolved[name] = _value(name, OptimizerSection.of(value) if name == "optimizer" else value)
    one_group = not resolved["optimizer"]["param_groups"]
    for key in ("param_groups",) if one_group else OptimizerSection.short_keys():
        del resolved["optimizer"][key]
    return resolved


def _moe(plan: TypedConfig) -> dict[str, Any]:
    table = {"dispatcher": plan.moe.dispatcher, "save": plan.moe.save}
    for _, layer in moe_layers(plan.spec):
        table["load_balance_coeff"] = _value("", layer.load_balance_coeff)
        backend = _value("", layer.routed_experts.token_dispatcher)
        own = {key: value for key, value in backend.items() if key not in keys_of(TokenDispatcher.Config)}
        return table | ({plan.moe.dispatcher: own} if own else {})
    return table


def _value(path: str, value: Any) -> Any:
    if path in ALTERNATIVES:
        choice = ALTERNATIVES[path]
        return {choice.key: choice.name_of(value), **({} if value is None else _table(path, value))}
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return _table(path, value)
    if isinstance(value, (list, tuple)):
        return [_value("", item) for item in value]
    if isinstance(value, dict):
        return {key: _value("", item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _table(path: str, config: Any) -> dict[str, Any]:
    return {key: _value(f"{path}.{key}", getattr(config, key)) for key in keys_of(type(config))}
