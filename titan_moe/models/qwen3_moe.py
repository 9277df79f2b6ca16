"""Qwen3-MoE."""

from torchtitan.models.qwen3 import model_registry

# Ours to torchtitan's: the family here holds MoE sizes only.
FLAVORS = {"debugmodel": "debugmodel_moe", "30B-A3B": "30B-A3B", "235B-A22B": "235B-A22B"}
upstream_spec = model_registry
