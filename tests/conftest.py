"""What every test gets: the CPU device type, one thread, a seed, and a check for leaked process groups."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # `tests.oracle`, `tests.ranks` from any directory

import titan_moe.trainer  # noqa: F401, I001  (before torchtitan: it sets the device type that others read)
import pytest
import torch
import torch.distributed as dist

from tests.ranks import close_pools


def pytest_configure() -> None:
    """One thread, as in the workers: fp32 matmuls round differently with more."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine, or this run, is not for."""
    devices = torch.cuda.device_count()
    reasons = {
        "gpu": "" if devices >= 1 else "no CUDA device",
        "multi_gpu": "" if devices >= 2 else f"{devices} CUDA devices, needs 2",
        "slow": "" if os.environ.get("TITAN_MOE_SLOW") == "1" else "set TITAN_MOE_SLOW=1 to run",
    }
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure() -> None:
    """Ends the workers of run_ranks; also reached after Ctrl-C."""
    close_pools()


@pytest.fixture(autouse=True)
def _seeded_and_alone() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group in the test process; use run_ranks or destroy it")
