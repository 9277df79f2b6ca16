"""What a run writes down: tokens' features of every module, routes with their margins, gradients.

``numerics`` in the dump folder: ``manifest.json``; of every step ``step-000001.rank-0000.safetensors``
(features by module and global token index) and a line of ``parameters.jsonl``; of the first steps
``inputs-000001.rank-0000.safetensors`` (the rows that sublayers were given) and, from rank 0,
``gradients-000001.safetensors``. Losses and learning rates are in metrics.jsonl.
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
from torchtitan.models.common.moe import TokenChoiceTopKRouter as StockRouter

from titan_moe.layer.names import plain_modules, plain_name
from titan_moe.layer.recomputation import is_recomputing
from titan_moe.layer.router import Query, Selection, TokenChoiceTopKRouter
from titan_moe.numerics.features import features, local_tokens
from titan_moe.numerics.load import FORMAT, Captured
from titan_moe.numerics.margins import Groups, margins
from titan_moe.numerics.section import Numerics
from titan_moe.numerics.sublayers import Inputs
from titan_moe.replay.regions import unseen_by_selective_ac
from titan_moe.replay.selectors import Microbatch, ReplaySelector

Columns = dict[str, list[torch.Tensor]]  # by "module|what|column": one tensor per microbatch


class Capture:
    """Watches a model's modules by hooks, and its routers as a replay's observer.

    Only forwards inside a microbatch count, so eval and recomputation leave nothing.
    """

    def __init__(
        self,
        section: Numerics,
        model_parts: list[nn.Module],
        *,
        seq_len: int,
        sequences: int,
        dtype: str,
        dump_folder: str,
    ) -> None:
        """``sequences`` in a step, and the ``dtype`` of parameters in a forward, are for the manifest."""
        self.folder = Path(dump_folder) / "numerics"
        self.whole_steps, self.seq_len = section.whole_steps, seq_len
        self.about = {"format": FORMAT, "seq_len": seq_len, "sequences": sequences, "dtype": dtype}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.model_parts = model_parts
        self.microbatch: Microbatch | None = None
        self.groups: dict[str, Groups | None] = {}  # by router
        self.modules: list[str] = []  # in the order of their first forward
        self.steps: list[int] = []
        self._features: Columns = {}
        self._rows: Columns = {}
        self.inputs = Inputs(model_parts, self._running, seq_len=seq_len, save=self._keep_rows)
        if section.inputs_of is not None:
            self.inputs.instead = Captured(Path(section.inputs_of)).inputs()
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        for part in model_parts:
            self._watch(part)

    def _watch(self, part: nn.Module) -> None:
        for name, module in plain_modules(part).items():
            if isinstance(module, TokenChoiceTopKRouter):
                self.groups[name] = Groups.of(module.config)
            if isinstance(module, StockRouter):
                self.groups[name] = Groups.of(module)
                module.register_forward_hook(
                    lambda m, args, out, n=name: self._stock_route(n, args[1], out, m.top_k)
                )
            else:
                module.register_forward_hook(lambda _m, _a, out, n=name: self._seen(n, out))

    @contextmanager
    def during(self, microbatch: Microbatch) -> Iterator[None]:
        """Forwards and backwards in here are written down."""
        self.microbatch = microbatch
        self.inputs.saving = self._whole
        try:
            yield
        finally:
            self.microbatch = None

    @property
    def _whole(self) -> bool:
        return len(self.steps) < self.whole_steps

    def _running(self) -> torch.Tensor | None:
        return None if self.microbatch is None else self.microbatch.tokens_P

    def selected(
        self, selector: ReplaySelector, microbatch: Microbatch, selection: Selection, query: Query
    ) -> None:
        """A replay's Observer: our routers' choices."""
        assert query.layout is not None, "MoE gives its router a layout"
        places_T = query.layout.global_token_indices(selection.ids_TK.device)
        name = f"{selector.layer}.router"
        self._route(name, microbatch.tokens_P.index_select(0, places_T), selection.ids_TK, query.biased())

    def _stock_route(self, name: str, bias_E: torch.Tensor | None, out: Any, top_k: int) -> None:
        """torchtitan's router returns weights, ids and scores of every expert, each ``(B, L, ...)``."""
        microbatch = self.microbatch
        if microbatch is None or is_recomputing():
            return
        _, ids_BLK, scores_BLE = out
        batch_size = microbatch.tokens_P.numel() // self.seq_len
        ids, scores = (local_tokens(x.detach(), batch_size, self.seq_len) for x in (ids_BLK, scores_BLE))
        if ids is None or scores is None:
            return
        biased_TE = scores[0] if bias_E is None else scores[0] + _local(bias_E)
        with unseen_by_selective_ac():
            self._route(name, microbatch.tokens_P.index_select(0, ids[1]), ids[0], biased_TE)

    @torch.no_grad()
    def _route(
        self, name: str, tokens_T: torch.Tensor, ids_TK: torch.Tensor, biased_TE: torch.Tensor
    ) -> None:
        """Ids, features of the scores that they were chosen by, and by how much they were chosen."""
        margin_T = margins(biased_TE, ids_TK.shape[1], self.groups.get(name))
        scores = features(biased_TE)
        columns = {"score_norm": scores.norm_T, "score": scores.projection_TQ, "margin": margin_T}
        self._keep(f"{name}|route", tokens_T, ids=ids_TK.sort(dim=1).values, **columns)

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
        _append(self._features, key, tokens=tokens_T, **columns)

    def _keep_rows(self, key: str, tokens_T: torch.Tensor, *, rows: torch.Tensor) -> None:
        with unseen_by_selective_ac():
            _append(self._rows, key, tokens=tokens_T, rows=rows)

    @torch.no_grad()
    def gradients(self, step: int) -> None:
        """Norms of all gradients, summed over microbatches; of the first steps, whole ones. Collective.

        And the expert biases that the step routed with.
        """
        whole, norms, biases = {}, {}, {}
        for part in self.model_parts:
            for name, buffer in part.named_buffers():
                if name.endswith("expert_bias_E"):
                    biases[plain_name(name)] = _whole(buffer).tolist()
            for name, parameter in part.named_parameters():
                grad = parameter.grad
                if grad is None:
                    continue
                norms[plain_name(name)] = float(_whole(grad.double().norm()))
                if self._whole:
                    whole[plain_name(name)] = _whole(grad).float().cpu().contiguous().clone()
        if self.rank == 0:
            with (self.folder / "parameters.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "norms": norms, "expert_biases": biases}) + "\n")
            if whole:
                save_file(whole, self.folder / f"gradients-{step:06}.safetensors")

    def end_step(self, step: int) -> None:
        """Writes the step."""
        self._save(f"step-{step:06}", self._features)
        if self._rows:
            self._save(f"inputs-{step:06}", self._rows)
        self._features, self._rows = {}, {}
        self.steps.append(step)
        if self.rank == 0:
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            manifest = self.about | {"ranks": ranks, "steps": self.steps, "modules": self.modules}
            (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def _save(self, name: str, columns: Columns) -> None:
        tensors = {key: torch.cat(parts) for key, parts in columns.items()}
        save_file(tensors, self.folder / f"{name}.rank-{self.rank:04}.safetensors")


def forget_capture(dump_folder: str) -> None:
    """Removes an earlier run's: beside new losses it would be taken for this run's. Only rank 0 does."""
    folder = Path(dump_folder) / "numerics"
    if not dist.is_initialized() or dist.get_rank() == 0:
        for old in (*folder.glob("*.safetensors"), *folder.glob("*.json*")):
            old.unlink(missing_ok=True)


def _append(kept: Columns, key: str, **columns: torch.Tensor) -> None:
    for column, tensor in columns.items():
        kept.setdefault(f"{key}|{column}", []).append(tensor.to("cpu", copy=True))


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
