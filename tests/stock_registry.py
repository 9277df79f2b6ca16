"""A registry for torchtitan's own ConfigManager: ``--module tests.stock_registry --config debug``."""

from pathlib import Path

from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.deepseek_v3 import model_registry
from torchtitan.trainer import Trainer

from tests.training import NUM_LAYERS
from titan_moe.models.stock import keep_spec
from titan_moe.trainer.config import load
from titan_moe.trainer.metrics import MetricsProcessor
from titan_moe.trainer.train import _as

CONFIG = Path(__file__).parent.parent / "train_configs" / "debug_local.toml"


def debug() -> Trainer.Config:
    """torchtitan's trainer and its debug model, shortened, with our data and what a CPU lacks; 4 ranks."""
    config = load([str(CONFIG), "--training.local_batch_size=4"], world_size=4).trainer
    config.model_spec = keep_spec(model_registry("debugmodel"))
    config.model_spec.model.layers = config.model_spec.model.layers[:NUM_LAYERS]
    config.metrics = _as(MetricsProcessor.Config, config.metrics)
    return config


def debug_full_ac() -> Trainer.Config:
    """The same, recomputing whole blocks."""
    config = debug()
    config.activation_checkpoint = FullAC.Config()
    return config


def debug_selective_ac() -> Trainer.Config:
    """The same, recomputing what torchtitan's policy does not save."""
    config = debug()
    config.activation_checkpoint = SelectiveAC.Config()
    return config
