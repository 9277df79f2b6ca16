"""Trace files: the routes of a run, by step, layer and global token index, for any other mesh.

A folder of ``manifest.json`` and ``step-000001.rank-0000.safetensors``, one file per step and rank: per layer
and call ``<layer>#<call>`` (n, K) ids in the narrowest dtype and ``<layer>#<call>.tokens`` (n,) global token
indices; ``sequences`` (s, 2): numbers and hashes of the texts. A token index counts the step's whole global
batch: ``sequence * seq_len + position``.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from titan_moe.layer.router import Query, Selection
from titan_moe.replay.ids import MISSING, LayerShape, ReplayDataError, check_layer, narrowest_dtype
from titan_moe.replay.selectors import Microbatch, ReplaySelector

FORMAT = 1
_UNWRITTEN = -2  # no rank recorded the token; MISSING is an id that is to be filled


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a run and a trace must have in common to belong together; ``mesh`` and ``steps`` may differ.

    Attributes:
        layers: name: [E, K].
        weights: a hash of the parameters before the first step of the trace.
    """

    model: str
    layers: dict[str, list[int]]
    seq_len: int
    sequences_per_step: int
    weights: str
    first_step: int

    @staticmethod
    def layers_of(shapes: Iterable[LayerShape]) -> dict[str, list[int]]:
        """Records the selections of those ``selectors`` whose layer is in ``layers``."""
        return {shape.name: [shape.num_experts, shape.top_k] for shape in shapes}


class TraceWriter:
    """Records choices, a file per step and rank.

    Copies leave for the host when a router has chosen, and are waited for at the end of the *next* step:
    nothing on the hot path waits, and no tensor of the model is kept.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        *,
        rank: int,
        num_ranks: int,
        mesh: str,
        replica: bool = False,
    ) -> None:
        """Rank 0 writes the manifest; ``mesh`` is for people; a ``replica`` routes what another rank does."""
        self.folder, self.rank, self.replica, self.layers = folder, rank, replica, set(header.layers)
        self.manifest = {"format": FORMAT, **asdict(header), "ranks": num_ranks, "mesh": mesh, "steps": []}
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._waiting: list[tuple[int, dict[str, list[torch.Tensor]], Any]] = []
        if (folder / "manifest.json").exists():
            self._continue(header)
        folder.mkdir(parents=True, exist_ok=True)

    def _continue(self, header: Header) -> None:
        """A resumed run goes on with its own trace; nothing else is written over."""
        old = TraceReader(self.folder, header, check_weights=False).manifest
        ranks = self.manifest["ranks"]
        if header.first_step <= old["first_step"] or old["ranks"] != ranks:
            raise ReplayDataError(
                f"{self.folder} holds a trace of steps {old['steps']}, recorded on {old['ranks']} ranks; "
                "record to another routing_replay.path, or delete it"
            )
        steps = [step for step in old["steps"] if step < header.first_step]
        self.manifest |= {"steps": steps, "weights": old["weights"], "first_step": old["first_step"]}

    def selected(
        self, selector: ReplaySelector, microbatch: Microbatch, selection: Selection, query: Query
    ) -> None:
        """Takes a copy."""
        if self.replica or selector.layer not in self.layers:
            return
        assert query.layout is not None, "MoE gives its router a layout"
        call = microbatch.calls[selector.layer] - 1
        ids_TK = selection.ids_TK.to(narrowest_dtype(selector.shape.num_experts))
        tokens_T = microbatch.tokens_P.index_select(0, query.layout.global_token_indices(ids_TK.device))
        for name, tensor in (
            (f"{selector.layer}#{call}", ids_TK),
            (f"{selector.layer}#{call}.tokens", tokens_T),
        ):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._parts.setdefault(name, []).append(copy.copy_(tensor, non_blocking=True))

    def digests(self, sequences: torch.Tensor, digests: torch.Tensor) -> None:
        """Of a microbatch's sequences: ``(B,)`` int64 numbers in the step, and hashes of their tokens."""
        self._parts.setdefault("sequences", []).append(torch.stack([sequences.cpu(), digests.cpu()], dim=1))

    def end_step(self, step: int) -> None:
        """Hands the step over, and writes the one before."""
        event = torch.cuda.Event() if torch.cuda.is_available() else None
        if event is not None:
            event.record()
        self._waiting.append((step, self._parts, event))
        self._parts = {}
        while len(self._waiting) > (1 if event is not None else 0):
            self._write(*self._waiting.pop(0))

    def close(self) -> None:
        """Writes what is left."""
        for step in self._waiting:
            self._write(*step)
        self._waiting = []

    def _write(self, step: int, parts: dict[str, list[torch.Tensor]], event: Any) -> None:
        if event is not None:
            event.synchronize()
        tensors = {name: torch.cat(pieces) for name, pieces in parts.items()}
        file = self.folder / f"step-{step:06}.rank-{self.rank:04}.safetensors"
        _replace(file, lambda path: save_file(tensors, path))
        if self.rank == 0:
            self.manifest["steps"].append(step)
            text = json.dumps(self.manifest, indent=1)
            _replace(self.folder / "manifest.json", lambda path: path.write_text(text, encoding="utf-8"))


