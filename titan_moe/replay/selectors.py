"""One selector per router: it says which experts are used, by layer name, microbatch and call.

They are bound by a walk over the live model. A selector keeps nothing: what belongs to a microbatch is in the
Microbatch, what belongs to a checkpointed forward is in its Region.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import nn

from titan_moe.layer.layout import TokenLayout
from titan_moe.layer.names import plain_name
from titan_moe.layer.recomputation import is_recomputing
from titan_moe.layer.router import Query, Selection, TokenChoiceTopKRouter
from titan_moe.replay.ids import LayerShape, balanced_ranking, fill_missing
from titan_moe.replay.regions import Regions


class Installed(NamedTuple):
    """Ids to replay in one microbatch.

    Attributes:
        ids_PCK: ``(B * L, columns, K)`` on the routers' device, MISSING where there is none.
        columns: which column is whose: by (layer, call).
        has_missing: whether any is MISSING; passed in, because looking would cost a device sync.
        valid_P: bool, False for padding; None: no padding.
    """

    ids_PCK: torch.Tensor
    columns: dict[tuple[str, int], int]
    has_missing: bool
    valid_P: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One forward of the model.

    Attributes:
        number: in its step.
        tokens_P: int64 global token index of each place of the (B, L) grid, in that order.
        calls: how often each layer was called so far.
    """

    number: int
    tokens_P: torch.Tensor
    installed: Installed | None = None
    calls: Counter[str] = field(default_factory=Counter)


class Origin(NamedTuple):
    """Which invocation a selection belongs to, and what was installed for it; all None where it is live.

    Attributes:
        installed_TK: in the installed dtype, a tensor of its own: what happens to the chosen ids does not
            reach it.
        tokens_T: global token indices.
    """

    layer: str
    microbatch: int
    call: int
    installed_TK: torch.Tensor | None = None
    tokens_T: torch.Tensor | None = None
    filled_TK: torch.Tensor | None = None
    load_T: torch.Tensor | None = None


class Observer(Protocol):
    """Sees every selection of a microbatch's forwards; a recorder or a check."""

    def selected(
        self, selector: "ReplaySelector", microbatch: Microbatch, selection: Selection, query: Query
    ) -> None:
        """It is called once per router call, and not in recomputations."""


class ReplaySelector:
    """Selects a router's experts: those of a recorded forward, replayed ones, or the router's own."""

    def __init__(self, layer: str, router: TokenChoiceTopKRouter, regions: Regions) -> None:
        self.layer, self.regions = layer, regions
        self.shape = LayerShape(layer, router.config.num_experts, router.config.top_k)
        self.session: ReplaySession | None = None
        router.selector = self

    @property
    def in_microbatch(self) -> bool:
        """Whether ids are to be replayed in a forward now."""
        return self.session is not None and self.session.active

    def __call__(self, query: Query) -> Selection:
        """The selection of a recomputation's forward; else a replayed one; else the router's own."""
        return self.regions.choose(self.layer, lambda: self._choose(query))

    def _choose(self, query: Query) -> Selection:
        return Selection(query.live()) if self.session is None else self.session.choose(self, query)


def bind_selectors(model: nn.Module, regions: Regions) -> list[ReplaySelector]:
    """Gives every router of ``model`` a selector; returns them in the order of its layers."""
    return [
        ReplaySelector(plain_name(name).removesuffix(".router"), module, regions)
        for name, module in model.named_modules()
        if isinstance(module, TokenChoiceTopKRouter)
    ]


def selectors_of(model: nn.Module) -> list[ReplaySelector]:
    """The selectors that are bound to ``model``."""
    routers = [module for module in model.modules() if isinstance(module, TokenChoiceTopKRouter)]
    return [router.selector for router in routers if isinstance(router.selector, ReplaySelector)]


