"""``python -m titan_moe convert export | describe | check``: Hugging Face folders. docs/hugging_face.md.

RUN is the dump folder of a run. Exit status: 0, or 2 and one line on stderr.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titan_moe.models.hugging_face.adapter import HuggingFaceAdapter
from titan_moe.models.hugging_face.config_json import HuggingFaceError
from titan_moe.models.hugging_face.export import describe, export
from titan_moe.models.hugging_face.folder import EXPERT_BIAS, Folder
from titan_moe.trainer.config import ConfigError, toml
from titan_moe.trainer.config.build import TypedConfig, build

_DTYPES = ("float32", "bfloat16", "float16")
_INDEX = "model.safetensors.index.json"


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    args, overrides = _parser().parse_known_args(argv)
    logging.disable(logging.WARNING)  # one line means one line
    try:
        if overrides and args.command != "check":
            raise HuggingFaceError(f"{overrides[0]} is not an argument of {args.command}")
        print(_COMMANDS[args.command](args, overrides))
    except (ConfigError, HuggingFaceError, OSError) as error:
        print(f"titan_moe: {error}", file=sys.stderr)
        return 2
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _export(args: argparse.Namespace, _: list[str]) -> str:
    plan, adapter = _run(args.run)
    folder = _step(args.run / plan.trainer.checkpoint.folder, args.step)
    if (folder / _INDEX).exists():
        raise HuggingFaceError(f"{folder} is in Hugging Face's format already; describe adds config.json")
    number = export(
        adapter,
        folder,
        args.out,
        assets=Path(plan.trainer.hf_assets_path),
        dtype=getattr(torch, args.dtype),
        drop_bias=args.drop_expert_bias,
    )
    return f"{args.out}: {number} tensors in {args.dtype}, from {folder}"


def _describe(args: argparse.Namespace, _: list[str]) -> str:
    plan, adapter = _run(args.run)
    folder = _step(args.run / plan.trainer.checkpoint.folder, args.step)
    if not (folder / _INDEX).exists():
        raise HuggingFaceError(f"{folder} is a DCP checkpoint; export makes a Hugging Face folder of it")
    assets = Path(plan.trainer.hf_assets_path)
    found = describe(adapter, folder, assets=assets, drop_bias=args.drop_expert_bias)
    biases = {tensor.dtype for name, tensor in found.tensors.items() if name.endswith(EXPERT_BIAS)}
    rounded = "; its expert bias was rounded by checkpoint.export_dtype: routes may differ from training's"
    return f"{folder}: {len(found.tensors)} tensors, config.json added{'' if biases <= {'F32'} else rounded}"


def _check(args: argparse.Namespace, overrides: list[str]) -> str:
    plan, adapter = _plan([str(args.config), *overrides])
    folder = Folder(plan.trainer.checkpoint.initial_load_path or plan.trainer.hf_assets_path)
    folder.fit(adapter.model_config, adapter.tensors)
    found = f"{folder.path}: {len(adapter.tensors)} tensors fit"
    if folder.block_size:
        found += f", fp8 in blocks of {folder.block_size}"
    if left_out := folder.mtp_layers(adapter.tensors):
        found += f", {len(left_out)} of multi-token prediction layers are left out"
    return found


_COMMANDS = {"export": _export, "describe": _describe, "check": _check}


def _run(run: Path) -> tuple[TypedConfig, HuggingFaceAdapter]:
    if not (run / "resolved.toml").is_file():
        raise HuggingFaceError(f"{run} holds no resolved.toml; name the dump folder of a run")
    return _plan([str(run / "resolved.toml")])


def _plan(argv: list[str]) -> tuple[TypedConfig, HuggingFaceAdapter]:
    """A typed configuration, without the rules that count ranks; and its model's adapter."""
    plan = build(toml.read(argv))
    adapter: Any = plan.spec.state_dict_adapter
    return plan, adapter(plan.spec.model, None)


def _step(folder: Path, wanted: int | None) -> Path:
    """``folder/step-N``, the last one unless ``wanted``."""
    found = {
        int(match[1]): path
        for path in folder.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    if not found:
        raise HuggingFaceError(f"{folder} holds no checkpoint; run with --checkpoint.enable")
    if wanted is not None and wanted not in found:
        there = ", ".join(map(str, sorted(found)))
        raise HuggingFaceError(f"{folder}: --step {wanted} is not there (there are: {there})")
    return found[max(found) if wanted is None else wanted]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_moe convert", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export", help="a DCP checkpoint to a Hugging Face folder", allow_abbrev=False
    )
    describe = commands.add_parser(
        "describe", help="config.json for last_save_in_hf's folder", allow_abbrev=False
    )
    check = commands.add_parser("check", help="does a Hugging Face folder fit a model?", allow_abbrev=False)
    for command in (export, describe):
        command.add_argument("run", type=Path, metavar="RUN")
        command.add_argument("--step", type=int, help="the last one, unless given")
        command.add_argument("--drop-expert-bias", action="store_true", help="where the format has none")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--dtype", choices=_DTYPES, default="float32", help="float32")
    check.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help="and --section.key value as in training"
    )
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
