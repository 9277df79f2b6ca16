"""Rollout routing replay for RL trainers (R3, arXiv 2510.11370): ids of a rollout engine, per microbatch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from titan_moe.replay.check import Gates, ReplayCheck
from titan_moe.replay.ids import MISSING, ReplayDataError, ingest
from titan_moe.replay.section import layer_number
from titan_moe.replay.selectors import Installed, Microbatch, ReplaySession, selectors_of
from titan_moe.replay.together import Together


class RolloutReplay:
    """Installs ids for forwards of a model that ``titan_moe.parallel.parallelize`` has sharded.

    Scores stay those of the live gate, so router gradients flow. Backward may run inside of the context or
    later, in any order: recomputation finds the ids of its own forward.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        *,
        fill: Literal["score", "balanced"] = "score",
        fill_weight: Literal["live", "zero"] = "live",
        ep_size: int = 1,
        check: Gates | None = None,
        evidence_folder: Path | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Collective: ``group`` is of the ranks that train, None: all ranks.

        ``check`` switches the check on; its evidence goes to ``evidence_folder``.
        """
        self.selectors = [selector for part in model_parts for selector in selectors_of(part)]
        if not self.selectors:
            raise ValueError(
                "the model has no router of ours that can replay: parallelize it first, uncompiled"
            )
        self.model_parts, self.check = model_parts, None
        if check is not None and evidence_folder is None:
            raise ValueError("a check needs an evidence_folder")
        self.together = Together(group)
        if check is not None and evidence_folder is not None:
            self.check = ReplayCheck(model_parts, self.selectors, check, evidence_folder, self.together)
        observers = (self.check,) if self.check is not None else ()
        self.session = ReplaySession(
            self.selectors, fill=fill, fill_weight=fill_weight, ep_size=ep_size, observers=observers
        )
        self._microbatches = 0

    @contextmanager
    def microbatch(
        self,
        routed_experts: torch.Tensor,
        *,
        batch_size: int,
        seq_len: int,
        columns: Sequence[int] | None = None,
        valid_BL: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[None]:
        """The forward in here routes by ``routed_experts``; ids of -1 are filled. Collective.

        Args:
            routed_experts: ``(B * L, layers, K)`` or ``(B, L or L - 1, layers, K)``, int8 to int64, over all
                TP ranks of this data-parallel rank; with CP, sharded as the tokens are.
            seq_len: L, after CP.
            columns: the entry of dim ``layers`` for each MoE layer. None: one per MoE layer, or one per
                decoder layer, of which the MoE layers' are taken.
            valid_BL: False for padding: not counted as load, not checked.
            device: where the model runs.

        Raises:
            ReplayDataError: data that cannot be replayed; names sample, layer and token; on every rank, so
                that none waits in a collective for one that has left.
        """
        shapes = [selector.shape for selector in self.selectors]
        error, ids_PCK = None, torch.empty(0)
        try:
            if not isinstance(routed_experts, torch.Tensor) or routed_experts.dim() not in (3, 4):
                raise ReplayDataError("routed_experts must be a tensor of 3 or 4 dims")
            ids_PCK = ingest(
                routed_experts,
                shapes,
                batch_size=batch_size,
                seq_len=seq_len,
                columns=self._columns(routed_experts.shape[-2]) if columns is None else columns,
                valid_BL=valid_BL,
            )
        except Exception as refused:  # whatever it is: the other ranks must hear of it
            error = refused
        self.together.raise_together(error)
        installed = Installed(
            ids_PCK.to(device, non_blocking=True),
            {(selector.layer, 0): column for column, selector in enumerate(self.selectors)},
            has_missing=bool((ids_PCK == MISSING).any()),
            valid_P=None if valid_BL is None else valid_BL.flatten().to(device, non_blocking=True),
        )
        tokens_P = torch.arange(batch_size * seq_len, device=device)
        microbatch = Microbatch(number=self._microbatches, tokens_P=tokens_P, installed=installed)
        self._microbatches += 1
        try:
            with self.session.microbatch(microbatch):
                yield
        except BaseException:
            self._microbatches = 0  # the step begins anew
            if self.check is not None:
                self.check.clear()
            raise

    def end_step(self, step: int) -> str | None:
        """The check's verdict on the microbatches since the last call; collective. None without a check."""
        number, self._microbatches = self._microbatches, 0
        if self.check is None:
            return None
        return self.check.end_step(step, [selector.layer for selector in self.selectors], number)

    def _columns(self, there: int) -> list[int]:
        """One per MoE layer, or one per decoder layer of a model that is here as a whole."""
        numbers = [layer_number(selector.layer) for selector in self.selectors]
        decoder = [int(key) for part in self.model_parts for key in getattr(part, "layers", {})]
        if there == len(self.selectors):
            return list(range(there))
        if sorted(decoder) != list(range(there)) or None in numbers:
            raise ReplayDataError(
                f"routed_experts has {there} layers, the model has {len(self.selectors)} MoE layers "
                f"({self.selectors[0].layer} to {self.selectors[-1].layer}) and {len(decoder)} decoder "
                "layers; say with columns which entry is whose"
            )
        return [number for number in numbers if number is not None]
