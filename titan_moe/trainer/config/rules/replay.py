"""Rules about ``[routing_replay]``."""

from pathlib import Path

from titan_moe.replay.section import RoutingReplay
from titan_moe.trainer.config.build import moe_layers
from titan_moe.trainer.config.rules.facts import Broken, Facts


def replay_keys_fit_together(facts: Facts) -> None:
    """Keys that mean something only with each other, and numbers in range."""
    replay = facts.plan.routing_replay
    if replay.check and replay.mode != "replay":
        raise Broken(
            f"routing_replay.check needs routing_replay.mode ({replay.mode!r}) to be 'replay': "
            "there is nothing else to check"
        )
    if (replay.mode != "off" or facts.plan.numerics.capture) and not replay.recompute_pin:
        raise Broken(
            f"routing_replay.recompute_pin (false) with routing_replay.mode {replay.mode!r} or "
            "numerics.capture: a recomputation finds its ids by the pin; leave it on"
        )
    for key in ("check_max_zero_overlap", "check_min_mean_overlap"):
        value = getattr(replay, key)
        if not 0 <= value <= 1:
            raise Broken(f"routing_replay.{key} ({value}) must be between 0 and 1")


def replay_layers_are_there(facts: Facts) -> None:
    """Every entry of ``layers`` is a range, and together they hold a MoE layer."""
    replay = facts.plan.routing_replay
    try:
        replay.ranges()
    except ValueError as error:
        raise Broken(f"routing_replay.layers: {error}") from None
    names = [name for name, _ in moe_layers(facts.plan.spec)]
    for text in replay.layers:
        if not any(RoutingReplay(layers=[text]).chosen(name) for name in names):
            raise Broken(
                f"routing_replay.layers: {text!r} holds none of the MoE layers of {facts.flavor} "
                f"({names[0]} to {names[-1]})"
            )


def replay_sees_every_router(facts: Facts) -> None:
    """Where a router runs without its slot, or a microbatch is not one forward, nothing is replayed."""
    replay, compiled = facts.plan.routing_replay, facts.trainer.compile
    if replay.mode != "off":
        key = f"routing_replay.mode {replay.mode!r}"
    elif facts.plan.numerics.capture:
        key = "numerics.capture (True)"
    else:
        return
    if compiled.enable and "model" in compiled.components:
        raise Broken(
            f"{key} cannot reach into compiled layers: switch compile.enable "
            "off, or take 'model' out of compile.components"
        )
    if facts.value("activation_checkpoint.debug"):
        raise Broken(f"{key} needs activation_checkpoint.debug (True) off: torch takes no contexts with it")
    for name, degree in (("pipeline", facts.pp), ("context", facts.cp)):
        if degree > 1:
            raise Broken(
                f"{key} is not there for parallelism.{name}_parallel_degree "
                f"({degree}) > 1; use FSDP, TP and EP"
            )


def replayed_trace_exists(facts: Facts) -> None:
    """A trace is a folder with a manifest."""
    replay = facts.plan.routing_replay
    folder = Path(replay.path or Path(facts.trainer.dump_folder) / "routing_trace")
    if replay.mode == "replay" and not (folder / "manifest.json").is_file():
        raise Broken(
            f"routing_replay.path ({folder}) has no manifest.json; record a trace there with "
            "routing_replay.mode 'record'"
        )


RULES = (
    replay_keys_fit_together,
    replay_layers_are_there,
    replay_sees_every_router,
    replayed_trace_exists,
)
