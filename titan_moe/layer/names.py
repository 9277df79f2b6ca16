"""Modules and parameters by the names they have in an unwrapped model."""

import re

from torch import nn

_WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)(\.|$)")


def plain_name(name: str) -> str:
    """``name`` without what activation checkpointing, compile and FSDP put into it."""
    return _WRAPPERS.sub("", name).removesuffix(".")


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its plain name, the root left out; of a wrapper and what it wraps, the wrapper."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if plain := plain_name(name):
            found.setdefault(plain, module)
    return found
