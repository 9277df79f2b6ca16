"""``import titan_moe`` imports nothing and changes nothing, and its public names are those of the layer."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import titan_moe

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout


def test_importing_it_imports_no_torch() -> None:
    assert run("import sys, titan_moe; print('torch' in sys.modules, titan_moe.__version__)").split() == [
        "False",
        titan_moe.__version__,
    ]


def test_using_the_layer_changes_nothing_in_torch() -> None:
    """On a CPU the trainer replaces the total norm and torchtitan's device; the layer alone must not."""
    seen = run(
        "import torch; before = torch.nn.utils.get_total_norm\n"
        "from titan_moe import MoE, RolloutReplay, swap_moe\n"
        "print(torch.nn.utils.get_total_norm is before)\n"
        "import titan_moe.trainer\n"
        "print(torch.nn.utils.get_total_norm is before)\n"
    ).split()
    assert seen == ["True", "False" if not _has_accelerator() else "True"]


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


@pytest.mark.parametrize("name", titan_moe.__all__)
def test_public_names(name: str) -> None:
    found = getattr(titan_moe, name)
    assert getattr(importlib.import_module(found.__module__), name) is found
    assert name in dir(titan_moe)


def test_all_is_what_can_be_had() -> None:
    assert titan_moe.__all__ == sorted(titan_moe._HOMES, key=titan_moe.__all__.index)
    with pytest.raises(AttributeError, match=r"no attribute 'Moe'; its names are .*MoE"):
        titan_moe.Moe  # noqa: B018
