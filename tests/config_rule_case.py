"""One row of a rule table: arguments that a rule lets pass, and arguments that it refuses."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torchtitan.tools import utils

from titan_moe import models
from titan_moe.layer.moe import MoE
from titan_moe.trainer.config import ConfigError, Job, load


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments that pass, arguments that fail, and what the failure says; edits change the flavor."""

    passes: str = ""
    fails: str = ""
    says: str
    edit_passing: Callable[[Any], Any] = lambda spec: spec
    edit_failing: Callable[[Any], Any] = lambda spec: spec
    ranks: int = 4
    failing_ranks: int | None = None
    device: str = utils.device_type

    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, rule: str) -> None:
        """Loads both; the failure must say ``says``."""
        build_spec = models.build_spec
        monkeypatch.setattr(utils, "device_type", self.device)
        if rule == "packages_are_installed":
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        if rule == "sequence_reaches_tp_ranks":
            monkeypatch.setattr("titan_moe.trainer.device.norms_keep_short_shards", lambda: False)
        monkeypatch.setattr(models, "build_spec", lambda *a, **k: self.edit_passing(build_spec(*a, **k)))
        _load(tmp_path, self.passes, self.ranks)
        monkeypatch.setattr(models, "build_spec", lambda *a, **k: self.edit_failing(build_spec(*a, **k)))
        with pytest.raises(ConfigError, match=self.says):
            _load(tmp_path, self.fails, self.failing_ranks or self.ranks)


def rows(cases: dict[str, list[Case]]) -> list[Any]:
    """Parameters (rule, case) with readable ids."""
    return [
        pytest.param(rule, case, id=f"{rule}-{number}")
        for rule, of_rule in cases.items()
        for number, case in enumerate(of_rule)
    ]


def _load(tmp_path: Path, arguments: str, ranks: int) -> Job:
    file = tmp_path / "x.toml"
    file.write_text('[model]\nname = "deepseek_v3"\nflavor = "debugmodel"\n')
    return load([str(file), *shlex.split(arguments)], world_size=ranks)


def experts(**changes: Any) -> Callable[[Any], Any]:
    """Edits the experts and the router of every MoE layer of a spec."""

    def _edit(spec: Any) -> Any:
        for _, layer, _, _ in spec.model.traverse(MoE.Config):
            for name, value in changes.items():
                owner = layer.router if hasattr(layer.router, name) else layer.routed_experts.inner_experts
                setattr(owner, name, value)
        return spec

    return _edit


def model(**changes: Any) -> Callable[[Any], Any]:
    def _edit(spec: Any) -> Any:
        for name, value in changes.items():
            setattr(spec.model, name, value)
        return spec

    return _edit


def attention(**changes: Any) -> Callable[[Any], Any]:
    def _edit(spec: Any) -> Any:
        for layer in spec.model.layers:
            for name, value in changes.items():
                setattr(layer.attention, name, value)
        return spec

    return _edit
