"""Tiny DeepSeek-V3 and Qwen3-MoE models with all that makes conversion hard, ours and transformers'."""

import dataclasses
import gc
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.models import deepseek_v3, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.protocols.model_spec import ModelSpec

from tests.ranks import RankContext
from titan_moe.models import set_norm_eps
from titan_moe.models.hugging_face import adapter
from titan_moe.models.hugging_face.adapter import for_hugging_face
from titan_moe.models.swap import swap_spec
from titan_moe.trainer.config import load
from titan_moe.trainer.train import Trainer

VOCAB = 2048  # of the shipped tokenizer
NUM_EXPERTS = 12  # more than 10: names sort as strings
YARN = {"scaling": "yarn", "rope_factor": 40.0, "original_seq_len": 64}
HF_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 64}


def deepseek(
    *,
    num_experts: int = NUM_EXPERTS,
    score_func: str = "sigmoid",
    groups: int | None = 4,
    route_norm: bool = True,
    q_lora_rank: int = 24,
    yarn: bool = True,
    mtp: int = 0,
    coeff: float | None = 1e-3,
    dispatcher: str = "local",
) -> ModelSpec:
    """One dense layer, two of MoE; two of four groups take part."""
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=3,
        n_dense_layers=1,
        dim=32,
        n_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        mscale=0.7,
        dense_hidden_dim=48,
        moe_hidden_dim=16,
        num_experts=num_experts,
        num_shared_experts=2,
        router_top_k=3,
        router_score_func=score_func,
        router_num_expert_groups=groups,
        router_num_limited_groups=groups and 2,
        router_route_scale=2.5,
        router_route_norm=route_norm,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=8, max_seq_len=256, **(YARN if yarn else {})),
    )
    model = deepseek_v3.DeepSeekV3Model.Config(
        vocab_size=VOCAB,
        dim=32,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCAB, embedding_dim=32, param_init=deepseek_v3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=32, param_init=deepseek_v3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=32, out_features=VOCAB, param_init=deepseek_v3._output_linear_init(32)
        ),
        layers=layers,
        mtp_layers=deepseek_v3._build_mtp_layers(layers[-1], dim=32, num_mtp_layers=mtp),
    )
    return _ours(deepseek_v3.model_registry("debugmodel"), model, coeff, dispatcher)


def qwen3_moe(
    *,
    num_experts: int = NUM_EXPERTS,
    route_norm: bool = True,
    dense: bool = False,
    coeff: float | None = None,
    dispatcher: str = "local",
) -> ModelSpec:
    """Two layers of MoE; ``dense``: the first one is not. Two query heads per key head."""
    sizes = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "attn_backend": "flex"}
    rope = CosSinRoPE.Config(dim=16, max_seq_len=256, theta=1000000.0)
    layers: list[Any] = qwen3._build_qwen3_moe_layers(
        n_layers=2,
        moe_hidden_dim=16,
        num_experts=num_experts,
        top_k=3,
        moe_comm_backend="standard",
        rope=rope,
        **sizes,
    )
    for layer in layers:
        layer.moe.router.route_norm = route_norm
    if dense:
        layers[0] = qwen3._build_qwen3_layers(n_layers=1, hidden_dim=48, rope=rope, **sizes)[0]
    model = qwen3.Qwen3Model.Config(
        vocab_size=VOCAB,
        dim=32,
        norm=qwen3._qwen3_norm(32),
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCAB, embedding_dim=32, param_init=qwen3._EMBEDDING_INIT
        ),
        lm_head=Linear.Config(in_features=32, out_features=VOCAB, param_init=qwen3._LINEAR_INIT),
        layers=layers,
    )
    return _ours(qwen3.model_registry("debugmodel_moe"), model, coeff, dispatcher)


def _ours(spec: ModelSpec, model: Any, coeff: float | None, dispatcher: str) -> ModelSpec:
    for block in (*model.layers, *getattr(model, "mtp_layers", [])):
        if block.moe is not None:
            block.moe.load_balance_coeff = coeff
    spec = for_hugging_face(dataclasses.replace(spec, model=model))
    set_norm_eps(spec, 1e-6)
    return swap_spec(spec, dispatcher=dispatcher, dispatcher_options={})


