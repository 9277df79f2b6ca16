"""What the user wrote, strictly into dataclasses: every key known, every value of its type."""

import dataclasses
from dataclasses import MISSING, dataclass
from functools import partial
from typing import Any, Literal, NoReturn, cast, get_args, get_origin

from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models.common import moe as upstream
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from titan_moe import models
from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.base import TokenDispatcher
from titan_moe.numerics.section import Numerics
from titan_moe.parallel.parallelize import parallelize
from titan_moe.replay.section import RoutingReplay
from titan_moe.trainer.config import explain
from titan_moe.trainer.config.coerce import Mismatch, coerce, literal
from titan_moe.trainer.config.errors import ConfigError, nearest
from titan_moe.trainer.config.sections import (
    ALTERNATIVES,
    OUR_DEFAULTS,
    ModelSection,
    MoESection,
    OptimizerSection,
    Root,
    keys_of,
    silent,
)
from titan_moe.trainer.config.toml import COMMAND_LINE, Given, Settings, Text, leaves


@dataclass(frozen=True, kw_only=True)
class TypedConfig:
    """A file as dataclasses: torchtitan's, with ``model_spec`` set, and our sections."""

    trainer: Trainer.Config
    model: ModelSection
    moe: MoESection
    routing_replay: RoutingReplay
    numerics: Numerics

    @property
    def spec(self) -> ModelSpec:
        """The model, never None here."""
        return cast(ModelSpec, self.trainer.model_spec)


def moe_layers(spec: ModelSpec) -> list[tuple[str, upstream.MoE.Config]]:
    """(name, config) of every MoE layer of a model, ours or torchtitan's."""
    layers: Any = spec.model.traverse(upstream.MoE.Config)
    return [(fqn, config) for fqn, config, _, _ in layers]


def build(settings: Settings) -> TypedConfig:
    """``settings`` typed and complete. Rules across sections come after (``rules.check``).

    Raises:
        ConfigError: the first key that does not fit, or what torchtitan's own dataclasses refuse.
    """
    with silent():
        return _Builder(settings).build()


