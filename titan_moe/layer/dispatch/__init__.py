"""Token dispatchers by name. Adding one = one file + one line here (docs/add_a_dispatcher.md)."""

import difflib
import importlib
from typing import Any, NamedTuple

# Lazy strings: naming a backend must not import its libraries.
DISPATCHERS: dict[str, str] = {
    "local": "titan_moe.layer.dispatch.local:LocalDispatcher",
    "all_to_all": "titan_moe.layer.dispatch.all_to_all:AllToAllDispatcher",
    "deepep": "titan_moe.layer.dispatch.deepep.dispatcher:DeepEPDispatcher",
}


def load(name: str) -> type:
    """Imports and returns the dispatcher class registered as ``name``.

    Raises:
        ValueError: ``name`` is not registered; the message lists the names and the nearest one.
    """
    if name not in DISPATCHERS:
        near = difflib.get_close_matches(name, DISPATCHERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is not a dispatcher (there are: {', '.join(DISPATCHERS)}){hint}")
    module, cls = DISPATCHERS[name].split(":")
    return getattr(importlib.import_module(module), cls)


class Variant(NamedTuple):
    """A registered dispatcher with some of its options set."""

    dispatcher: str
    options: dict[str, Any]

    @property
    def flags(self) -> list[str]:
        """The flags that choose it on train's command line."""
        options = [f"--moe.{self.dispatcher}.{key}={value}" for key, value in self.options.items()]
        return [f"--moe.dispatcher={self.dispatcher}", *options]

    def build(self) -> Any:
        """An unbound dispatcher for 2 experts, to read facts from: ``serves_ep``, ``bitwise_equal_to``."""
        cls: Any = load(self.dispatcher)
        return cls.Config(num_experts=2, top_k=1, **self.options).build()


def variants() -> dict[str, Variant]:
    """Every registered dispatcher in each of its variants, by a short name such as ``deepep per_slot``.

    The name has only those options in which the variants of the dispatcher differ.
    """
    found = {}
    for name in DISPATCHERS:
        cls: Any = load(name)
        for options in cls.variants:
            differing = [v for k, v in options.items() if any(o.get(k) != v for o in cls.variants)]
            found[" ".join([name, *map(str, differing)])] = Variant(name, options)
    return found
