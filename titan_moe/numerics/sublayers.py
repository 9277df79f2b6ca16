"""Where is a difference born? Each sublayer of a run is fed what it was given in another run.

A sublayer is what a block adds to the residual stream: its attention, its feed-forward or its MoE layer. Fed
with equal inputs, all that its output differs by was made inside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from titan_moe.layer.names import plain_modules
from titan_moe.layer.recomputation import is_recomputing
from titan_moe.numerics.features import local_tokens

SUBLAYERS = ("attention", "feed_forward", "moe")  # torchtitan's names for them, in every model
Rows = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by sublayer: tokens, ascending, and their rows


def is_sublayer(name: str) -> bool:
    """By a module's plain name: ``layers.3.moe``."""
    block, _, last = name.rpartition(".")
    return block.count(".") == 1 and block.startswith("layers.") and last in SUBLAYERS


class Inputs:
    """Saves the inputs of a model's sublayers, or puts others in their place."""

    def __init__(
        self,
        model_parts: list[nn.Module],
        tokens_P: Callable[[], torch.Tensor | None],
        *,
        seq_len: int,
        save: Callable[..., None],
    ) -> None:
        """
        Args:
            tokens_P: the global token indices of the microbatch that is running; None outside of one.
            save: called with a key, (T,) tokens and ``rows=`` (T, D).
        """
        self.tokens_P, self.seq_len, self.save = tokens_P, seq_len, save
        self.saving = False
        self.instead: Rows | None = None
        for part in model_parts:
            for name, module in plain_modules(part).items():
                if is_sublayer(name):
                    module.register_forward_pre_hook(
                        lambda _m, args, kwargs, n=name: self._enter(n, args, kwargs), with_kwargs=True
                    )

    def _enter(self, name: str, args: Any, kwargs: Any) -> Any:
        tokens_P = self.tokens_P()
        x = args[0] if args else None
        if tokens_P is None or not isinstance(x, torch.Tensor):
            return None
        found = local_tokens(x, tokens_P.numel() // self.seq_len, self.seq_len)
        if found is None:
            return None
        rows_TD, places_T = found
        tokens_T = tokens_P.index_select(0, places_T)
        if self.saving and not is_recomputing():
            self.save(f"{name}|in", tokens_T, rows=rows_TD.detach())
        if self.instead is None:
            return None
        if name not in self.instead:
            raise RuntimeError(f"numerics.inputs_of: {name} has no captured inputs there")
        there_T, others_TD = self.instead[name]
        wanted_T = tokens_T.to(there_T.device)
        rows_T = torch.searchsorted(there_T, wanted_T).clamp_max(len(there_T) - 1)
        if not there_T[rows_T].equal(wanted_T):
            raise RuntimeError(f"numerics.inputs_of: tokens of {name} are not all there: another batch")
        chosen_TD = others_TD.index_select(0, rows_T)
        return (_replaced(x, chosen_TD), *args[1:]), kwargs


def _replaced(x: torch.Tensor, rows_TD: torch.Tensor) -> torch.Tensor:
    """``x`` with the values of ``rows_TD``; gradients pass as if it were ``x`` itself."""
    local = x.to_local() if isinstance(x, DTensor) else x
    local = _Replace.apply(local, rows_TD.to(local).view(local.shape))
    if not isinstance(x, DTensor):
        return local
    return DTensor.from_local(
        local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, _x: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
        return instead

    @staticmethod
    def backward(_ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
