"""A captured run, read back: tokens of all ranks in one order."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from titan_moe.numerics.capture import FORMAT


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
        if manifest.get("format") != FORMAT:
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

    def step(self, step: int) -> dict[str, dict[str, torch.Tensor]]:
        """By module key (``layers.1.moe|out``): columns of all tokens, ordered by global token index.

        Tokens that several ranks hold (replicas) are taken once, and must agree to be one row: the first
        rank's counts, and column ``replicas_differ`` says where another's bits are not the same.
        """
        pieces: dict[str, dict[str, list[torch.Tensor]]] = {}
        for rank in range(self.manifest["ranks"]):
            for name, tensor in self._load(f"step-{step:06}.rank-{rank:04}.safetensors").items():
                key, column = name.rsplit("|", 1)
                pieces.setdefault(key, {}).setdefault(column, []).append(tensor)
        return {key: _once({c: torch.cat(t) for c, t in columns.items()}) for key, columns in pieces.items()}

    def gradients(self, step: int) -> dict[str, torch.Tensor]:
        """Whole gradients by parameter; empty where they were not saved."""
        name = f"gradients-{step:06}.safetensors"
        return self._load(name) if (self.folder / "numerics" / name).exists() else {}

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        file = self.folder / "numerics" / name
        try:
            return load_file(file)
        except FileNotFoundError:
            raise CaptureError(f"{file}: missing; the run was cut short") from None
        except (SafetensorError, OSError) as error:
            raise CaptureError(f"{file}: truncated or damaged: {error}") from None


def _once(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    order = torch.argsort(columns["tokens"], stable=True)
    ordered = {name: tensor[order] for name, tensor in columns.items()}
    tokens = ordered["tokens"]
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[1:] = tokens[1:] != tokens[:-1]
    return {name: tensor[first] for name, tensor in ordered.items()}
