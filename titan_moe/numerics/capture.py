"""What a run writes down: tokens' features of every module, routes with their margins, gradients.

``numerics`` in the dump folder: ``manifest.json``, ``step-000001.rank-0000.safetensors`` (features by module
and global token index) and, from rank 0, ``gradients-000001.safetensors``. Losses are in metrics.jsonl.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from titan_moe.load_balance import is_recomputing
from titan_moe.numerics.features import features, local_tokens
from titan_moe.numerics.section import Numerics
from titan_moe.replay.regions import unseen_by_selective_ac
from titan_moe.replay.slots import Microbatch, Slot
from titan_moe.router import Choice, Query

FORMAT = 1


class Capture:
    """Watches a model's modules by hooks, and its routers as a replay's observer.

    Only forwards inside a microbatch count, so eval and recomputation leave nothing.
    """

    def __init__(
        self, section: Numerics, model_parts: list[nn.Module], *, seq_len: int, dump_folder: str
    ) -> None:
        self.folder = Path(dump_folder) / "numerics"
        self.gradient_steps, self.seq_len = section.gradient_steps, seq_len
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.model_parts = model_parts
        self.microbatch: Microbatch | None = None
        self.modules: list[str] = []  # in the order of their first forward
        self.steps: list[int] = []
        self._parts: dict[str, list[torch.Tensor]] = {}
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (*self.folder.glob("*.safetensors"), self.folder / "manifest.json"):
                old.unlink(missing_ok=True)
        for part in model_parts:
            for name, module in part.named_modules():
                if plain := plain_name(name):
                    module.register_forward_hook(lambda _m, _a, out, n=plain: self._seen(n, out))

    @contextmanager
    def during(self, microbatch: Microbatch) -> Iterator[None]:
        """Forwards and backwards in here are written down."""
        self.microbatch = microbatch
        try:
            yield
        finally:
            self.microbatch = None

    def chosen(self, slot: Slot, microbatch: Microbatch, choice: Choice, query: Query) -> None:
        """Ids, and the margin between the K-th and the next score of the router's own ranking."""
        assert query.layout is not None, "MoE gives its router a layout"
        top_k, num_experts = slot.shape.top_k, slot.shape.num_experts
        best = query.ranking().topk(min(top_k + 1, num_experts), dim=1).values.double()
        margin_T = best[:, top_k - 1] - best[:, top_k] if num_experts > top_k else best[:, 0] * 0 + torch.inf
        tokens_T = microbatch.tokens_P.index_select(0, query.layout.global_token_indices(best.device))
        self._keep(
            f"{slot.layer}.router|route", tokens_T, ids=choice.ids_TK.sort(dim=1).values, margin=margin_T
        )

    def _seen(self, name: str, out: Any) -> None:
        if self.microbatch is None or is_recomputing() or not isinstance(out, torch.Tensor):
            return
        self._tokens(f"{name}|out", out)
        if out.requires_grad:
            out.register_hook(lambda grad: self._tokens(f"{name}|grad", grad))

    @torch.no_grad()
    def _tokens(self, key: str, x: torch.Tensor) -> None:
        with unseen_by_selective_ac():  # a recomputation does not write down again
            self._write_down(key, x)

    def _write_down(self, key: str, x: torch.Tensor) -> None:
        microbatch = self.microbatch
        if microbatch is None:
            return
        found = local_tokens(x, microbatch.tokens_P.numel() // self.seq_len, self.seq_len)
        if found is not None:
            rows_TD, places_T = found
            self._keep(key, microbatch.tokens_P.index_select(0, places_T), **features(rows_TD)._asdict())

    def _keep(self, key: str, tokens_T: torch.Tensor, **columns: torch.Tensor) -> None:
        if key not in self.modules:
            self.modules.append(key)
        for column, tensor in {"tokens": tokens_T, **columns}.items():
            self._parts.setdefault(f"{key}|{column}", []).append(tensor.to("cpu", copy=True))

    def gradients(self, step: int) -> None:
        """Whole gradients of the first steps, summed over microbatches; collective."""
        if step > self.gradient_steps:
            return
        whole = {}
        for part in self.model_parts:
            for name, parameter in part.named_parameters():
                if parameter.grad is not None:
                    grad = parameter.grad
                    grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
                    whole[plain_name(name)] = grad.detach().float().cpu().contiguous().clone()
        if self.rank == 0:
            save_file(whole, self.folder / f"gradients-{step:06}.safetensors")

    def end_step(self, step: int) -> None:
        """Writes the step."""
        tensors = {key: torch.cat(parts) for key, parts in self._parts.items()}
        save_file(tensors, self.folder / f"step-{step:06}.rank-{self.rank:04}.safetensors")
        self._parts = {}
        self.steps.append(step)
        if self.rank == 0:
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            manifest = {
                "format": FORMAT,
                "ranks": ranks,
                "seq_len": self.seq_len,
                "steps": self.steps,
                "modules": self.modules,
            }
            (self.folder / "manifest.json").write_text(json.dumps(manifest))


def plain_name(name: str) -> str:
    """A module's or parameter's name without wrappers."""
    for wrapper in ("_checkpoint_wrapped_module", "_orig_mod"):
        name = name.replace(f"{wrapper}.", "").removesuffix(wrapper).removesuffix(".")
    return name
