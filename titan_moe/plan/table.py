"""A plan's findings as a console page and as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torchtitan.config import TORCH_DTYPE_MAP

from titan_moe.parallel.blocks import seconds_per_million
from titan_moe.plan.findings import LOADS, Findings

GIB = 2**30
# What an axis carries, for the reader; torchtitan's names.
AXES = {
    "fsdp": "parameters and gradients of all but the experts",
    "efsdp": "parameters and gradients of the experts",
    "dp_replicate": "gradients of all replicas",
    "tp": "activations of all but the routed experts",
    "ep": "tokens to their experts and back",
    "cp": "keys and values",
}


def page(found: Findings, memory_gib: float) -> str:
    """The console page, GiB = 2^30 bytes."""
    blocks = (
        _head(found),
        _held(found),
        _drawn(found),
        _alive(found, memory_gib),
        _sent(found),
        _dispatchers(found),
    )
    lines = [line for block in blocks for line in (*block, "")]
    return "\n".join([*lines, *verdict(found, memory_gib), ""])


def as_json(found: Findings, memory_gib: float) -> dict[str, Any]:
    """The same in bytes."""
    return {
        "config": found.job.resolved,
        "ranks": found.world_size,
        "accumulation": found.accumulation,
        "tokens_per_step": found.tokens,
        "model_parameters": found.model_parameters,
        "held": found.held._asdict(),
        "largest_fsdp_unit": {"name": found.unit[0], "bytes": found.unit[1]},
        "routing": {
            load: {
                "rows_per_moe_layer": found.rows[load],
                "alive_after_forward": found.microbatches[load].after_forward,
                "alive_at_most": found.microbatches[load].peak,
                "peak": found.peak(load),
                "fits": found.peak(load) <= memory_gib * GIB,
            }
            for load in LOADS
        },
        "axes": {name: dataclasses.asdict(axis) for name, axis in found.axes.items()},
        "sent": [
            {"axis": call.axis, "collective": call.collective, "dtype": str(call.dtype), "bytes": amount}
            for call, amount in found.sent.items()
        ],
        "sent_by_axis": found.by_axis(),
        "numbers_drawn": found.drawn,
        "dispatchers": {name: sent._asdict() for name, sent in found.dispatchers.items()},
    }


def _head(found: Findings) -> Iterator[str]:
    resolved, training = found.job.resolved, found.job.trainer.training
    degrees = {name: axis.ranks for name, axis in found.axes.items() if name in AXES}
    mesh = " x ".join(f"{name} {ranks}" for name, ranks in degrees.items()) or "no parallelism"
    yield (
        f"{resolved['model']['name']}/{resolved['model']['flavor']}, {found.model_parameters:,} parameters, "
        f"on {found.world_size} ranks: {mesh}"
    )
    yield (
        f"{resolved['moe']['dispatcher']}, recomputation {resolved['activation_checkpoint']['mode']}, "
        f"{training.local_batch_size} x {training.seq_len} tokens per data rank and microbatch, "
        f"{found.accumulation} per step, {found.tokens:,} tokens in all"
    )
    yield "all numbers: one rank, the one that holds most, GiB"


def _held(found: Findings) -> Iterator[str]:
    held, training = found.held, found.job.trainer.training
    yield f"{'held between steps':46}{'GiB':>10}"
    for title, size in (
        (f"parameters, {training.dtype}", held.parameters),
        ("gradients", held.gradients),
        ("optimizer state", held.optimizer),
        ("buffers", held.buffers),
    ):
        yield f"  {title:44}{size / GIB:10.3f}"
    yield f"  {'sum':44}{sum(held) / GIB:10.3f}"


def _drawn(found: Findings) -> Iterator[str]:
    itemsize = TORCH_DTYPE_MAP[found.job.trainer.training.dtype].itemsize
    excess = found.drawn * itemsize / found.held.parameters
    took = seconds_per_million()
    yield (
        f"first weights: {found.drawn:,} numbers drawn, {excess:.3f} per parameter held; here "
        f"{took * 1e3:.1f} ms per million, {took * found.drawn / 1e6:.0f} s"
    )


def _alive(found: Findings, memory_gib: float) -> Iterator[str]:
    micro = found.microbatches
    yield f"{'in a step, estimated; routing':46}" + "".join(f"{load:>10}" for load in LOADS)
    yield f"  {'rows a MoE layer gets':44}" + "".join(f"{found.rows[load]:>10,}" for load in LOADS)
    for title, sizes in (
        ("activations kept by the forward", [micro[load].after_forward for load in LOADS]),
        ("alive at most, gradients included", [micro[load].peak for load in LOADS]),
        ("peak: that, parameters, state, buffers", [found.peak(load) for load in LOADS]),
        (f"left of {memory_gib:g}", [memory_gib * GIB - found.peak(load) for load in LOADS]),
    ):
        yield f"  {title:44}" + "".join(f"{size / GIB:10.3f}" for size in sizes)
    name, size = found.unit
    yield f"  {f'of which gathered at once by FSDP: {name}':44}{size / GIB:10.3f}"


def _sent(found: Findings) -> Iterator[str]:
    yield f"{'sent to other ranks per step':46}{'GiB':>10}  {'ranks':>5}  {'nodes':>5}  carries"
    for name, amount in found.by_axis().items():
        if name in AXES:
            axis = found.axes[name]
            yield f"  {name:44}{amount / GIB:10.3f}  {axis.ranks:5}  {axis.nodes:5}  {AXES[name]}"
        parts: dict[str, int] = {}
        for call, part in found.sent.items():
            if call.axis == name:
                title = f"{call.collective} {str(call.dtype).removeprefix('torch.')}"
                parts[title] = parts.get(title, 0) + part
        for title, part in parts.items():
            if part >= GIB / 2000 and name in AXES:
                yield f"    {title:42}{part / GIB:10.3f}"
    rest = sum(amount for name, amount in found.by_axis().items() if name not in AXES)
    yield f"  {'counts and norms on other groups':44}{rest / GIB:10.3f}"


def _dispatchers(found: Findings) -> Iterator[str]:
    if not found.dispatchers:
        yield "no expert parallelism: no rows are sent"
        return
    yield f"{'EP by dispatcher, balanced, per step':46}{'dispatch':>10}{'combine':>10}{'all':>10}"
    for name, sent in found.dispatchers.items():
        yield f"  {name:44}" + "".join(f"{amount / GIB:10.3f}" for amount in sent)
    yield "  dispatch, combine: rows of the forwards, closed form; all: with ids, backward, recomputation"


def verdict(found: Findings, memory_gib: float) -> Iterator[str]:
    """Whether it fits, and which axis sends most."""
    balanced, worst = (found.peak(load) / GIB for load in LOADS)
    if balanced > memory_gib:
        yield f"does not fit: {balanced:.2f} of {memory_gib:g} GiB even with balanced routing"
    elif worst > memory_gib:
        yield f"fits with balanced routing, {balanced:.2f} of {memory_gib:g} GiB; the worst takes {worst:.2f}"
    else:
        yield f"fits: {balanced:.2f} of {memory_gib:g} GiB, {worst:.2f} with the worst routing"
    order = [name for name in found.by_axis() if name in AXES]
    for title, names in (
        ("sends most", order),
        ("sends most between nodes", [name for name in order if found.axes[name].nodes > 1]),
    ):
        if names:
            yield f"{title}: {names[0]}, {found.by_axis()[names[0]] / GIB:.2f} GiB per rank and step"
