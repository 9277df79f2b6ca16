"""``python -m titan_moe.bench.dispatcher_traffic``: what each dispatcher sends for uniformly routed tokens.

Real rows over gloo between 4 processes of this machine, bf16; every count is from a receipt, and
tests/test_dispatch.py holds receipts against the collectives.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from titan_moe.bench.dispatchers import markdown
from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.base import DispatchLimits, Routing, Traffic
from titan_moe.layer.dispatch.uniform import ranks_per_token
from titan_moe.layer.layout import TokenLayout

NUM_EXPERTS, TOP_K, DIM, EP_SIZE, TOKENS, CHUNK = 64, 8, 2048, 4, 100_000, 1000


def measured() -> Iterator[Sequence[str]]:
    """What was sent, of what all_to_all sends."""
    yield (
        "dispatcher",
        "dispatch GB",
        "combine GB",
        "dispatch / all_to_all",
        "combine / all_to_all",
        "closed form",
    )
    found: dict[str, Traffic] = {}
    for name in dispatch.DISPATCHERS:
        for number, variant in enumerate(dispatch.load(name).variants):
            if name == "local":
                continue
            title = " ".join([f"`{name}`", *map(str, variant.values())])
            found[title] = traffic_of(name, number)
    whole = found["`all_to_all`"]
    form = ranks_per_token(NUM_EXPERTS, TOP_K, EP_SIZE) / TOP_K
    for title, sent in found.items():
        yield (
            title,
            f"{sent.dispatch_bytes / 1e9:.3f}",
            f"{sent.combine_bytes / 1e9:.3f}",
            f"{sent.dispatch_bytes / whole.dispatch_bytes:.4f}",
            f"{sent.combine_bytes / whole.combine_bytes:.4f}",
            "1" if title == "`all_to_all`" else f"{form:.4f}",
        )


def traffic_of(name: str, variant: int) -> Traffic:
    """Over all ranks, for TOKENS tokens with bf16 rows."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(f"{folder}/store", name, variant), nprocs=EP_SIZE)
        return Traffic(*torch.load(f"{folder}/store.sum").tolist())


def _rank(rank: int, store: str, name: str, variant: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=EP_SIZE)
    cls = dispatch.load(name)
    dispatcher = cls.Config(num_experts=NUM_EXPERTS, top_k=TOP_K, **cls.variants[variant]).build()
    limits = DispatchLimits(
        num_experts=NUM_EXPERTS, top_k=TOP_K, dim=DIM, ep_size=EP_SIZE, num_max_tokens_per_rank=CHUNK
    )
    dispatcher.bind(init_device_mesh("cpu", (EP_SIZE,)), limits)
    generator = torch.Generator().manual_seed(rank)
    total = torch.zeros(len(Traffic._fields), dtype=torch.int64)
    for _ in range(TOKENS // EP_SIZE // CHUNK):
        total += torch.tensor(send_chunk(dispatcher, generator))
    dist.all_reduce(total)
    if rank == 0:
        torch.save(total, f"{store}.sum")
    dispatcher.unbind()
    dist.destroy_process_group()


@torch.no_grad()
def send_chunk(
    dispatcher: Any, generator: torch.Generator, num_tokens: int = CHUNK, dim: int = DIM
) -> Traffic:
    """Rows out and back, uniformly routed; the experts hand on what they get."""
    x_TD = torch.ones(num_tokens, dim, dtype=torch.bfloat16)
    ids_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K).indices
    counts_E = torch.bincount(ids_TK.flatten(), minlength=NUM_EXPERTS)
    routing = Routing(torch.full(ids_TK.shape, 1 / TOP_K), ids_TK, counts_E)
    layout = TokenLayout(local_batch_size=1, local_seq_len=num_tokens, dim=dim, global_seq_len=num_tokens)
    sent = dispatcher.dispatch(x_TD, routing, layout)
    assert torch.equal(dispatcher.combine(sent.x_RD, sent.metadata), x_TD)
    return dispatcher.traffic(sent.metadata, x_TD.element_size())


if __name__ == "__main__":
    sys.stderr.write(f"{TOKENS} tokens, D {DIM}, E {NUM_EXPERTS}, K {TOP_K}, EP {EP_SIZE}: about a minute\n")
    sys.stdout.write(markdown(measured()))
