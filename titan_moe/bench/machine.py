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


def describe(argv: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, threads, load and command."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if clock.DEVICE == "cuda" else None,
        "threads": torch.get_num_threads(),
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
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, load {about['load_before']:.1f}"
        f"{gpu}; torch {about['torch']}, torchtitan {about['torchtitan']}, titan_moe {about['titan_moe']}; "
        f"`{about['command']}`"
    )


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [text.split(":", 1)[1].strip() for text in file if text.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
