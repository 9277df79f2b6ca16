"""The registry's variants: a short name for each, and the flags that choose it."""

from dataclasses import dataclass

import pytest

from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.all_to_all import AllToAllDispatcher
from titan_moe.trainer.config import load

CONFIG = "train_configs/debug_fsdp_tp_ep.toml"


def test_every_variant_has_a_name_that_says_what_differs() -> None:
    found = dispatch.variants()
    assert list(found) == ["local", "all_to_all", "deepep per_rank", "deepep per_slot"]
    assert [name for name, variant in found.items() if not variant.build().serves_ep] == ["local"]
    assert [name for name, v in found.items() if v.build().bitwise_equal_to is None] == ["deepep per_rank"]


def test_its_flags_choose_it() -> None:
    for variant in dispatch.variants().values():
        if variant.build().serves_ep:
            moe = load([CONFIG, *variant.flags], world_size=4).resolved["moe"]
            assert moe["dispatcher"] == variant.dispatcher
            assert {key: moe[variant.dispatcher][key] for key in variant.options} == variant.options


class _Chunked(AllToAllDispatcher):
    """Its variants have different options, as in docs/add_a_dispatcher.md."""

    variants = ({"chunk_rows": 64}, {})

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllDispatcher.Config):
        chunk_rows: int = 1024


def test_variants_may_leave_options_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.DISPATCHERS, "chunked", f"{__name__}:_Chunked")
    assert dispatch.variants()["chunked 64"].flags == [
        "--moe.dispatcher=chunked",
        "--moe.chunked.chunk_rows=64",
    ]
    assert dispatch.variants()["chunked"].flags == ["--moe.dispatcher=chunked"]
