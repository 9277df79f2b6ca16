"""A passing and a failing configuration for every rule of [routing_replay]."""

from pathlib import Path

import pytest

from tests.config_rule_case import Case, rows
from titan_moe.trainer.config.rules import replay

_R = "--routing_replay."

CASES: dict[str, list[Case]] = {
    "replay_keys_fit_together": [
        Case(
            passes=f"{_R}mode record",
            fails=f"{_R}mode record {_R}check",
            says=r"routing_replay.check needs routing_replay.mode \('record'\) to be 'replay'",
        ),
        Case(
            passes=f"{_R}no-recompute_pin",
            fails=f"{_R}no-recompute_pin {_R}mode record",
            says=r"routing_replay.recompute_pin \(false\) with routing_replay.mode 'record'",
        ),
        Case(
            passes=f"{_R}check_max_zero_overlap 1.0",
            fails=f"{_R}check_max_zero_overlap 1.5",
            says=r"routing_replay.check_max_zero_overlap \(1.5\) must be between 0 and 1",
        ),
        Case(
            passes=f"{_R}check_min_mean_overlap 0.9",
            fails=f"{_R}check_min_mean_overlap -0.1",
            says=r"routing_replay.check_min_mean_overlap \(-0.1\) must be between 0 and 1",
        ),
    ],
    "replay_layers_are_there": [
        Case(
            passes=f"""{_R}layers '["1-2", "4"]'""",
            fails=f"""{_R}layers '["1-2", "four"]'""",
            says=r"routing_replay.layers: 'four' is neither a number nor a range such as '1-3'",
        ),
        Case(
            passes=f"""{_R}layers '["5-9"]'""",
            fails=f"""{_R}layers '["6-9"]'""",
            says=r"routing_replay.layers: '6-9' holds none of the MoE .*\(layers.1.moe to layers.5.moe\)",
        ),
    ],
    "replay_sees_every_router": [
        Case(
            passes=f"{_R}mode record --compile.enable --compile.components '[\"loss\"]'",
            fails=f"{_R}mode record --compile.enable",
            says=r"routing_replay.mode 'record' cannot reach into compiled layers: switch compile.enable off",
        ),
        Case(
            passes="--activation_checkpoint.mode full --activation_checkpoint.debug",
            fails=f"{_R}mode record --activation_checkpoint.mode full --activation_checkpoint.debug",
            says=r"needs activation_checkpoint.debug \(True\) off",
        ),
        Case(
            passes="--parallelism.pipeline_parallel_degree 2",
            fails=f"{_R}mode record --parallelism.pipeline_parallel_degree 2",
            says=r"mode 'record' is not there for parallelism.pipeline_parallel_degree \(2\) > 1",
        ),
        Case(
            passes="--numerics.capture",
            fails="--numerics.capture --compile.enable",
            says=r"numerics.capture \(True\) cannot reach into compiled layers",
        ),
    ],
    "replayed_trace_exists": [
        Case(
            passes=f"{_R}mode record {_R}path /nope",
            fails=f"{_R}mode replay {_R}path /nope",
            says=r"routing_replay.path \(/nope\) has no manifest.json; record a trace there",
        ),
    ],
}


def test_every_rule_has_cases() -> None:
    assert [rule.__name__ for rule in replay.RULES] == list(CASES)


@pytest.mark.parametrize(("rule", "case"), rows(CASES))
def test_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, case: Case) -> None:
    case.run(tmp_path, monkeypatch, rule=rule)
