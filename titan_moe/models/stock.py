"""torchtitan's own MoE layer, untouched, so that a run can be compared with it."""

import dataclasses
from functools import partial
from typing import Any

from torch import nn
from torchtitan.protocols.model_spec import ModelSpec

from titan_moe.models.attention import swap_attention
from titan_moe.parallel.parallelize import sum_over_gloo


def keep_spec(spec: ModelSpec) -> ModelSpec:
    """``spec`` as it is, but for what a CPU cannot do; ``spec.model`` is changed in place."""
    swap_attention(spec.model)
    return dataclasses.replace(spec, parallelize_fn=partial(_parallelize, spec.parallelize_fn))


def _parallelize(upstream: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
    model = upstream(model, **kwargs)
    sum_over_gloo(model)
    return model
