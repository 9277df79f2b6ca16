"""The table: which sections there are, what their variants are called, which defaults are ours.

Keys, types and defaults are read from torchtitan's dataclasses and never restated here.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig, default_adamw
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.tools.utils import device_type
from torchtitan.trainer import Trainer

from titan_moe.layer.experts import Save
from titan_moe.numerics.section import Numerics
from titan_moe.replay.section import RoutingReplay
from titan_moe.trainer.checkpoint import CheckpointManager
from titan_moe.trainer.data import TOKENIZER_DIR, TextDataLoader


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """A section whose keys depend on one of them.

    Attributes:
        key: the deciding key, ``mode`` in ``[activation_checkpoint]``.
        options: its values and the dataclass each stands for; None has no keys.
    """

    key: str
    options: dict[str, type | None]

    def name_of(self, config: Any) -> str:
        """The option that ``config`` (an instance, or None) is."""
        if self.key in _field_names(config):
            return getattr(config, self.key)
        return next(name for name, cls in self.options.items() if cls is (config and type(config)))


_DATALOADER = Alternatives(
    key="source",
    options={
        "stdlib": TextDataLoader.Config,
        "files": TextDataLoader.Config,
        "huggingface": HuggingFaceTextDataLoader.Config,
    },
)

# Not offered: MSELoss, BaseLoss (not language modelling); dataloaders that need a Python callable;
# torch_checkpointing's manager (torchtitan 0.3.0 ships it without load and save).
ALTERNATIVES: dict[str, Alternatives] = {
    "activation_checkpoint": Alternatives(
        key="mode",
        options={
            "none": None,
            "selective": SelectiveAC.Config,
            "full": FullAC.Config,
            "memory_budget": MemoryBudgetAC.Config,
        },
    ),
    "dataloader": _DATALOADER,
    "validator.dataloader": _DATALOADER,
    "loss": Alternatives(
        key="name",
        options={
            "cross_entropy": CrossEntropyLoss.Config,
            "chunked_cross_entropy": ChunkedLossWrapper.Config,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class OurDefault:
    """A default that is not torchtitan's.

    Attributes:
        value: from the config file's path.
        shown: the value in the words of the documentation.
        reason: why torchtitan's own does not do.
    """

    value: Callable[[Path], Any]
    shown: str
    reason: str


def _always(value: Any, reason: str) -> OurDefault:
    return OurDefault(value=lambda _: value, shown=str(value).lower(), reason=reason)


OUR_DEFAULTS: dict[str, OurDefault] = {
    "dump_folder": OurDefault(
        value=lambda config_file: f"./outputs/{config_file.stem}",
        shown="./outputs/<config file name>",
        reason="two configs never write over each other's checkpoints",
    ),
    "hf_assets_path": OurDefault(
        value=lambda _: str(TOKENIZER_DIR),
        shown="the shipped 2,048-entry tokenizer",
        reason="torchtitan's is a folder of its own repository",
    ),
    "dataloader.source": _always("stdlib", "torchtitan has no default; this one needs no network"),
    "validator.dataloader.source": _always("stdlib", "torchtitan's default downloads C4"),
    "loss.name": _always(
        "cross_entropy", "torchtitan has no default; the chunked one wants a seq_len its chunks divide"
    ),
    "checkpoint.last_save_model_only": _always(False, "a finished run can be continued"),
    "optimizer.implementation": OurDefault(
        value=lambda _: "fused" if device_type == "cuda" else "foreach",
        shown="fused on CUDA, else foreach",
        reason="torchtitan's 'fused' is meant for CUDA",
    ),
    "parallelism.spmd_backend": _always(
        "partial_dtensor", "our MoE owns the border between DTensor and local tokens; the others are refused"
    ),
    "training.disable_cuda_graphs": _always(
        True, "a dispatch that reads its splits on the host cannot be captured in a CUDA graph"
    ),
}

# Inherited fields that the class refuses to see set.
_HIDDEN: dict[type, frozenset[str]] = {TextDataLoader.Config: frozenset({"dataset", "dataset_path"})}

_ADAMW: Any = default_adamw().param_groups[0]


@dataclass(kw_only=True)
class OptimizerSection(OptimizersContainer.Config):
    """``[optimizer]``: torchtitan's keys, or one group for all, with the values of its default_adamw."""

    name: Literal["AdamW", "Adam"] = _ADAMW.optimizer_name
    lr: float = _ADAMW.optimizer_kwargs["lr"]
    betas: tuple[float, float] = _ADAMW.optimizer_kwargs["betas"]
    eps: float = _ADAMW.optimizer_kwargs["eps"]
    weight_decay: float = _ADAMW.optimizer_kwargs["weight_decay"]

    @staticmethod
    def short_keys() -> tuple[str, ...]:
        """Keys of the one-group form."""
        return ("name", "lr", "betas", "eps", "weight_decay")

    def groups(self) -> list[ParamGroupConfig]:
        """torchtitan's list of groups, whichever form was used."""
        if self.param_groups:
            return [
                replace(group, optimizer_kwargs=_tuples(group.optimizer_kwargs))
                for group in self.param_groups
            ]
        kwargs = {key: getattr(self, key) for key in self.short_keys() if key != "name"}
        return [ParamGroupConfig(pattern=_ADAMW.pattern, optimizer_name=self.name, optimizer_kwargs=kwargs)]

    @classmethod
    def of(cls, config: OptimizersContainer.Config) -> "OptimizerSection":
        """The section that stands for ``config``; the one-group form wherever it can."""
        rest: dict[str, Any] = {key: getattr(config, key) for key in _field_names(config)}
        (group, *others) = config.param_groups
        short: dict[str, Any] = {"name": group.optimizer_name, **_tuples(group.optimizer_kwargs)}
        if not others and group.pattern == _ADAMW.pattern and short.keys() == set(cls.short_keys()):
            rest |= {"param_groups": [], **short}
        return cls(**rest)