class _Builder:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def build(self) -> TypedConfig:
        values = dict(self.settings.values)
        moe_table = values.get("moe", {})
        backends = {}
        if isinstance(moe_table, dict):
            backends = {name: table for name, table in moe_table.items() if name in dispatch.DISPATCHERS}
            values["moe"] = {name: value for name, value in moe_table.items() if name not in backends}
        kwargs = self._kwargs("", values, Root)
        model, moe, replay = (kwargs.pop(name) for name in ("model", "moe", "routing_replay"))
        numerics = kwargs.pop("numerics")
        kwargs["optimizer"] = self._optimizer(kwargs["optimizer"])
        spec = self._spec(model, moe, backends)
        if not replay.recompute_pin and replay.mode == "off" and model.moe == "titan_moe":
            spec.parallelize_fn = partial(parallelize, recompute_pin=False)
        trainer = self._construct("", Trainer.Config, None, kwargs | {"model_spec": spec})
        return TypedConfig(trainer=trainer, model=model, moe=moe, routing_replay=replay, numerics=numerics)

    def _spec(self, model: ModelSection, moe: MoESection, backends: dict[str, Any]) -> ModelSpec:
        options = {}
        for name in {**backends, moe.dispatcher: None}:
            chosen = self._backend_options(name, backends.get(name, {}))
            options = chosen if name == moe.dispatcher else options
        try:
            flavors = models.flavors(model.name)
        except ValueError as error:
            self._fail("model.name", str(error))
        if model.flavor not in flavors:
            there = f"there are: {', '.join(flavors)}"
            close = nearest(model.flavor, flavors)
            self._fail("model.flavor", f"{model.flavor!r} is not a flavor of {model.name} ({there}){close}")
        if model.norm_eps is not None and not 0 < model.norm_eps < 1:
            self._fail("model.norm_eps", f"({model.norm_eps}) must be between 0 and 1")
        try:
            spec = models.build_spec(
                model.name,
                model.flavor,
                dispatcher=moe.dispatcher,
                dispatcher_options=options,
                save=moe.save,
                norm_eps=model.norm_eps,
                stock=model.moe == "torchtitan",
            )
        except (ValueError, TypeError) as error:
            self._fail("model", f"{model.name}/{model.flavor} with dispatcher {moe.dispatcher!r}: {error}")
        if moe.load_balance_coeff is not None:
            coeff = None if moe.load_balance_coeff == "none" else moe.load_balance_coeff
            if coeff is not None and not 0 < coeff < float("inf"):
                self._fail(
                    "moe.load_balance_coeff", f"({coeff}) must be a positive number, or 'none' for no bias"
                )
            for _, layer in moe_layers(spec):
                layer.load_balance_coeff = coeff
        return spec

    def _backend_options(self, name: str, table: Any) -> dict[str, Any]:
        """The keys of ``[moe.<name>]``: the fields of that backend's Config that are its own."""
        try:
            config_class = dispatch.load(name).Config
        except (ValueError, ImportError) as error:
            self._fail("moe.dispatcher", str(error))
        models_own = set(keys_of(TokenDispatcher.Config))
        return self._kwargs(f"moe.{name}", table, config_class, hidden=models_own)

    def _optimizer(self, section: OptimizerSection) -> OptimizersContainer.Config:
        short = [key for key in OptimizerSection.short_keys() if key in self.settings.table("optimizer")]
        if section.param_groups and short:
            self._fail(
                f"optimizer.{short[0]}",
                "and optimizer.param_groups exclude each other; put it into the optimizer_kwargs of a group",
            )
        kwargs = {f.name: getattr(section, f.name) for f in dataclasses.fields(OptimizersContainer.Config)}
        return OptimizersContainer.Config(**kwargs | {"param_groups": section.groups()})

    def _table(self, path: str, table: Any, default: Any) -> Any:
        """The dataclass that ``[path]`` stands for. ``default``: an instance, or a class without one."""
        if isinstance(table, Given):
            self._fail(path, "is a table; set one of its keys", table)
        extra = {}
        cls = default if isinstance(default, type) else type(default)
        if path in ALTERNATIVES:
            choice = ALTERNATIVES[path]
            name = self._option(path, table)
            table = {key: value for key, value in table.items() if key != choice.key}
            cls = choice.options[name]
            if cls is None:
                for key, _ in leaves(table):
                    self._unknown(path, key.split(".")[0], (), table)
                return None
            if choice.key in (f.name for f in dataclasses.fields(cls)):
                extra = {choice.key: name}
        base = default if type(default) is cls else None
        return self._construct(path, cls, base, self._kwargs(path, table, cls, hidden=set(extra)) | extra)

    def _option(self, path: str, table: dict[str, Any]) -> str:
        choice = ALTERNATIVES[path]
        given = table.get(choice.key)
        if given is not None:
            one_of: Any = Literal
            return self._value(f"{path}.{choice.key}", given, one_of[tuple(choice.options)])
        ours = OUR_DEFAULTS.get(f"{path}.{choice.key}")
        return ours.value(self.settings.config_file) if ours else choice.name_of(keys_of(Root)[path].default)

    def _kwargs(
        self, path: str, table: Any, cls: type, *, hidden: set[str] | frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Keyword arguments for ``cls``: what was given, what is nested, and our defaults."""
        if isinstance(table, Given):
            self._fail(path, "is a table; set one of its keys", table)
        keys = {name: key for name, key in keys_of(cls).items() if name not in hidden}
        for name in table:
            if name not in keys:
                self._unknown(path, name, keys, table)
        kwargs = {}
        for name, key in keys.items():
            inner = f"{path}.{name}" if path else name
            nested = key.hint if dataclasses.is_dataclass(key.hint) else None
            if inner in ALTERNATIVES or dataclasses.is_dataclass(key.default) or nested:
                default = nested if key.default is MISSING else key.default
                kwargs[name] = self._table(inner, table.get(name, {}), default)
            elif name in table:
                kwargs[name] = self._value(inner, table[name], key.hint)
            elif inner in OUR_DEFAULTS:
                kwargs[name] = OUR_DEFAULTS[inner].value(self.settings.config_file)
            elif key.default is MISSING:
                self._fail(inner, f"is not set; {self._required(inner)}")
        return kwargs

    def _required(self, path: str) -> str:
        there = ", ".join(models.MODELS) if path == "model.name" else "see docs/config.md"
        return f"it has no default ({there})"

    def _value(self, path: str, given: Given | dict[str, Any], hint: Any) -> Any:
        value = _plain(given)
        leaf = given if isinstance(given, Given) else next((leaf for _, leaf in leaves(given)), None)
        if isinstance(given, Given) and given.flag and hint is not bool:
            try:
                coerce(value, hint)
            except Mismatch as error:
                self._fail(path, f"needs a value: {error}", leaf)
        element: Any = (get_args(hint) or (None,))[0]
        try:
            if get_origin(hint) is list and dataclasses.is_dataclass(element):
                return self._list_of_tables(path, value, element, leaf)
            return coerce(value, hint)
        except Mismatch as error:
            self._fail(path, f"must be {error}, not {explain.shown(value)}{error.hint}", leaf)

    def _list_of_tables(self, path: str, value: Any, element: type, leaf: Given | None) -> list[Any]:
        value = literal(value) if isinstance(value, Text) else value
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise Mismatch("a list of tables")
        origin = leaf.origin if leaf else str(self.settings.config_file)
        return [
            self._table(f"{path}[{i}]", {k: Given(value=v, origin=origin) for k, v in item.items()}, element)
            for i, item in enumerate(value)
        ]

    def _construct(self, path: str, cls: type, base: Any, kwargs: dict[str, Any]) -> Any:
        try:
            return dataclasses.replace(base, **kwargs) if base is not None else cls(**kwargs)
        except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
            where = f"[{path}]: " if path and not str(error).startswith(path) else ""
            guilty = explain.guilty_keys(self.settings, path, str(error))
            said = ", ".join(f"{key} = {explain.written(leaf.value)}" for key, leaf in guilty.items())
            typed = any(leaf.origin == COMMAND_LINE for leaf in guilty.values())
            origin = COMMAND_LINE if typed else self.settings.config_file
            prose = str(error).rstrip(". ")
            raise ConfigError(f"{origin}: {where}{prose}{f' (you set {said})' if said else ''}") from error

    def _unknown(self, path: str, name: str, known: Any, table: dict[str, Any]) -> NoReturn:
        leaf = next((leaf for key, leaf in leaves(table) if key.split(".")[0] == name), None)
        if not path:
            self._fail(name, explain.unknown_at_top(name, table[name], known), leaf)
        inner, variant = f"{path}.{name}", ""
        if path in ALTERNATIVES:
            variant = f" with {ALTERNATIVES[path].key} = {self._option(path, self.settings.table(path))!r}"
        if path == "moe" and isinstance(table[name], dict):
            there = ", ".join(dispatch.DISPATCHERS)
            close = nearest(name, dispatch.DISPATCHERS)
            self._fail(inner, f"is not a dispatcher (there are: {there}){close}", leaf)
        hint = explain.key_hint(path, name, known)
        self._fail(inner, f"is not a key of [{path}]{variant}{hint}", leaf)

    def _fail(self, path: str, what: str, leaf: Given | None = None) -> NoReturn:
        message = f"{path} {what}"
        raise ConfigError(f"{leaf.origin if leaf else self.settings.blame(message)}: {message}")


def _plain(given: Given | dict[str, Any]) -> Any:
    if isinstance(given, Given):
        return given.value
    return {key: _plain(value) for key, value in given.items()}
