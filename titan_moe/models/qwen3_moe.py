"""Qwen3-MoE: torchtitan's model, our MoE."""

from typing import Any

from torchtitan.models.qwen3 import model_registry
from torchtitan.protocols.model_spec import ModelSpec

from titan_moe.models.swap import swap_spec

# Ours to torchtitan's: the family here holds MoE sizes only.
FLAVORS = {"debugmodel": "debugmodel_moe", "30B-A3B": "30B-A3B", "235B-A22B": "235B-A22B"}


def build_spec(flavor: str, *, dispatcher: str, dispatcher_options: dict[str, Any]) -> ModelSpec:
    """torchtitan's spec of this flavor, swapped."""
    return swap_spec(
        model_registry(FLAVORS[flavor]), dispatcher=dispatcher, dispatcher_options=dispatcher_options
    )
