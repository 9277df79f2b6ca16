"""A folder in Hugging Face's format: what is in it, whether that is a given model, and a reader for it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torchtitan.models.common.decoder import Decoder

from titan_moe.models.hugging_face.config_json import (
    HuggingFaceError,
    difference,
    has_expert_bias,
    routes_by_bias,
)

EXPERT_BIAS = ".mlp.gate.e_score_correction_bias"
_SCALE = ".weight_scale_inv"
_FP8 = ("F8_E4M3", "F8_E5M2")
_INV_FREQ = ".rotary_emb.inv_freq"  # old checkpoints hold this buffer; it is computed, not loaded


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words: F32, BF16, F8_E4M3


class Folder:
    """The headers of all ``*.safetensors`` of a folder, and its config.json.

    Attributes:
        tensors: by name.
        config: {} where there is no config.json: torchtitan's ``last_save_in_hf`` writes none.

    Raises:
        HuggingFaceError: no such folder, no or unreadable files, a tensor in two of them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, Stored] = {}
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise HuggingFaceError(f"{path}: no *.safetensors here")
        for file in files:
            try:
                self._add(file)
            except (SafetensorError, OSError) as error:
                raise HuggingFaceError(f"{file} cannot be read: {error}") from None
        self.config = _json(self.path / "config.json")

    @property
    def block_size(self) -> int | None:
        """Side of the squares that share a scale; None where nothing is fp8."""
        if not any(name.endswith(_SCALE) for name in self.tensors):
            return None
        block = self.config.get("quantization_config", {}).get("weight_block_size", [128, 128])
        if block[0] != block[1]:
            raise HuggingFaceError(
                f"{self.path}: weight_block_size {block} is not square; dequantize it first"
            )
        return block[0]

    def fit(self, model: Decoder.Config, wanted: Mapping[str, torch.Size]) -> None:
        """Nothing if this is ``model``, whose tensors ``wanted`` names.

        Raises:
            HuggingFaceError: a tensor is missing, has another shape, or would be left out; config.json says
                another computation.
        """
        if self.config and (what := difference(model, self.config)):
            raise HuggingFaceError(f"{self.path}: {what}; choose the flavor that this folder holds")
        optional = {name for name in wanted if name.endswith(EXPERT_BIAS) and not routes_by_bias(model)}
        missing = [name for name in wanted if name not in self.tensors and name not in optional]
        if missing:
            raise HuggingFaceError(f"{self.path} lacks {_some(missing)}")
        for name, shape in wanted.items():
            if name in self.tensors and self.tensors[name].shape != tuple(shape):
                found = list(self.tensors[name].shape)
                raise HuggingFaceError(f"{self.path}: {name} is {found}, and the model's is {list(shape)}")
        if not has_expert_bias(model) and self.largest_expert_bias():
            raise HuggingFaceError(
                f"{self.path} has an expert bias and the model has none; set moe.load_balance_coeff "
                "(1e-9 leaves the bias as it is)"
            )
        if left_out := [
            name for name in self.tensors if name not in wanted and not self._spare(name, wanted)
        ]:
            raise HuggingFaceError(f"{self.path}: the model has no place for {_some(left_out)}")
        self._scales_fit(wanted)

    def largest_expert_bias(self) -> float:
        """Over all layers but MTP's, by absolute value; 0 where there is none."""
        largest = 0.0
        for name in [name for name in self.tensors if name.endswith(EXPERT_BIAS) and not self._is_mtp(name)]:
            with safe_open(self.path / self.tensors[name].file, framework="pt") as tensors:
                largest = max(largest, tensors.get_tensor(name).abs().max().item())
        return largest

    def reader(self) -> HuggingFaceStorageReader:
        """For ``torch.distributed.checkpoint.load``; fp8 comes out multiplied by its scales."""
        block_size = self.block_size
        return (
            HuggingFaceStorageReader(str(self.path)) if block_size is None else _Fp8Reader(self, block_size)
        )

    def mtp_layers(self, wanted: Mapping[str, torch.Size]) -> list[str]:
        """Names of the multi-token prediction layers that a model without them leaves out."""
        return [name for name in self.tensors if name not in wanted and self._is_mtp(name)]

    def _add(self, file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                entry = tensors.get_slice(name)
                if name in self.tensors:
                    raise HuggingFaceError(
                        f"{self.path}: {name} is in {self.tensors[name].file} and {file.name}"
                    )
                self.tensors[name] = Stored(file.name, tuple(entry.get_shape()), entry.get_dtype())

    def _spare(self, name: str, wanted: Mapping[str, torch.Size]) -> bool:
        """Whether ``name`` may be left out: scales, MTP layers, rope's buffers, a tied head."""
        tied = name == "lm_head.weight" and self.config.get("tie_word_embeddings", False)
        of_known = name.endswith(_SCALE) and name.removesuffix("_scale_inv") in wanted
        return of_known or tied or name.endswith(_INV_FREQ) or self._is_mtp(name)

    def _is_mtp(self, name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        first = self.config.get("num_hidden_layers", float("inf"))
        return layer is not None and 0 <= int(layer[1]) - first < self.config.get(
            "num_nextn_predict_layers", 0
        )

    def _scales_fit(self, wanted: Mapping[str, torch.Size]) -> None:
        block_size = self.block_size or 1
        for name in wanted:
            stored = self.tensors.get(name)
            if stored is None or stored.dtype not in _FP8:
                continue
            scale = self.tensors.get(name.removesuffix(".weight") + _SCALE)
            if scale is None:
                raise HuggingFaceError(f"{self.path}: {name} is {stored.dtype} and has no {_SCALE[1:]}")
            if scale.shape != tuple(-(-size // block_size) for size in stored.shape):
                raise HuggingFaceError(
                    f"{self.path}: {name} {list(stored.shape)} has scales {list(scale.shape)}, "
                    f"which are not one per {block_size} x {block_size} (weight_block_size)"
                )


class _Fp8Reader(QuantizedHuggingFaceStorageReader):
    """torch's reader, which wants an index file even for a single safetensors file."""

    def __init__(self, folder: Folder, block_size: int) -> None:
        super().__init__(str(folder.path), thread_count=4, target_dtype=torch.float32, block_size=block_size)
        self.files = {name: stored.file for name, stored in folder.tensors.items()}

    def _load_quantization_metadata(self) -> None:
        self._build_weight_scale_mapping(self.files)


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HuggingFaceError(f"{file} is not JSON: {error}") from None


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
