"""``[routing_replay]`` in a training run: whose sequences a microbatch holds, and what happens per step."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from titan_moe.layer.names import plain_name
from titan_moe.replay.check import Gates, ReplayCheck, ReplayCheckError
from titan_moe.replay.ids import LayerShape, ReplayDataError
from titan_moe.replay.section import RoutingReplay
from titan_moe.replay.selectors import (
    Installed,
    Microbatch,
    Observer,
    ReplaySelector,
    ReplaySession,
    selectors_of,
)
from titan_moe.replay.together import Together
from titan_moe.replay.trace import Header, TracedStep, TraceReader, TraceWriter, digests


class Place(NamedTuple):
    """Where this rank stands among those that share a global batch."""

    dp_rank: int
    dp_size: int
    local_batch_size: int
    accumulation: int
    seq_len: int
    ep_size: int
    replica: bool  # another TP rank routes the same tokens
    mesh: str

    @property
    def sequences_per_step(self) -> int:
        """Of all ranks."""
        return self.dp_size * self.local_batch_size * self.accumulation

    def sequences(self, microbatch: int) -> torch.Tensor:
        """``(B,)`` int64: the numbers, in the step, of a microbatch's sequences; the loader's order."""
        first = (microbatch * self.dp_size + self.dp_rank) * self.local_batch_size
        return first + torch.arange(self.local_batch_size)


class TrainingReplay:
    """Records or replays a run, step by step."""

    def __init__(
        self,
        section: RoutingReplay,
        model_parts: list[nn.Module],
        place: Place,
        *,
        model: str,
        dump_folder: str,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        """``model`` is a name that a trace and its replay must share; ``observers`` see every selection."""
        self.section, self.place, self.model_parts, self.model = section, place, model_parts, model
        self.folder = Path(section.path or Path(dump_folder) / "routing_trace")
        selectors = [selector for part in model_parts for selector in selectors_of(part)]
        self.selectors: list[ReplaySelector] = [
            selector for selector in selectors if section.chosen(selector.layer)
        ]
        self.together = Together()
        self.check: ReplayCheck | None = None
        if section.check:
            gates = Gates(section.check_max_zero_overlap, section.check_min_mean_overlap)
            self.check = ReplayCheck(model_parts, self.selectors, gates, Path(dump_folder), self.together)
        self.session = ReplaySession(
            selectors,
            fill=section.fill,
            fill_weight=section.fill_weight,
            ep_size=place.ep_size,
            observers=(*observers, *([self.check] if self.check is not None else [])),
        )
        self._opened = False
        self.writer: TraceWriter | None = None
        self.reader: TraceReader | None = None
        self._step: TracedStep | None = None
        self._digests: list[torch.Tensor] = []
        self.summary: str | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimizer step. Collective; what it raises, it raises on all ranks."""
        self._together(lambda: self._begin(step))
        self._digests = []
        yield
        if self.writer is not None:
            self.writer.end_step(step)
        if self.check is not None:
            layers = [selector.layer for selector in self.selectors]
            self.summary = self.check.end_step(step, layers, self.place.accumulation)

    def _begin(self, step: int) -> None:
        if not self._opened and self.section.mode != "off":
            self._open(step)
        self._opened = True
        if self.reader is not None:
            self._step = self.reader.step(step)

    def _together(self, act: Callable[[], None]) -> None:
        """What one rank cannot do ends all of them."""
        error = None
        try:
            act()
        except ReplayDataError as refused:
            error = refused
        self.together.raise_together(error)

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """``batches``, whose texts are hashed on the host as they pass."""
        for batch in batches:
            self._digests.append(digests(batch[0]["input"]))
            yield batch

    @contextmanager
    def microbatch(self, number: int, device: torch.device) -> Iterator[Microbatch]:
        """Around one forward and backward."""
        if number == 0 and self._step is not None:
            self._together(self._check_texts)
        sequences = self.place.sequences(number)
        tokens_P = (sequences.unsqueeze(1) * self.place.seq_len + torch.arange(self.place.seq_len)).flatten()
        installed = None
        if self._step is not None:
            wanted = {selector.layer for selector in self.selectors}
            columns = {key: column for key, column in self._step.columns.items() if key[0] in wanted}
            ids_PCK = self._step.ids_PCK.index_select(0, tokens_P).to(device, non_blocking=True)
            installed = Installed(ids_PCK, columns, has_missing=self._step.has_missing)
        if self.writer is not None:
            self.writer.digests(sequences, self._digests[number])
        tokens_P = tokens_P.to(device, non_blocking=True)
        microbatch = Microbatch(number=number, tokens_P=tokens_P, installed=installed)
        with self.session.microbatch(microbatch):
            yield microbatch

    def _check_texts(self) -> None:
        assert self._step is not None
        # All of the step's: torchtitan fetches them before any forward.
        for number, own in enumerate(self._digests):
            self._step.check_digests(self.place.sequences(number), own)

    def finish(self) -> None:
        """Raises ReplayCheckError where the check is on and nothing was checked."""
        if self.check is not None and self.summary is None:
            raise ReplayCheckError(
                "routing_replay.check is on, and no step was checked: the run had none left to do"
            )

    def close(self) -> None:
        """Writes what is still in memory."""
        if self.writer is not None:
            self.writer.close()

    def _open(self, step: int) -> None:
        shapes: list[LayerShape] = [selector.shape for selector in self.selectors]
        header = Header(
            model=self.model,
            layers=Header.layers_of(shapes),
            seq_len=self.place.seq_len,
            sequences_per_step=self.place.sequences_per_step,
            weights=fingerprint(self.model_parts),
            first_step=step,
        )
        if self.section.mode == "replay":
            self.reader = TraceReader(self.folder, header, check_weights=self.section.check_weights)
            return
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.writer = TraceWriter(
            self.folder,
            header,
            rank=rank,
            num_ranks=num_ranks,
            mesh=self.place.mesh,
            replica=self.place.replica,
        )
        self.session.observers = (*self.session.observers, self.writer)


def fingerprint(model_parts: list[nn.Module]) -> str:
    """A hash of all that routes, which no sharding enters: integer sums of bits. Host sync; once."""
    digest = hashlib.sha256()
    tensors = [item for part in model_parts for item in part.named_parameters()]
    # The one buffer that routes.
    tensors += [
        (n, b) for part in model_parts for n, b in part.named_buffers() if n.endswith("expert_bias_E")
    ]
    for name, parameter in sorted(tensors, key=lambda item: item[0]):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
        total = local.detach().contiguous().view(width).sum(dtype=torch.int64)
        if isinstance(parameter, DTensor):
            parts = [Replicate() if place.is_replicate() else Partial() for place in parameter.placements]
            total = DTensor.from_local(total, parameter.device_mesh, parts, run_check=False).full_tensor()
        digest.update(f"{plain_name(name)}={int(total)};".encode())
    return digest.hexdigest()[:16]