class TraceReader:
    """A trace that fits this run.

    Raises:
        ReplayDataError: it is truncated, or of another run; one line.
    """

    def __init__(self, folder: Path, header: Header, *, check_weights: bool = True) -> None:
        self.folder, self.header = folder, header
        file = folder / "manifest.json"
        try:
            self.manifest = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ReplayDataError(f"{folder}: no trace, it has no manifest.json") from None
        except (ValueError, OSError) as error:
            raise ReplayDataError(f"{file}: truncated or not JSON: {error}") from None
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise ReplayDataError(f"{folder}: not a trace of format {FORMAT}")
        for key, kind in (("steps", list), ("ranks", int), ("first_step", int), ("layers", dict)):
            if not isinstance(self.manifest.get(key), kind):
                raise ReplayDataError(f"{file}: damaged: {key} is {self.manifest.get(key)!r}")
        self._check_layers(self.manifest.get("layers"), header.layers)
        for key in ("model", "seq_len", "sequences_per_step"):
            theirs, own = self.manifest.get(key), getattr(header, key)
            if theirs != own:
                raise ReplayDataError(f"{folder}: recorded with {key} {theirs!r}, this run has {own!r}")
        weights = self.manifest.get("weights")
        same_start = self.manifest.get("first_step") == header.first_step
        if check_weights and same_start and weights != header.weights:
            raise ReplayDataError(
                f"{folder}: recorded from other weights ({weights}) than this run starts from "
                f"({header.weights}); start both from one checkpoint, or --routing_replay.no-check_weights"
            )

    def _check_layers(self, theirs: Any, own: dict[str, list[int]]) -> None:
        for name, shape in own.items():
            found = theirs.get(name) if isinstance(theirs, dict) else None
            if found != shape:
                what = "not in it" if found is None else f"there with E, K = {found}"
                raise ReplayDataError(f"{self.folder}: {name} (E, K = {shape}) is {what}")

    def step(self, step: int) -> "TracedStep":
        """All ids of a step."""
        if step not in self.manifest["steps"]:
            there = self.manifest["steps"]
            span = f"it has {there[0]} to {there[-1]}" if there else "it has none"
            raise ReplayDataError(f"{self.folder}: no step {step}; {span}")
        parts: dict[str, list[torch.Tensor]] = {}
        for rank in range(self.manifest["ranks"]):
            file = self.folder / f"step-{step:06}.rank-{rank:04}.safetensors"
            try:
                for name, tensor in load_file(file).items():
                    parts.setdefault(name, []).append(tensor)
            except FileNotFoundError:
                raise ReplayDataError(f"{file}: missing; the recording was cut short") from None
            except (SafetensorError, OSError) as error:
                raise ReplayDataError(f"{file}: truncated or damaged: {error}") from None
        try:
            return TracedStep(f"{self.folder}, step {step}", self.header, parts)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise ReplayDataError(f"{self.folder}, step {step}: damaged: {error!r}") from None


