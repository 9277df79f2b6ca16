"""Where and with what the numbers were made."""

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import torch

import titan_moe
from titan_moe.bench import clock
from titan_moe.trainer.device import multiplies_bf16


def describe(argv: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, threads, load and command."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if clock.DEVICE == "cuda" else None,
        "threads": torch.get_num_threads(),
        "bf16_matmuls": clock.DEVICE == "cuda" or multiplies_bf16(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "torchtitan": importlib.metadata.version("torchtitan"),
        "titan_moe": titan_moe.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", "-m", "titan_moe.bench", *argv]),
    }


def line(about: dict[str, Any]) -> str:
    """In one."""
    gpu = f", {about['gpu']}" if about["gpu"] else ""
    matmuls = "" if about["bf16_matmuls"] else ", bf16 matmuls by fp32"
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, load {about['load_before']:.1f}"
        f"{gpu}{matmuls}; torch {about['torch']}, torchtitan {about['torchtitan']}, titan_moe "
        f"{about['titan_moe']}; `{about['command']}`"
    )


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [text.split(":", 1)[1].strip() for text in file if text.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
