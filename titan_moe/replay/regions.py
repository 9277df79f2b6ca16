"""Recomputation routes as its forward did.

A region is one checkpointed forward. torch.utils.checkpoint asks ``context_fn`` for a pair of contexts per
call and enters the second one around each recomputation of that very call: what the routers chose is handed
over between the two. So neither the order of backwards, nor microbatches in flight, nor the thread matter.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from titan_moe.layer.router import Selection

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class Region:
    """One checkpointed forward: what each router in it chose, call by call."""

    def __init__(self) -> None:
        self.choices: dict[str, list[Selection]] = {}


class _Inside:
    """A thread is inside a region: in its forward, or in a recomputation. May be entered again."""

    def __init__(self, regions: "Regions", region: Region, wrapped: Any, *, recomputes: bool) -> None:
        self.regions, self.region, self.wrapped, self.recomputes = regions, region, wrapped, recomputes
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> None:
        self.wrapped.__enter__()
        self.calls.clear()
        self.regions.stack.append(self)

    def __exit__(self, *error: Any) -> Any:
        self.regions.stack.remove(self)
        return self.wrapped.__exit__(*error)

    def take(self, name: str) -> Selection:
        """What the router chose in the forward, at the same call of this region."""
        call = self.calls[name]
        self.calls[name] += 1
        chosen = self.region.choices.get(name, [])
        if call >= len(chosen):
            raise RuntimeError(
                f"{name} was called {len(chosen)} times in a checkpointed forward and {call + 1} times in "
                "its recomputation"
            )
        return chosen[call]


class Regions:
    """All regions of one model."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def stack(self) -> list[_Inside]:
        """The regions that this thread is inside of, the outermost first."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    @property
    def recomputing(self) -> bool:
        """Whether this thread is inside a recomputation."""
        return any(inside.recomputes for inside in self.stack)

    def pin(self, model: nn.Module) -> int:
        """Makes a region of every checkpointed module of ``model``, in place; returns how many there are."""
        wrappers = [
            (module, arguments)
            for module in model.modules()
            if isinstance(module, CheckpointWrapper)
            # torch refuses activation_checkpoint.debug together with contexts.
            and not (arguments := getattr(module.checkpoint_fn, "keywords", {})).get("debug")
        ]
        for wrapper, arguments in wrappers:
            contexts = functools.partial(self.contexts, arguments.get("context_fn"))
            wrapper.checkpoint_fn = functools.partial(wrapper.checkpoint_fn, context_fn=contexts)
        return len(wrappers)

    def contexts(self, context_fn: Callable[[], Contexts] | None = None) -> Contexts:
        """A ``context_fn`` for torch.utils.checkpoint, around another one."""
        forward, recompute = context_fn() if context_fn is not None else (nullcontext(), nullcontext())
        region = Region()
        return (
            _Inside(self, region, forward, recomputes=False),
            _Inside(self, region, recompute, recomputes=True),
        )

    def choose(self, name: str, choose: Callable[[], Selection]) -> Selection:
        """What a recomputation's forward chose, or ``choose()``, kept for recomputations to come."""
        stack = self.stack
        outermost = next((inside for inside in stack if inside.recomputes), None)
        if outermost is not None:
            selection = outermost.take(name)
        else:
            with unseen_by_selective_ac() if stack else nullcontext():
                selection = choose()
        for inside in stack:
            if not inside.recomputes:
                inside.region.choices.setdefault(name, []).append(selection)
        return selection


@contextmanager
def unseen_by_selective_ac() -> Iterator[None]:
    """Selective checkpointing hands saved results back by position, per operator.

    A recomputation does not select again. So what the selection computes in the forward must take no
    position, or every later operator of the same kind gets another one's result. The same holds for the sums
    of a check.
    """
    with ExitStack() as popped:
        while isinstance(_get_current_dispatch_mode(), _CachingTorchDispatchMode | _CachedTorchDispatchMode):
            popped.enter_context(_pop_mode_temporarily())
        yield
