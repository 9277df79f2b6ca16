"""Shared experts run while combine's rows are on their way, as the profiler saw it on real ranks."""

from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from tests.backends import BACKENDS, load
from tests.layers import Mesh, build_layer, local_rows, on_mesh, parallel_dims, placed
from tests.oracle import Case, random_case
from tests.ranks import RankContext, run_ranks
from titan_moe.layer.dispatch.collectives import wait

RANKS, D, F, E, K = 4, 16, 8, 8, 3
LAUNCH, WAIT, SHARED = (
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::wait_tensor",
    "shared experts",
)
COMMUNICATING = [name for name in BACKENDS if load(name).needs_host_sync]


def forward_events(
    ctx: RankContext, case: Case, mesh: Mesh, dispatcher: str, waiting: bool
) -> list[tuple[int, str]]:
    """Launches and waits of one forward, and where the shared experts begin and end, by time."""
    dims = parallel_dims(ctx, mesh)
    layer: Any = on_mesh(build_layer(case, dispatcher), dims, mesh)
    shared_forward = layer.shared_experts.forward

    def traced_shared(x_BLD: Any) -> Any:
        with record_function(SHARED):
            return shared_forward(x_BLD)

    layer.shared_experts.forward = traced_shared
    if waiting:
        start = layer.routed_experts.token_dispatcher.start_combine
        layer.routed_experts.token_dispatcher.start_combine = lambda *args: wait(start(*args))
    x_BLD = placed(local_rows(case.params["x_BLD"], ctx.rank // mesh.tp, dims), dims, mesh)
    layer(x_BLD)  # once-only work
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        layer(x_BLD)
    events = []
    for event in trace.events():
        if event.name in (LAUNCH, WAIT):
            events.append((event.time_range.start, event.name))
        elif event.name == SHARED:
            events += [(event.time_range.start, "begin"), (event.time_range.end, "end")]
    return sorted(events)


def overlaps(events: list[tuple[int, str]]) -> bool:
    """Whether an all-to-all was under way from before the shared experts began until after their end."""
    names = [name for _, name in events]
    before, after = names[: names.index("begin")], names[names.index("end") + 1 :]
    assert before.count(LAUNCH) >= 3, "counts, rows, and the rows on their way back"
    return before[-1] == LAUNCH and after[0] == WAIT


@pytest.mark.parametrize("dispatcher", COMMUNICATING)
@pytest.mark.parametrize("mesh", [Mesh(ep=4), Mesh(tp=2, ep=4), Mesh(tp=2, ep=2, sp=False)], ids=str)
@pytest.mark.parametrize("waiting", [False, True], ids=["ours", "waits at once"])
def test_shared_experts_run_while_rows_are_in_flight(mesh: Mesh, dispatcher: str, waiting: bool) -> None:
    case = random_case(7, 2 * RANKS // mesh.tp, 7, D, F, E, K, shared=True)
    for events in run_ranks(forward_events, RANKS, case, mesh, dispatcher, waiting):
        assert overlaps(events) is not waiting, events


def test_there_are_dispatchers_that_communicate() -> None:
    assert len(COMMUNICATING) >= 3
