"""Token dispatchers by name. Adding one = one file + one line here (docs/add_a_dispatcher.md)."""

import difflib
import importlib

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