def hf_deepseek(
    *, num_experts: int = NUM_EXPERTS, groups: int = 4, route_norm: bool = True, q_lora_rank: int | None = 24
) -> Any:
    """transformers' config of ``deepseek()`` with these, written by hand."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=2,
        n_routed_experts=num_experts,
        routed_scaling_factor=2.5,
        kv_lora_rank=16,
        q_lora_rank=q_lora_rank,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
        n_group=groups,
        topk_group=2 if groups > 1 else 1,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        norm_topk_prob=route_norm,
        max_position_embeddings=2560,
        rope_parameters={**HF_YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        num_mtp_layers=0,
    )


def hf_qwen3_moe(*, num_experts: int = NUM_EXPERTS, route_norm: bool = True, dense: bool = False) -> Any:
    """transformers' config of ``qwen3_moe()`` with these, written by hand."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=num_experts,
        num_experts_per_tok=3,
        norm_topk_prob=route_norm,
        mlp_only_layers=[0] if dense else [],
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


@torch.no_grad()
def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Weights, norms and expert biases that all matter; ours and transformers' alike."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("expert_bias_E", "e_score_correction_bias")):
            tensor.uniform_(-0.2, 0.2, generator=generator)
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(tensor, torch.nn.Parameter):
            tensor.normal_(std=0.1, generator=generator)
    return model.eval()


def logits(model: Any, tokens: Tensor) -> Tensor:
    """Of our model, ``(B, L, vocabulary)``, whole on every rank."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    with torch.no_grad():
        out = model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))
    out = out[0] if isinstance(out, list) else out  # the others are of multi-token prediction layers
    return out.full_tensor() if isinstance(out, DTensor) else out


def greedy(model: Any, prompt: Tensor, number: int) -> list[int]:
    """The ``number`` most likely tokens after ``prompt``, one by one and without a cache."""
    tokens = prompt
    for _ in range(number):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[0, prompt.shape[1] :].tolist()


def train_from_folder(
    ctx: RankContext, argv: list[str], family: str, changes: dict[str, Any], train: bool, tokens: Tensor
) -> dict[str, Any]:
    """Loads, trains if ``train``, and saves a tiny model as the keys of ``[checkpoint]`` say.

    Args:
        changes: of ``deepseek()`` or ``qwen3_moe()``; and ``max_file_bytes`` of the files that are written.

    Returns:
        "loaded": logits before the first step; "trained": after the last; "greedy": 20 tokens after it;
        "local_experts" of the first MoE layer.
    """
    gc.collect()  # torchtitan switches the collector off, and the previous body's trainer is a cycle
    os.environ |= {"RANK": str(ctx.rank), "LOCAL_RANK": str(ctx.rank), "WORLD_SIZE": str(ctx.world_size)}
    job = load(argv, world_size=ctx.world_size)
    changes = dict(changes)
    adapter.MAX_FILE_BYTES = changes.pop("max_file_bytes", 5 * 10**9)
    make = {"deepseek_v3": deepseek, "qwen3_moe": qwen3_moe}[family]
    job.trainer.model_spec = make(dispatcher="all_to_all", **changes)
    trainer = Trainer(Trainer.Config.of(job))
    try:
        trainer.checkpointer.load()
        model: Any = trainer.model_parts[0]
        results: dict[str, Any] = {"loaded": logits(model, tokens)}
        if train:
            trainer.train()
        else:
            trainer.checkpointer.save(curr_step=1, last_step=True)
        results["trained"] = logits(model, tokens)
        results["greedy"] = greedy(model, tokens[:1, :8], 20)
        experts = model.layers["1"].moe.routed_experts.inner_experts.w1_EFD
        results["local_experts"] = experts.to_local().shape[0]
    finally:
        trainer.close()
    return results
