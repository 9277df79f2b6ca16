"""``python -m titan_moe dispatchers``: facts of the registered dispatchers, and what uniform routing costs.

The tables of docs/dispatchers.md.
"""

import sys
from collections.abc import Iterator, Sequence

from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.uniform import ranks_per_token

MODELS = {  # E, K, G, groups a token may use
    "E 64, K 8": (64, 8, None, None),
    "Qwen3-30B-A3B: E 128, K 8": (128, 8, None, None),
    "E 256, K 8": (256, 8, None, None),
    "DeepSeek-V3: E 256, K 8, 4 of 8 groups": (256, 8, 8, 4),
}
EP_SIZES = (2, 4, 8, 16, 32, 64)


def facts() -> Iterator[Sequence[str]]:
    """A line per dispatcher and variant, read from its class."""
    yield "dispatcher", "moves", "host sync", "has the bits of", "needs", "choose it"
    for variant in dispatch.variants().values():
        built = variant.build()
        options = ", ".join(f"{key} = {value}" for key, value in variant.options.items())
        sync = "one, in dispatch" if built.needs_host_sync else "none"
        bits = f"`{built.bitwise_equal_to}`" if built.bitwise_equal_to else "-"
        name = f"`{variant.dispatcher}`{' ' * bool(options)}{options}"
        yield name, built.moves, sync, bits, built.needs, built.choose


def closed_form() -> Iterator[Sequence[str]]:
    """Rows that a token sends if it sends one per rank, as a fraction of K, by EP size."""
    yield "uniform routing, rows / K", *(f"EP {ep}" for ep in EP_SIZES)
    for title, (num_experts, top_k, groups, limited) in MODELS.items():
        rows = [
            ranks_per_token(num_experts, top_k, ep, num_expert_groups=groups, num_limited_groups=limited)
            for ep in EP_SIZES
        ]
        yield title, *(f"{n / top_k:.3f}" for n in rows)


def markdown(lines: Iterator[Sequence[str]]) -> str:
    """Returns a markdown table; the first line has the heads."""
    head, *body = lines
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(f"{markdown(facts())}\n{markdown(closed_form())}")
