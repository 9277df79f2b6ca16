"""What stands beside the weights in a Hugging Face folder: config.json and the tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

# What transformers, vLLM and torchtitan look for beside the weights.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def write_beside(out: Path, config: dict[str, Any], dtype: torch.dtype, assets: Path) -> None:
    """Adds config.json, with the ids of the special tokens, and the tokenizer's files to ``out``.

    Args:
        config: of ``hf_config``.
        dtype: of the weights.
        assets: the folder with the tokenizer.
    """
    config = config | _special_tokens(assets) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    out.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (assets / name).is_file() and not (out / name).exists():
            shutil.copyfile(assets / name, out / name)
    write_json(out / "config.json", config)


def _special_tokens(assets: Path) -> dict[str, Any]:
    """``eos_token_id`` and the like; null where unknown, or transformers would take its own defaults."""
    ids: dict[str, Any] = dict.fromkeys(f"{name}_id" for name in _SPECIAL_TOKENS)
    names, vocabulary = assets / "tokenizer_config.json", assets / "tokenizer.json"
    if names.is_file() and vocabulary.is_file():
        tokenizer, given = Tokenizer.from_file(str(vocabulary)), json.loads(names.read_text(encoding="utf-8"))
        for name in _SPECIAL_TOKENS:
            token = given.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            ids[f"{name}_id"] = tokenizer.token_to_id(token) if token else None
    return ids


def write_json(file: Path, content: dict[str, Any]) -> None:
    """``content``, for humans too."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