class TracedStep:
    """One step's ids, whole.

    Attributes:
        columns: (layer, call), in the order of dim 1 of ``ids_PCK``.
        has_missing: whether any id is MISSING.
    """

    def __init__(self, name: str, header: Header, parts: dict[str, list[torch.Tensor]]) -> None:
        num_tokens = header.sequences_per_step * header.seq_len
        names = [key for key in parts if not key.endswith(".tokens") and key != "sequences"]
        self.columns = {(key.rsplit("#", 1)[0], int(key.rsplit("#", 1)[1])): i for i, key in enumerate(names)}
        lacking = [layer for layer in header.layers if (layer, 0) not in self.columns]
        if lacking or "sequences" not in parts:
            raise ReplayDataError(f"{name}: no ids of {lacking[0] if lacking else 'any sequence'}")
        dtypes = {tensor.dtype for key in names for tensor in parts[key]}
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        top_k = max(parts[key][0].shape[1] for key in names)
        self.ids_PCK = torch.full((num_tokens, len(names), top_k), _UNWRITTEN, dtype=widest)
        for column, key in enumerate(names):
            tokens, ids = torch.cat(parts[f"{key}.tokens"]), torch.cat(parts[key])
            there = bool(((tokens >= 0) & (tokens < num_tokens)).all())
            if ids.is_floating_point() or ids.dim() != 2 or not there:
                raise ReplayDataError(f"{name}: damaged: {key} holds no ids of tokens 0 to {num_tokens - 1}")
            self.ids_PCK[tokens, column] = ids.to(widest)
            gaps = (self.ids_PCK[:, column] == _UNWRITTEN).any(1).nonzero()
            if len(gaps):
                token = int(gaps[0])
                place = f"sequence {token // header.seq_len}, position {token % header.seq_len}"
                raise ReplayDataError(f"{name}: {key} has no ids for {place} ({len(gaps)} tokens lack them)")
            self._check_ids(name, key.rsplit("#", 1)[0], column, header)
        self.has_missing = bool((self.ids_PCK == MISSING).any())
        sequences = torch.cat(parts["sequences"])
        self.digest_of = dict(zip(sequences[:, 0].tolist(), sequences[:, 1].tolist(), strict=True))

    def _check_ids(self, name: str, layer: str, column: int, header: Header) -> None:
        shape = LayerShape(layer, *header.layers.get(layer, (2**15, self.ids_PCK.shape[2])))
        ids_BLK = self.ids_PCK[:, column].unflatten(0, (-1, header.seq_len)).long()
        try:
            check_layer(ids_BLK, shape, torch.ones(ids_BLK.shape[:2], dtype=torch.bool), captured=False)
        except ReplayDataError as error:
            raise ReplayDataError(f"{name}: {error}") from None

    def check_digests(self, sequences: torch.Tensor, digests: torch.Tensor) -> None:
        """Raises ReplayDataError where a sequence is not the text that was recorded."""
        for sequence, digest in zip(sequences.tolist(), digests.tolist(), strict=True):
            if self.digest_of.get(sequence) != digest:
                raise ReplayDataError(
                    f"sequence {sequence} of this step is other text than in the trace; a trace belongs to "
                    "one data order: the same dataloader keys, seed and global batch"
                )


def digests(tokens_BL: torch.Tensor) -> torch.Tensor:
    """``(B,)`` int64: a hash of each sequence of token ids; on their device, no sync."""
    # Knuth's MMIX generator; the sum wraps around.
    places_L = torch.arange(1, tokens_BL.shape[1] + 1, device=tokens_BL.device)
    weights_L = places_L * 6364136223846793005 + 1442695040888963407
    return ((tokens_BL + 1) * weights_L * (tokens_BL + 7919)).sum(1)


def _replace(path: Path, write: Any) -> None:
    """A reader sees the whole file or none."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
