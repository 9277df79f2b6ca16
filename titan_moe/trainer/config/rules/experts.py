"""Rules about one MoE layer: router, dispatcher, grouped matmul."""

from typing import cast

from torchtitan.config import TORCH_DTYPE_MAP

from titan_moe.layer.dispatch.base import TokenDispatcher
from titan_moe.parallel.limits import dispatch_limits
from titan_moe.trainer.config.rules.facts import Broken, Facts, divisors


def top_k_fits(facts: Facts) -> None:
    """A token goes to K different experts."""
    for name, layer in facts.moe_layers:
        if not 1 <= layer.router.top_k <= layer.num_experts:
            raise Broken(
                f"{name}.router.top_k ({layer.router.top_k}) of {facts.flavor} must be between 1 and its "
                f"num_experts ({layer.num_experts}); lower top_k"
            )


def groups_fit(facts: Facts) -> None:
    """Group-limited routing: whole groups of at least two experts, and enough of them for K."""
    for name, layer in facts.moe_layers:
        router = layer.router
        groups, limited = router.num_expert_groups, router.num_limited_groups
        if groups is None:
            continue
        where = f"{name}.router of {facts.flavor}"
        if router.num_experts % groups or router.num_experts // groups < 2:
            raise Broken(
                f"{where}: num_expert_groups ({groups}) must divide num_experts ({router.num_experts}) into "
                f"groups of 2 or more; use {divisors(router.num_experts)}"
            )
        if limited is None or not 1 <= limited <= groups:
            raise Broken(
                f"{where}: num_limited_groups ({limited}) must be between 1 and num_expert_groups ({groups})"
            )
        reachable = limited * (router.num_experts // groups)
        if router.top_k > reachable:
            raise Broken(
                f"{where}: top_k ({router.top_k}) exceeds the {reachable} experts of its num_limited_groups "
                f"({limited}); raise num_limited_groups"
            )


def experts_divide_over_ep(facts: Facts) -> None:
    """Every EP rank owns the same number of experts."""
    for name, layer in facts.moe_layers:
        if layer.num_experts % facts.ep:
            raise Broken(
                f"{facts.show('parallelism.expert_parallel_degree')} must divide the num_experts "
                f"({layer.num_experts}) of {name} in {facts.flavor}; use {divisors(layer.num_experts)}"
            )


def dispatcher_serves_the_mesh(facts: Facts) -> None:
    """The class says whether it needs EP; its Config says what else it needs."""
    name = facts.plan.moe.dispatcher
    if facts.dispatcher.requires_ep and facts.ep == 1:
        raise Broken(
            f"moe.dispatcher {name!r} needs parallelism.expert_parallel_degree (1) > 1; "
            "raise it, or use 'local'"
        )
    for _, layer in [] if facts.stock else facts.moe_layers:
        config = cast(TokenDispatcher.Config, layer.routed_experts.token_dispatcher)
        try:
            config.validate(
                dispatch_limits(
                    layer,
                    training=facts.training,
                    parallelism=facts.parallelism,
                    compile_config=facts.trainer.compile,
                )
            )
        except ValueError as error:
            who = "" if "moe.dispatcher" in str(error) else f"moe.dispatcher {name!r}: "
            raise Broken(f"{who}{error}") from None


def grouped_matmul_is_aligned(facts: Facts) -> None:
    """torch._grouped_mm wants strides that are multiples of 16 bytes; TP without EP splits the hidden dim."""
    dtype = facts.training.mixed_precision_param
    size = TORCH_DTYPE_MAP[dtype].itemsize
    for name, layer in facts.moe_layers:
        experts = layer.routed_experts.inner_experts
        split = facts.tp if facts.ep == 1 else 1
        if experts.hidden_dim % split:
            raise Broken(
                f"{facts.show('parallelism.tensor_parallel_degree')} must divide the hidden_dim "
                f"({experts.hidden_dim}) of {name} in {facts.flavor} while "
                f"parallelism.expert_parallel_degree is 1; use {divisors(experts.hidden_dim)}"
            )
        for what, length in (("dim", experts.dim), ("hidden_dim per rank", experts.hidden_dim // split)):
            if length * size % 16:
                raise Broken(
                    f"{name} of {facts.flavor}: {what} ({length}) * {size} bytes of "
                    f"training.mixed_precision_param ({dtype}) must be a multiple of 16 for "
                    f"torch._grouped_mm; lower parallelism.tensor_parallel_degree ({facts.tp}) or raise "
                    "parallelism.expert_parallel_degree"
                )


def compiled_grouped_matmul_is_bf16(facts: Facts) -> None:
    """Under torch.compile, torch._grouped_mm's shape function takes bf16 only; eager takes fp32 as well."""
    compile_config, dtype = facts.trainer.compile, facts.training.mixed_precision_param
    if compile_config.enable and "model" in compile_config.components and dtype != "bfloat16":
        raise Broken(
            f"compile.enable with 'model' in compile.components needs training.mixed_precision_param "
            f"({dtype}) to be bfloat16: torch compiles its grouped matmul for that only"
        )


RULES = (
    top_k_fits,
    groups_fit,
    experts_divide_over_ep,
    dispatcher_serves_the_mesh,
    compiled_grouped_matmul_is_bf16,
    grouped_matmul_is_aligned,
)
