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
    for name in dispatch.DISPATCHERS:
        cls = dispatch.load(name)
        for variant in cls.variants:
            built = cls.Config(num_experts=2, top_k=1, **variant).build()
            options = ", ".join(f"{key} = {value}" for key, value in variant.items())
            sync = "one, in dispatch" if cls.needs_host_sync else "none"
            bits = f"`{built.bitwise_equal_to}`" if built.bitwise_equal_to else "-"
            yield (
                f"`{name}`{' ' * bool(options)}{options}",
                built.moves,
                sync,
                bits,
                built.needs,
                built.choose,
            )


def closed_form() -> Iterator[Sequence[str]]:
    """Rows of one per rank, as a part of K, by EP size."""
    yield "uniform routing, rows / K", *(f"EP {ep}" for ep in EP_SIZES)
    for title, (num_experts, top_k, groups, limited) in MODELS.items():
        rows = [
            ranks_per_token(num_experts, top_k, ep, num_expert_groups=groups, num_limited_groups=limited)
            for ep in EP_SIZES
        ]
        yield title, *(f"{n / top_k:.3f}" for n in rows)


def markdown(lines: Iterator[Sequence[str]]) -> str:
    """A table, its first line the heads."""
    head, *body = lines
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(f"{markdown(facts())}\n{markdown(closed_form())}")
