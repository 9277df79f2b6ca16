"""A captured run, read back: tokens of all ranks in one order."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

FORMAT = 3  # of the folder that Capture writes
Step = dict[str, dict[str, torch.Tensor]]  # by "module|what": columns


class CaptureError(ValueError):
    """A folder that holds no usable capture; one line."""


@dataclass(frozen=True)
class Captured:
    """One run.

    Attributes:
        folder: its dump folder, with ``metrics.jsonl`` and ``numerics/``.
    """

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """``numerics/manifest.json``."""
        file = self.folder / "numerics" / "manifest.json"
        try:
            manifest = json.loads(file.read_text())
        except FileNotFoundError:
            raise CaptureError(f"{file}: missing; run with --numerics.capture") from None
        except ValueError as error:
            raise CaptureError(f"{file}: truncated or not JSON: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CaptureError(f"{file}: not a capture of format {FORMAT}")
        return manifest

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """``metrics.jsonl``."""
        file = self.folder / "metrics.jsonl"
        try:
            return [json.loads(line) for line in file.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise CaptureError(f"{file}: {error}") from None

    def step(self, step: int) -> Step:
        """By module key (``layers.1.moe|out``): columns of all tokens, ordered by global token index.

        A token that several ranks hold (replicas) is taken from the first of them; column
        ``replicas_differ`` says where they do not agree.
        """
        return self._of_all_ranks(f"step-{step:06}")

    def inputs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of the first step, by sublayer (``layers.1.moe``): tokens, ascending, and the rows it was given."""
        found = self._of_all_ranks(f"inputs-{self.manifest['steps'][0]:06}")
        return {key.removesuffix("|in"): (saved["tokens"], saved["rows"]) for key, saved in found.items()}

    def gradients(self, step: int) -> dict[str, torch.Tensor]:
        """Whole gradients by parameter; empty where they were not saved."""
        name = f"gradients-{step:06}.safetensors"
        return self._load(name) if (self.folder / "numerics" / name).exists() else {}

    @cached_property
    def parameters(self) -> dict[int, dict[str, Any]]:
        """By step: "norms" of gradients by parameter, "expert_biases" by layer."""
        file = self.folder / "numerics" / "parameters.jsonl"
        try:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            return {line["step"]: line for line in lines}
        except (OSError, ValueError, KeyError) as error:
            raise CaptureError(f"{file}: truncated or missing: {error}") from None

    def _of_all_ranks(self, name: str) -> Step:
        pieces: dict[str, dict[str, list[torch.Tensor]]] = {}
        for rank in range(self.manifest["ranks"]):
            for key_and_column, tensor in self._load(f"{name}.rank-{rank:04}.safetensors").items():
                key, column = key_and_column.rsplit("|", 1)
                pieces.setdefault(key, {}).setdefault(column, []).append(tensor)
        return {key: _once({c: torch.cat(t) for c, t in columns.items()}) for key, columns in pieces.items()}

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        file = self.folder / "numerics" / name
        try:
            return load_file(file)
        except FileNotFoundError:
            raise CaptureError(f"{file}: missing; the run was cut short") from None
        except (SafetensorError, OSError) as error:
            raise CaptureError(f"{file}: truncated or damaged: {error}") from None


def _once(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row per token, by token; column ``replicas_differ``: another rank's row has other bits, or ids."""
    order = torch.argsort(columns["tokens"], stable=True)
    ordered = {name: tensor[order] for name, tensor in columns.items()}
    tokens = ordered["tokens"]
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[1:] = tokens[1:] != tokens[:-1]
    once = {name: tensor[first] for name, tensor in ordered.items()}
    if (telling := next((name for name in ("bits_T", "ids") if name in ordered), None)) is not None:
        owner = first.cumsum(0) - 1
        differs = (ordered[telling] != once[telling][owner]).reshape(len(tokens), -1).any(1)
        once["replicas_differ"] = torch.zeros(len(once["tokens"]), dtype=torch.bool)
        once["replicas_differ"][owner[differs]] = True
    return once
