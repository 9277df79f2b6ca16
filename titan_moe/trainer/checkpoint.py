"""Checkpoints that are looked at before they are trusted.

A save that was cut short leaves no ``.metadata``: torchtitan then continues from the one before, and here
says so. A damaged file would load as other numbers, since torch skips the CRCs that its archives carry: here
they are checked, each rank its part of the entries, before anything is loaded. A last step in Hugging Face's
format has weights only: a run that goes on, goes on from the DCP checkpoint before it.
"""

import io
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.components import checkpointer as upstream
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

_INDEX = "model.safetensors.index.json"


class CheckpointError(RuntimeError):
    """A checkpoint that must not be loaded; names the file."""


class CheckpointManager(upstream.CheckpointManager):
    """torchtitan's manager (DCP, sync and async, Hugging Face), which checks what it loads."""

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.CheckpointManager.Config):
        """torchtitan 0.3.0's fields, and ours."""

        verify: bool = True  # read a local checkpoint once more before loading it, and check its CRCs

        def __post_init__(self) -> None:
            # torchtitan warns that initial_load_model_only has no effect where it is the default.
            given = self.initial_load_model_only
            self.initial_load_model_only = given and bool(self.initial_load_path or self.initial_load_in_hf)
            upstream.CheckpointManager.Config.__post_init__(self)
            self.initial_load_model_only = given

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.verify = config.verify

    def exported_step(self) -> int:
        """The last step that was saved in Hugging Face's format; -1 if none was."""
        return max(exported(Path(self.folder)), default=-1) if self.enable else -1

    def _find_load_step(self, folder: str = "") -> int:
        here = Path(folder or self.folder)
        found = super()._find_load_step(folder)
        if found in exported(here):
            weights = here / f"step-{found}"
            found = max(complete(here), default=-1)
            if found < 0:
                raise CheckpointError(self._weights_only(weights))
            logger.warning(f"{weights} has weights only (Hugging Face); continuing from step {found}")
        for step in unfinished(here, newer_than=found):
            instead = f"continuing from step {found}" if found >= 0 else "there is none before it"
            logger.warning(f"checkpoint of step {step} has no .metadata, its save did not finish; {instead}")
        return found

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: upstream.AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """As torchtitan; the expert bias keeps its dtype, and a Hugging Face folder is made complete."""
        whole = self.states[upstream.MODEL].state_dict()
        state_dict |= {name: whole[name] for name in state_dict if name.endswith(".expert_bias_E")}
        if to_hf and _rank_and_size()[0] == 0:
            adapter: Any = self.sd_adapter  # first: the index of the weights is what says complete
            adapter.write_beside(checkpoint_id, self.export_dtype)
        return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """As torchtitan. Raises CheckpointError on all ranks, before anything is loaded."""
        if not from_hf and exports(Path(checkpoint_id)):
            raise CheckpointError(self._weights_only(Path(checkpoint_id)))
        if self.verify and not from_hf and not filesystem.is_remote(checkpoint_id):
            _raise_together(damage(Path(checkpoint_id), *_rank_and_size()))
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def _weights_only(self, checkpoint: Path) -> str:
        what = f"{checkpoint} has weights only (Hugging Face)"
        if checkpoint.parent != Path(self.folder):
            return f"{what}; set checkpoint.initial_load_in_hf = true"
        if steps := complete(checkpoint.parent):
            return f"{what}; continue from another with checkpoint.load_step = {steps[-1]}"
        return (
            f"{what}, and no other checkpoint is there; start from it with another dump_folder, "
            "checkpoint.initial_load_in_hf = true and "
            f"checkpoint.initial_load_path = '{checkpoint.absolute()}'"
        )


def complete(folder: Path) -> list[int]:
    """Steps of a folder that can be continued from: ``.metadata`` is what a DCP save writes last."""
    return [step for step, path in _steps(folder) if (path / ".metadata").exists()]


def exported(folder: Path) -> list[int]:
    """Steps of a folder that are in Hugging Face's format."""
    return [step for step, path in _steps(folder) if exports(path)]


def exports(checkpoint: Path) -> bool:
    """Whether it is in Hugging Face's format alone: a run that went on may have saved both."""
    return (checkpoint / _INDEX).exists() and not (checkpoint / ".metadata").exists()


def unfinished(folder: Path, *, newer_than: int) -> list[int]:
    """Steps after ``newer_than`` with a folder in which no format is complete."""
    whole = {*complete(folder), *exported(folder)}
    return [step for step, _ in _steps(folder) if step > newer_than and step not in whole]


def _steps(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def damage(checkpoint: Path, rank: int, size: int) -> str | None:
    """What is wrong with a DCP checkpoint, in one line, or None. Reads one of ``size`` parts of it."""
    try:
        entries = FileSystemReader(checkpoint).read_metadata().storage_data
    except FileNotFoundError:
        return f"{checkpoint}: no .metadata, so its save did not finish"
    except Exception as error:  # a pickle: truncation shows as any of a dozen types
        return f"{checkpoint / '.metadata'}: truncated or damaged ({type(error).__name__}: {error})"
    named = sorted((info.relative_path, info.offset, info.length) for info in (entries or {}).values())
    return _damaged_file(checkpoint, named) or _damaged_entry(checkpoint, named[rank::size])


def _damaged_file(checkpoint: Path, entries: Iterable[tuple[str, int, int]]) -> str | None:
    ends: dict[str, int] = {}
    for path, offset, length in entries:
        ends[path] = max(ends.get(path, 0), offset + length)
    for path, end in ends.items():
        file = checkpoint / path
        if not file.is_file():
            return f"{file}: missing"
        if (there := file.stat().st_size) < end:
            return f"{file}: truncated, {there} of {end} bytes"
    return None


def _damaged_entry(checkpoint: Path, entries: Iterable[tuple[str, int, int]]) -> str | None:
    for path, offset, length in entries:
        with (checkpoint / path).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        try:
            broken = zipfile.ZipFile(io.BytesIO(data)).testzip()
        except zipfile.BadZipFile as error:
            broken = str(error)
        if broken is not None:
            return f"{checkpoint / path}: damaged between bytes {offset} and {offset + length} ({broken})"
    return None


def _raise_together(problem: str | None) -> None:
    problems: list[str | None] = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise CheckpointError(f"{first}; load another with checkpoint.load_step, or restore the file")


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
