"""Rules about torchtitan's own MoE layer, ``model.moe = "torchtitan"``: it runs for comparisons only."""

from titan_moe.trainer.config.rules.facts import Broken, Facts

_KEY = "model.moe ('torchtitan')"


def stock_layer_has_its_own_dispatcher(facts: Facts) -> None:
    """torchtitan's AllToAll with EP, its local one without; its DeepEP is not offered here."""
    name = facts.plan.moe.dispatcher
    if facts.stock and name != "all_to_all" and (name != "local" or facts.ep > 1):
        raise Broken(
            f"{_KEY} dispatches by torchtitan's all-to-all at parallelism.expert_parallel_degree "
            f"({facts.ep}), not by moe.dispatcher {name!r}; use 'all_to_all'"
        )


def stock_layer_sees_whole_shards(facts: Facts) -> None:
    """It takes the sequence to be as long as all TP ranks' first shard times TP (pytorch/torchtitan#3577)."""
    if facts.stock and facts.training.seq_len % facts.tp:
        seq_len = facts.training.seq_len // facts.tp * facts.tp
        raise Broken(
            f"{_KEY} needs {facts.show('training.seq_len')} to be a multiple of "
            f"{facts.show('parallelism.tensor_parallel_degree')}; use {seq_len or facts.tp}"
        )


def stock_layer_needs_sp_beside_ep(facts: Facts) -> None:
    """Without SP, torchtitan 0.3.0 wants DTensor to go from S(1) to Partial, which it refuses."""
    if facts.stock and facts.ep > 1 and facts.tp > 1 and not facts.parallelism.enable_sequence_parallel:
        raise Broken(
            f"{_KEY} cannot run parallelism.expert_parallel_degree ({facts.ep}) with tensor_parallel_degree "
            f"({facts.tp}) and enable_sequence_parallel (False); leave SP on"
        )


def stock_layer_routes_for_itself(facts: Facts) -> None:
    """Its router has no place where ids could be put in."""
    replay = facts.plan.routing_replay
    if facts.stock and replay.mode != "off":
        raise Broken(f"{_KEY} with routing_replay.mode {replay.mode!r}: only our router replays; use 'off'")


def stock_layer_saves_what_it_saves(facts: Facts) -> None:
    """What is kept for backward is a choice of our experts."""
    if facts.stock and facts.plan.moe.save != "all":
        raise Broken(f"{_KEY} keeps what autograd keeps, not moe.save {facts.plan.moe.save!r}; use 'all'")


RULES = (
    stock_layer_has_its_own_dispatcher,
    stock_layer_sees_whole_shards,
    stock_layer_needs_sp_beside_ep,
    stock_layer_routes_for_itself,
    stock_layer_saves_what_it_saves,
)