@dataclass(kw_only=True)
class ModelSection:
    """``[model]``: which of ``titan_moe.models``."""

    name: str
    flavor: str
    moe: Literal["titan_moe", "torchtitan"] = "titan_moe"  # whose layer; torchtitan's for comparisons
    norm_eps: float | None = None  # of every norm; None: torchtitan's own


@dataclass(kw_only=True)
class MoESection:
    """``[moe]``: what is ours in every MoE layer; a table per backend holds that backend's own keys."""

    dispatcher: str = "all_to_all"
    save: Save = "all"  # what the experts keep for backward; inputs: less, for two of nine matmuls again
    load_balance_coeff: float | Literal["none"] | None = None  # None: the flavor's own


@dataclass(kw_only=True, slots=True)
class Root(Trainer.Config):
    """The whole file: every field of torchtitan's Trainer.Config, and our sections."""

    # pyrefly: ignore[bad-override-mutable-attribute]
    checkpoint: CheckpointManager.Config = field(default_factory=CheckpointManager.Config)
    # pyrefly: ignore[bad-override-mutable-attribute]
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    model: ModelSection
    moe: MoESection = field(default_factory=MoESection)
    routing_replay: RoutingReplay = field(default_factory=RoutingReplay)
    numerics: Numerics = field(default_factory=Numerics)


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a section. ``default`` is dataclasses.MISSING where the user must choose."""

    hint: Any
    default: Any


def keys_of(cls: type) -> dict[str, Key]:
    """The keys that ``cls``, a dataclass, offers to a file: not private, not for Python callers only."""
    hints = get_type_hints(cls, include_extras=True)
    with silent():
        return {
            f.name: Key(hint=hints[f.name], default=_default(f))
            for f in dataclasses.fields(cls)
            if f.init
            and not f.name.startswith("_")
            and f.name not in _HIDDEN.get(cls, ())
            and not _python_only(hints[f.name])
        }


def every_key(cls: type = Root, path: str = "") -> Iterator[tuple[str, str]]:
    """(section path, key) of everything there is, all variants included. For hints and docs."""
    for name, key in keys_of(cls).items():
        inner = f"{path}.{name}" if path else name
        if inner in ALTERNATIVES:
            yield inner, ALTERNATIVES[inner].key
            for option in {option for option in ALTERNATIVES[inner].options.values() if option is not None}:
                yield from every_key(option, inner)
        elif dataclasses.is_dataclass(key.default) or dataclasses.is_dataclass(key.hint):
            yield from every_key(
                type(key.default) if key.default is not dataclasses.MISSING else key.hint, inner
            )
        else:
            yield path, name


def _tuples(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Lists, which is all TOML has, as torch's tuples: a checkpoint holds betas as it got them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _python_only(hint: Any) -> bool:
    """torchtitan hides such a field from its own command line."""
    return get_origin(hint) is Annotated and tyro.conf.Suppress in get_args(hint)[1:]


def _field_names(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []


@contextmanager
def silent() -> Iterator[None]:
    """torchtitan's dataclasses log warnings about their own defaults; what matters in them is a rule here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