class ReplaySession:
    """What the selectors of a model consult while a microbatch runs; outside of one, they route live."""

    def __init__(
        self,
        selectors: list[ReplaySelector],
        *,
        fill: Literal["score", "balanced"] = "score",
        fill_weight: Literal["live", "zero"] = "live",
        ep_size: int = 1,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self.selectors = {selector.layer: selector for selector in selectors}
        self.fill, self.fill_weight, self.ep_size = fill, fill_weight, ep_size
        self.observers = observers
        self._microbatch: Microbatch | None = None

    @property
    def active(self) -> bool:
        """Whether a microbatch with ids to replay is running."""
        return self._microbatch is not None and self._microbatch.installed is not None

    @contextmanager
    def microbatch(self, microbatch: Microbatch) -> Iterator[Microbatch]:
        """Forwards in this context belong to ``microbatch``.

        A recomputation reuses its forward's ids even outside of this context. The model's selectors stay with
        the session that was entered last.
        """
        for selector in self.selectors.values():
            selector.session = self
        before, self._microbatch = self._microbatch, microbatch
        try:
            yield microbatch
        finally:
            self._microbatch = before

    def choose(self, selector: ReplaySelector, query: Query) -> Selection:
        """Selects the experts of one router call: installed ids if there are some, else the router's own."""
        if is_recomputing():
            raise RuntimeError(
                f"{selector.layer}: a recomputation outside of a region would route live; checkpoint with "
                "torchtitan's activation_checkpoint (its debug off) or with Regions.contexts"
            )
        microbatch = self._microbatch
        if microbatch is None:
            return Selection(query.live())
        call = microbatch.calls[selector.layer]
        microbatch.calls[selector.layer] += 1
        installed = microbatch.installed
        if installed is None or (selector.layer, 0) not in installed.columns:
            selection = Selection(query.live(), origin=Origin(selector.layer, microbatch.number, call))
        elif (selector.layer, call) in installed.columns:
            selection = self._replayed(selector, microbatch, installed, call, query)
        else:
            raise RuntimeError(
                f"{selector.layer}: call {call} in one microbatch, and ids are installed for {call}; give "
                "each forward a microbatch of its own"
            )
        for observer in self.observers:
            observer.selected(selector, microbatch, selection, query)
        return selection

    def _replayed(
        self, selector: ReplaySelector, microbatch: Microbatch, installed: Installed, call: int, query: Query
    ) -> Selection:
        places_T = places(selector.layer, query.layout, installed.ids_PCK)
        column = installed.columns[selector.layer, call]
        installed_TK = installed.ids_PCK[:, column].index_select(0, places_T)
        tokens_T = microbatch.tokens_P.index_select(0, places_T)
        load_T = None if installed.valid_P is None else installed.valid_P.index_select(0, places_T)
        ids_TK, filled_TK = installed_TK.to(torch.int64, copy=True), None
        if installed.has_missing:
            ranking_TE = query.ranking()
            if self.fill == "balanced":
                _, num_experts, top_k = selector.shape
                ranking_TE = balanced_ranking(tokens_T, num_experts, top_k, self.ep_size)
            ids_TK, filled_TK = fill_missing(ids_TK, ranking_TE)
        return Selection(
            ids_TK,
            weightless_TK=filled_TK if self.fill_weight == "zero" else None,
            load_T=load_T,
            origin=Origin(selector.layer, microbatch.number, call, installed_TK, tokens_T, filled_TK, load_T),
        )


def places(layer: str, layout: TokenLayout | None, ids_PCK: torch.Tensor) -> torch.Tensor:
    """``(T,)``: where this rank's tokens sit in the microbatch's (B, L) grid.

    Raises:
        ValueError: the grid of the installed ids is not that of the tokens.
    """
    if layout is None:
        raise ValueError(f"{layer}: replay needs to know whose tokens these are: give the router a layout")
    places_in_grid = layout.local_batch_size * layout.global_seq_len
    if places_in_grid != ids_PCK.shape[0]:
        raise ValueError(
            f"{layer}: the forward has {layout.local_batch_size} x {layout.global_seq_len} tokens, "
            f"{ids_PCK.shape[0]} are installed"
        )
    return layout.global_token_indices(ids_PCK.device)
