"""The registry's variants: a short name for each, and the flags that choose it."""

from titan_moe.layer import dispatch
from titan_moe.trainer.config import load

CONFIG = "train_configs/debug_fsdp_tp_ep.toml"


def test_every_variant_has_a_name_that_says_what_differs() -> None:
    found = dispatch.variants()
    assert list(found) == ["local", "all_to_all", "deepep per_rank", "deepep per_slot"]
    assert [name for name, variant in found.items() if not variant.serves_ep] == ["local"]
    assert [name for name, v in found.items() if not v.has_locals_bits] == ["deepep per_rank"]


def test_its_flags_choose_it() -> None:
    for variant in dispatch.variants().values():
        if variant.serves_ep:
            moe = load([CONFIG, *variant.flags], world_size=4).resolved["moe"]
            assert moe["dispatcher"] == variant.dispatcher
            assert {key: moe[variant.dispatcher][key] for key in variant.options} == variant.options
