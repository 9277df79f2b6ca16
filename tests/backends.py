"""Every registered dispatcher, in every variant its class declares, under a name for test ids."""

from typing import Any

from titan_moe.layer import dispatch


def _variants(name: str) -> tuple[dict[str, Any], ...]:
    try:
        return dispatch.load(name).variants
    except ImportError:  # its library is not here; the tests skip it and say so
        return ({},)


BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "-".join([name, *map(str, variant.values())]): (name, variant)
    for name in dispatch.DISPATCHERS
    for variant in _variants(name)
}


def load(backend: str) -> Any:
    """The dispatcher class behind a name in BACKENDS."""
    return dispatch.load(BACKENDS[backend][0])


def config(backend: str, *, num_experts: int, top_k: int) -> Any:
    """Its Config, in this variant."""
    return load(backend).Config(num_experts=num_experts, top_k=top_k, **BACKENDS[backend][1])


def promises(backend: str) -> str | None:
    """The backend that it has the bits of, or None. As an instance says: a variant may promise more."""
    return config(backend, num_experts=2, top_k=1).build().bitwise_equal_to
