"""A passing and a failing configuration for every rule of [numerics] and of torchtitan's own MoE layer."""

from pathlib import Path

import pytest

from tests.config_rule_case import Case, rows
from titan_moe.trainer.config.rules import numerics, stock

_STOCK = "--model.moe torchtitan"
_EP2, _TP2 = "--parallelism.expert_parallel_degree 2", "--parallelism.tensor_parallel_degree 2"

CASES: dict[str, list[Case]] = {
    "stock_layer_has_its_own_dispatcher": [
        Case(
            passes=f"{_EP2} {_STOCK}",
            fails=f"{_EP2} {_STOCK} --moe.dispatcher deepep",
            says=r"model.moe \('torchtitan'\) dispatches by .* not by moe.dispatcher 'deepep'; use",
        ),
        Case(
            passes=f"{_STOCK} --moe.dispatcher local",
            fails=f"{_EP2} {_STOCK} --moe.dispatcher local",
            says=r"parallelism.expert_parallel_degree \(2\), not by moe.dispatcher 'local'",
        ),
    ],
    "stock_layer_sees_whole_shards": [
        Case(
            passes=f"{_TP2} --training.seq_len 127",
            fails=f"{_TP2} --training.seq_len 127 {_STOCK}",
            says=r"needs training.seq_len \(127\) to be a multiple of .*parallel_degree \(2\); use 126",
        ),
    ],
    "stock_layer_needs_sp_beside_ep": [
        Case(
            passes=f"{_TP2} {_EP2} {_STOCK}",
            fails=f"{_TP2} {_EP2} {_STOCK} --parallelism.no-enable-sequence-parallel",
            says=r"cannot run .*expert_parallel_degree \(2\) with .*_degree \(2\) and enable_sequence",
        ),
    ],
    "stock_layer_routes_for_itself": [
        Case(
            passes="--routing_replay.mode record",
            fails=f"--routing_replay.mode record {_STOCK}",
            says=r"with routing_replay.mode 'record': only our router replays; use 'off'",
        ),
    ],
    "stock_layer_saves_what_it_saves": [
        Case(
            passes="--moe.save inputs",
            fails=f"{_STOCK} --moe.save inputs",
            says=r"model.moe \('torchtitan'\) keeps what autograd keeps, not moe.save 'inputs'; use 'all'",
        ),
    ],
    "inputs_come_from_a_capture": [
        Case(
            passes="--numerics.capture",
            fails="--numerics.inputs_of /nope",
            says=r"numerics.inputs_of \(/nope\) needs numerics.capture \(False\); switch it on",
        ),
        Case(
            fails="--numerics.capture --numerics.inputs_of /nope",
            says=r"numerics.inputs_of \(/nope\) has no numerics/manifest.json; give the dump folder",
        ),
    ],
}


def test_every_rule_has_a_case() -> None:
    assert [rule.__name__ for rule in (*stock.RULES, *numerics.RULES)] == list(CASES)


@pytest.mark.parametrize(("rule", "case"), rows(CASES))
def test_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, case: Case) -> None:
    case.run(tmp_path, monkeypatch, rule=rule)
