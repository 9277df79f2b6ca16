"""A checkpoint of ours as a folder that transformers opens: weights, config.json, tokenizer."""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_moe.models.hugging_face.adapter import MAX_FILE_BYTES, HuggingFaceAdapter
from titan_moe.models.hugging_face.beside import write_beside, write_json
from titan_moe.models.hugging_face.config_json import HuggingFaceError, hf_config, routes_by_bias
from titan_moe.models.hugging_face.folder import EXPERT_BIAS, Folder

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def export(
    adapter: HuggingFaceAdapter,
    checkpoint: Path,
    out: Path,
    *,
    assets: Path,
    dtype: torch.dtype,
    drop_bias: bool = False,
) -> int:
    """Writes ``out`` from a DCP checkpoint, with one file's tensors in memory at a time.

    Args:
        adapter: of the model that wrote ``checkpoint``.
        assets: the folder with its tokenizer.
        dtype: of all tensors but the expert bias, which stays fp32.
        drop_bias: exports a model whose Hugging Face form has no expert bias without it.

    Returns:
        How many tensors were written.

    Raises:
        HuggingFaceError: no such form; not a checkpoint of this model; ``out`` is not empty.
    """
    model = adapter.model_config
    config = hf_config(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HuggingFaceError(f"{out} is not an empty folder")
    batches = list(_batches(_wanted(model, checkpoint), dtype))
    biased = routes_by_bias(model)
    if not biased and not drop_bias:
        biases = {n: t for batch in batches for n, t in batch.items() if n.endswith(".expert_bias_E")}
        _refuse_bias(max((t.abs().max().item() for t in _read(checkpoint, biases).values()), default=0.0))
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    total_size = 0
    for number, batch in enumerate(batches, start=1):
        file = f"model-{number:05}-of-{len(batches):05}.safetensors"
        tensors = {
            name: _copy(tensor, torch.float32 if name.endswith(EXPERT_BIAS) else dtype)
            for name, tensor in adapter.to_hf(_read(checkpoint, batch)).items()
            if biased or not name.endswith(EXPERT_BIAS)
        }
        save_file(tensors, out / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": files}
    write_json(out / "model.safetensors.index.json", index)
    write_beside(out, config, dtype, assets)
    return len(files)


def describe(adapter: HuggingFaceAdapter, folder: Path, *, assets: Path, drop_bias: bool = False) -> Folder:
    """Adds config.json and tokenizer to what torchtitan's ``checkpoint.last_save_in_hf`` has written.

    Returns:
        What was there.

    Raises:
        HuggingFaceError: no such form, or not the weights of this model.
    """
    model = adapter.model_config
    config = hf_config(model)
    found = Folder(folder)
    found.fit(model, adapter.tensors)
    if not routes_by_bias(model) and not drop_bias:
        _refuse_bias(found.largest_expert_bias())
    stored = next(t.dtype for name, t in found.tensors.items() if not name.endswith(EXPERT_BIAS))
    write_beside(folder, config, _DTYPES[stored], assets)
    return found


def _refuse_bias(largest: float) -> None:
    """Raises for an expert bias that the Hugging Face model would not route by."""
    if largest:
        raise HuggingFaceError(
            f"the expert bias (up to {largest:.3g}) takes part in routing, and of Hugging Face's models only "
            "DeepSeek-V3 has one; train with moe.load_balance_coeff = 'none', or give --drop-expert-bias and "
            "route differently"
        )


def _wanted(model: Any, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors on meta, in the dtypes of the checkpoint, which must have them all."""
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise HuggingFaceError(f"{checkpoint} is not a DCP checkpoint: {error}") from None
    with torch.device("meta"):
        tensors = model.build().state_dict()
    for name, tensor in tensors.items():
        stored = metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise HuggingFaceError(f"{checkpoint} lacks {name}: it is another model's")
        if stored.size != tensor.shape:
            shapes = f"{list(stored.size)} here and {list(tensor.shape)} in the model"
            raise HuggingFaceError(f"{checkpoint}: {name} is {shapes}")
        tensors[name] = torch.empty(tensor.shape, dtype=stored.properties.dtype, device="meta")
    return tensors


def _batches(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """In order, as many as go into one file; a tensor is never cut."""
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if batch and size + tensor.numel() * dtype.itemsize > MAX_FILE_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += tensor.numel() * dtype.itemsize
    yield batch


def _read(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state_dict = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(state_dict, checkpoint_id=checkpoint)
        except CheckpointException as error:  # a BaseException, with a traceback for a text
            ((reason, _), *_) = error.failures.values()
            raise HuggingFaceError(f"{checkpoint} cannot be read: {type(reason).__name__} {reason}") from None
    return state_dict


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """safetensors refuses views, which the experts of one layer are."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
