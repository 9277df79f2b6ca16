"""torchtitan's state-dict adapters for DeepSeek-V3 and Qwen3-MoE, mended: docs/hugging_face.md says where."""

import dataclasses
import re
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.models.utils import MoEStateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger

from titan_moe.models.hugging_face.beside import write_beside
from titan_moe.models.hugging_face.config_json import (
    HuggingFaceError,
    has_expert_bias,
    hf_config,
    routes_by_bias,
)
from titan_moe.models.hugging_face.folder import EXPERT_BIAS, Folder

MAX_FILE_BYTES = 5 * 10**9


class _Named(dict[str, Any]):
    """A dict that a weak reference can point to."""


class HuggingFaceAdapter(MoEStateDictAdapter):
    """What both families need; stands before torchtitan's adapter in the method resolution order."""

    model_config: Any
    from_hf_map: Any  # set by torchtitan's adapters

    def __init__(self, model_config: Any, hf_assets_path: str | None) -> None:
        # Not the index file of hf_assets_path: it may be another model's, fp8, or have MTP layers.
        super().__init__(model_config, None)
        self.hf_assets_path = hf_assets_path
        self._asked: dict[str, bool] = {}  # names that the last to_hf was given: does this rank hold a part?
        self._answered = weakref.ref(_Named())  # what it returned; weak, for that may be a copy of the model

    @cached_property
    def tensors(self) -> dict[str, torch.Size]:
        """Every tensor of the whole model in Hugging Face's format, on whatever mesh and stage we are."""
        theirs: Any = super()
        with torch.device("meta"):
            named = self._with_zero_bias(theirs.to_hf(self.model_config.build().state_dict()))
        return {name: tensor.shape for name, tensor in named.items()}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """As torchtitan, for any placement and number of experts, and without dropping a name.

        Raises:
            HuggingFaceError: a name that Hugging Face's format does not have.
        """
        self._asked = {name: _local_size(value) > 0 for name, value in state_dict.items()}
        unnamed = [name for name in state_dict if _native(name) not in self.from_hf_map.values()]
        if unnamed:
            raise HuggingFaceError(f"{unnamed[0]} has no name in Hugging Face's format")
        theirs: Any = super()
        named = _Named(self._with_zero_bias(theirs.to_hf(state_dict)))
        self._answered = weakref.ref(named)
        self._name_mtp_experts()
        if named and not any(value.is_meta for value in named.values()):
            self.fqn_to_index_mapping = files_of(self.tensors, min(v.element_size() for v in named.values()))
        return named

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """As torchtitan; nothing is left out.

        Raises:
            HuggingFaceError: a tensor that the model does not have, or one that it has and is not there.
        """
        if unknown := [name for name in hf_state_dict if name not in self.tensors]:
            raise HuggingFaceError(f"the model has no place for {unknown[0]}")
        theirs: Any = super()
        state_dict = theirs.from_hf(hf_state_dict)
        wanted = self._asked or dict.fromkeys(self._native_names, True)
        if not routes_by_bias(self.model_config):
            wanted = {name: here for name, here in wanted.items() if not name.endswith(".moe.expert_bias_E")}
        if lost := [name for name, here in wanted.items() if here and name not in state_dict]:
            raise HuggingFaceError(f"{lost[0]} is not complete: tensors are missing")
        return {name: value for name, value in state_dict.items() if name in self._native_names}

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """For what ``to_hf`` returned last, from a folder that must be this model. fp8 needs no flag.

        Raises:
            HuggingFaceError: see ``Folder``; or ``from_quantized``, and nothing is.
        """
        folder = Folder(path)
        folder.fit(self.model_config, self.tensors)
        if from_quantized and folder.block_size is None:
            raise HuggingFaceError(f"{path} is not fp8; set checkpoint.initial_load_in_hf_quantized = false")
        if left_out := folder.mtp_layers(self.tensors):
            logger.info(f"{path}: {len(left_out)} tensors of multi-token prediction layers are left out")
        asked = self._answered() or {}
        for name in [name for name in asked if name.endswith(EXPERT_BIAS) and name not in folder.tensors]:
            del asked[name]  # Qwen3-MoE and DeepSeek-V2 have none: ours starts from zero
        return folder.reader()

    def write_beside(self, folder: str, dtype: torch.dtype) -> None:
        """Adds config.json and the tokenizer to what ``checkpoint.last_save_in_hf`` wrote, in ``dtype``.

        Raises:
            HuggingFaceError: as ``hf_config``; a config rule says so before the training.
        """
        write_beside(Path(folder), hf_config(self.model_config), dtype, Path(self.hf_assets_path or ""))

    @cached_property
    def _native_names(self) -> set[str]:
        with torch.device("meta"):
            return set(self.model_config.build().state_dict())

    def _with_zero_bias(self, named: dict[str, Any]) -> dict[str, Any]:
        """Where the format has an expert bias and the model none: zeros, which vLLM would not fill in."""
        if routes_by_bias(self.model_config) and not has_expert_bias(self.model_config):
            for gate in [name for name in named if name.endswith(".mlp.gate.weight")]:
                bias_E = torch.zeros(named[gate].shape[0], dtype=torch.float32, device=named[gate].device)
                named[gate.removesuffix(".mlp.gate.weight") + EXPERT_BIAS] = bias_E
        return named

    def _name_mtp_experts(self) -> None:
        """torchtitan's to_hf files MTP experts' shards under "layers", from_hf looks under "mtp_layers"."""
        for filed in (
            self.local_experts_indices,
            self.grouped_expert_weight_placements,
            self.grouped_expert_weight_shape,
            self.grouped_expert_weight_mesh,
        ):
            filed |= {f"mtp_{key}": value for key, value in filed.items() if not key.startswith("mtp_")}

    def _caculate_indices_from_placements(
        self, dim: int, dim_size: int, dtensor_placements: tuple, device_mesh: DeviceMesh
    ) -> tuple[int, int]:
        """torchtitan's seam, in its spelling. Theirs has no answer for Replicate (HSDP) and uneven shards."""
        start, end = 0, dim_size
        # FSDP shards what EP has sharded, whichever axis comes first: strided ones go last.
        for strided in (False, True):
            for axis, placement in enumerate(dtensor_placements):
                if isinstance(placement, Shard | _StridedShard) and placement.dim == dim:
                    if isinstance(placement, _StridedShard) != strided:
                        continue
                    size = -(-(end - start) // device_mesh.size(axis))  # torch.chunk's
                    start = min(end, start + device_mesh.get_local_rank(axis) * size)
                    end = min(end, start + size)
        return start, end

    def _concatenate_expert_weights_dtensor(
        self, expert_weights_by_layer: dict, abstract_key: str, layer_num: str
    ) -> torch.Tensor | None:
        """torchtitan's seam. The shape is stated; theirs is inferred as local size times ranks."""
        stacked: Any = super()._concatenate_expert_weights_dtensor(
            expert_weights_by_layer, abstract_key, layer_num
        )
        if stacked is None:
            return None
        shape = self.grouped_expert_weight_shape[abstract_key]
        return DTensor.from_local(
            stacked.to_local(),
            stacked.device_mesh,
            stacked.placements,
            run_check=False,
            shape=shape,
            stride=(shape[1] * shape[2], shape[2], 1),
        )


class DeepSeekV3Adapter(HuggingFaceAdapter, DeepSeekV3StateDictAdapter):
    """Hugging Face's DeepSeek-V3; its DeepSeek-V2 where the router is a softmax."""


class Qwen3MoEAdapter(HuggingFaceAdapter, Qwen3StateDictAdapter):
    """Hugging Face's Qwen3-MoE. It has no expert bias; ours is kept, under DeepSeek's name for it."""

    def __init__(self, model_config: Any, hf_assets_path: str | None) -> None:
        super().__init__(model_config, hf_assets_path)
        self.from_hf_map["model.layers.{}" + EXPERT_BIAS] = "layers.{}.moe.expert_bias_E"

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """As for DeepSeek; on meta, where no bias has a value to keep, in torchtitan's names alone."""
        return super().to_hf(
            {k: v for k, v in state_dict.items() if not (v.is_meta and k.endswith(".moe.expert_bias_E"))}
        )


ADAPTERS: dict[type | None, type[HuggingFaceAdapter]] = {
    DeepSeekV3StateDictAdapter: DeepSeekV3Adapter,
    Qwen3StateDictAdapter: Qwen3MoEAdapter,
}


def for_hugging_face(spec: ModelSpec) -> ModelSpec:
    """``spec`` with our adapter."""
    adapter: Any = ADAPTERS[spec.state_dict_adapter]
    return dataclasses.replace(spec, state_dict_adapter=adapter)


def files_of(tensors: Mapping[str, torch.Size], item_bytes: int) -> dict[str, int] | None:
    """Which file each tensor goes to, from 1, in order, each up to MAX_FILE_BYTES; None: one file does."""
    files, file, size = {}, 1, 0
    for name, shape in tensors.items():
        if size and size + shape.numel() * item_bytes > MAX_FILE_BYTES:
            file, size = file + 1, 0
        files[name] = file
        size += shape.numel() * item_bytes
    return files if file > 1 else None


def _local_size(value: Any) -> int:
    return (value.to_local() if isinstance(value, DTensor) else value).numel()


def _native(name: str) -> str:
    """``layers.3.moe.x`` and ``mtp_layers.0.moe.x`` -> ``layers.{}.moe.x``."""
    return re.sub(r"\d+", "{}", name.removeprefix("mtp_"), count=1) if "layers." in name else name
