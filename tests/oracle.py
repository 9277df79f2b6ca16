"""A dense Mixture of Experts, written from the papers, for tests to compare with.

Token-choice top-K routing as in DeepSeek-V3 (arXiv 2412.19437), with the selection-only expert bias of
auxiliary-loss-free load balancing (arXiv 2408.15664). It visits one token and one expert at a time, moves no
row anywhere, works in the dtype of its inputs (tests use fp64), and shares no code with titan_moe or
torchtitan.

Shape suffixes: B batch, L sequence, D model, F expert hidden, E experts, K top-k, T tokens (B*L).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Routing = Literal["random", "one_expert", "one_rank", "equal_scores"]

MODULE_FQNS = {
    "gate_ED": "router.gate.weight",
    "w1_EFD": "routed_experts.inner_experts.w1_EFD",
    "w2_EDF": "routed_experts.inner_experts.w2_EDF",
    "w3_EFD": "routed_experts.inner_experts.w3_EFD",
    "shared_w1_FD": "shared_experts.w1.weight",
    "shared_w2_DF": "shared_experts.w2.weight",
    "shared_w3_FD": "shared_experts.w3.weight",
}
"""Parameter name here -> its name inside an MoE layer."""

_HOT_BIAS = 2.0  # scores lie in (0, 1): this much bias always wins the selection


class OracleOutput(NamedTuple):
    """What the layer computed.

    Attributes:
        out_BLD: The layer's output, shape (B, L, D).
        topk_ids_TK: int64, distinct ids per row, by descending selection score, ties by lower id.
        topk_scores_TK: The weights of the sum: unbiased scores, after route_norm and route_scale.
        counts_E: int64, how many of the T*K choices went to each expert.
    """

    out_BLD: Tensor
    topk_ids_TK: Tensor
    topk_scores_TK: Tensor
    counts_E: Tensor


def swiglu(x_D: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor) -> Tensor:
    """One token through one SwiGLU feed-forward, shape (D,) -> (D,)."""
    gate_F = w1_FD @ x_D
    return w2_DF @ (gate_F * torch.sigmoid(gate_F) * (w3_FD @ x_D))


def choose_experts(
    selection: Sequence[float],
    top_k: int,
    num_expert_groups: int | None = None,
    num_limited_groups: int | None = None,
) -> list[int]:
    """The K expert ids of one token, best selection score first, ties to the lower id.

    Args:
        selection: One score per expert, bias included.
        top_k: How many experts to choose.
        num_expert_groups: Number of groups of consecutive experts; None chooses among all experts.
        num_limited_groups: How many groups, by the sum of their two best scores, may be chosen from.

    Raises:
        ValueError: The groups do not divide the experts, or leave fewer than K of them.
    """
    num_experts = len(selection)
    allowed = list(range(num_experts))
    if num_expert_groups is not None:
        if num_limited_groups is None or num_experts % num_expert_groups != 0:
            raise ValueError(f"{num_expert_groups=} {num_limited_groups=} do not fit {num_experts} experts")
        size = num_experts // num_expert_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(num_expert_groups)]
        group_scores = [sum(sorted((selection[e] for e in group), reverse=True)[:2]) for group in groups]
        by_score = sorted(range(num_expert_groups), key=lambda g: (-group_scores[g], g))
        allowed = [e for g in by_score[:num_limited_groups] for e in groups[g]]
    if not 0 < top_k <= len(allowed):
        raise ValueError(
            f"top_k ({top_k}) must be between 1 and the {len(allowed)} experts that may be chosen"
        )
    return sorted(allowed, key=lambda e: (-selection[e], e))[:top_k]


def route(
    x_TD: Tensor,
    gate_ED: Tensor,
    *,
    top_k: int,
    score_func: Literal["sigmoid", "softmax"] = "sigmoid",
    route_norm: bool = False,
    route_scale: float = 1.0,
    expert_bias_E: Tensor | None = None,
    num_expert_groups: int | None = None,
    num_limited_groups: int | None = None,
    ids_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The router alone: (topk_ids_TK, topk_scores_TK). The arguments are those of `moe`."""
    rows_K: list[Tensor] = []
    ids_T: list[list[int]] = []
    for t in range(x_TD.shape[0]):
        logits_E = gate_ED @ x_TD[t]
        scores_E = torch.sigmoid(logits_E) if score_func == "sigmoid" else torch.softmax(logits_E, dim=0)
        if ids_TK is None:
            selection_E = scores_E if expert_bias_E is None else scores_E + expert_bias_E
            ids = choose_experts(selection_E.tolist(), top_k, num_expert_groups, num_limited_groups)
        else:
            ids = ids_TK[t].tolist()
        weights_K = torch.stack([scores_E[e] for e in ids])
        if route_norm:
            weights_K = weights_K / (weights_K.sum() + 1e-20)
        rows_K.append(weights_K * route_scale)
        ids_T.append(ids)
    # Without a token there is nothing to stack; zero rows of the logits keep the graph connected.
    scores_TK = torch.stack(rows_K) if rows_K else (x_TD @ gate_ED.T)[:, :top_k]
    return torch.tensor(ids_T, dtype=torch.int64).reshape(-1, top_k), scores_TK


def moe(
    x_BLD: Tensor,
    gate_ED: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    *,
    top_k: int,
    score_func: Literal["sigmoid", "softmax"] = "sigmoid",
    route_norm: bool = False,
    route_scale: float = 1.0,
    expert_bias_E: Tensor | None = None,
    num_expert_groups: int | None = None,
    num_limited_groups: int | None = None,
    shared_w1_FD: Tensor | None = None,
    shared_w2_DF: Tensor | None = None,
    shared_w3_FD: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> OracleOutput:
    """The whole layer.

    Args:
        x_BLD: Input; B or L may be 0.
        gate_ED: Router weight.
        w1_EFD: Expert gate projections; expert e computes ``w2 @ (silu(w1 @ x) * (w3 @ x))``.
        w2_EDF: Expert down projections.
        w3_EFD: Expert up projections.
        top_k: Experts per token.
        score_func: Applied to the logits of one token, over all experts.
        route_norm: Divide a token's weights by their sum (plus 1e-20).
        route_scale: Multiplies the weights, after route_norm.
        expert_bias_E: Added to the scores for the selection only.
        num_expert_groups: See `choose_experts`.
        num_limited_groups: See `choose_experts`.
        shared_w1_FD: First weight of a SwiGLU that every token visits (its F is its own), or None.
        shared_w2_DF: Its down projection.
        shared_w3_FD: Its up projection.
        ids_TK: Routes to follow instead of choosing; the scores are still this router's.
    """
    x_TD = x_BLD.reshape(-1, gate_ED.shape[1])
    topk_ids_TK, topk_scores_TK = route(
        x_TD,
        gate_ED,
        top_k=top_k,
        score_func=score_func,
        route_norm=route_norm,
        route_scale=route_scale,
        expert_bias_E=expert_bias_E,
        num_expert_groups=num_expert_groups,
        num_limited_groups=num_limited_groups,
        ids_TK=ids_TK,
    )
    rows_D: list[Tensor] = []
    counts = [0] * gate_ED.shape[0]
    for t, ids in enumerate(topk_ids_TK.tolist()):
        x_D = x_TD[t]
        out_D = torch.zeros_like(x_D)
        for k, e in enumerate(ids):
            out_D = out_D + topk_scores_TK[t, k] * swiglu(x_D, w1_EFD[e], w2_EDF[e], w3_EFD[e])
            counts[e] += 1
        if shared_w1_FD is not None and shared_w2_DF is not None and shared_w3_FD is not None:
            out_D = out_D + swiglu(x_D, shared_w1_FD, shared_w2_DF, shared_w3_FD)
        rows_D.append(out_D)
    out_TD = torch.stack(rows_D) if rows_D else x_TD * 1.0
    counts_E = torch.tensor(counts, dtype=torch.int64)
    return OracleOutput(out_TD.reshape(x_BLD.shape), topk_ids_TK, topk_scores_TK, counts_E)


def named_gradients(
    params: dict[str, Tensor], out: OracleOutput | Tensor, grad_out: Tensor
) -> dict[str, Tensor]:
    """Gradients of ``(out * grad_out).sum()``, by name; zeros (never None) where a tensor was not used.

    Args:
        params: Tensors that require grad, under the names to report: "x_BLD", "gate_ED", ... They may be
            intermediate results. The graph is kept.
        out: A layer's output. Given an `OracleOutput`, "topk_scores_TK" is reported too.
        grad_out: Same shape as the output.
    """
    tensors = dict(params)
    if isinstance(out, OracleOutput):
        tensors["topk_scores_TK"] = out.topk_scores_TK
        out = out.out_BLD
    grads = torch.autograd.grad(
        out, list(tensors.values()), grad_out, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(tensors, grads, strict=True))


@dataclass(kw_only=True)
class Case:
    """Parameters, inputs and router options of one layer, ready to run.

    Attributes:
        params: Leaves that require grad: "x_BLD", "gate_ED", "w1_EFD", "w2_EDF", "w3_EFD" and, with a shared
            expert, "shared_w1_FD", "shared_w2_DF", "shared_w3_FD".
        expert_bias_E: Selection bias or None.
        grad_out_BLD: A dense gradient to feed to the output.
        options: The router's: top_k, score_func, route_norm, route_scale, num_expert_groups,
            num_limited_groups. Their names are also the router Config's.
    """

    params: dict[str, Tensor]
    expert_bias_E: Tensor | None
    grad_out_BLD: Tensor
    options: dict[str, Any]

    def run(self, ids_TK: Tensor | None = None) -> OracleOutput:
        """The oracle's forward on this case."""
        return moe(**self.params, **self.options, expert_bias_E=self.expert_bias_E, ids_TK=ids_TK)

    def run_with_gradients(self, ids_TK: Tensor | None = None) -> tuple[OracleOutput, dict[str, Tensor]]:
        """Forward, and the gradients of every parameter, of the input and of the scores."""
        out = self.run(ids_TK)
        return out, named_gradients(self.params, out, self.grad_out_BLD)


def random_case(
    seed: int,
    B: int,
    L: int,
    D: int,
    F: int,
    E: int,
    K: int,
    *,
    routing: Routing = "random",
    dtype: torch.dtype = torch.float64,
    shared: bool = False,
    shared_F: int | None = None,
    ep: int = 2,
    hot_rank: int = 0,
    bias_scale: float = 0.0,
    score_func: Literal["sigmoid", "softmax"] = "sigmoid",
    route_norm: bool = False,
    route_scale: float = 1.0,
    num_expert_groups: int | None = None,
    num_limited_groups: int | None = None,
) -> Case:
    """A layer with random weights and a chosen routing regime.

    The same seed gives the same numbers in every dtype, up to rounding. Except under "equal_scores", a token
    whose choice hangs on a near-tie is redrawn, so that fp32 and fp64 routers agree.

    Args:
        seed: Of a private generator; the global one is untouched.
        B: Batch.
        L: Sequence.
        D: Model width.
        F: Expert hidden width.
        E: Experts.
        K: Experts per token.
        routing: "random"; "one_expert": all tokens choose the same K experts; "one_rank": all tokens choose
            among the experts of EP rank `hot_rank`; "equal_scores": a zero gate, so every score ties.
        dtype: Of everything.
        shared: With a shared expert.
        shared_F: Its hidden width, F by default.
        ep: EP size, for "one_rank" only.
        hot_rank: See routing.
        bias_scale: Standard deviation of expert_bias_E under "random"; 0 means no bias.
        score_func: Router option.
        route_norm: Router option.
        route_scale: Router option.
        num_expert_groups: Router option.
        num_limited_groups: Router option.

    Raises:
        ValueError: The regime is impossible: "one_rank" with K > E/ep.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    params = {
        "x_BLD": draw(B, L, D),
        "gate_ED": draw(E, D, scale=D**-0.5),
        "w1_EFD": draw(E, F, D, scale=D**-0.5),
        "w2_EDF": draw(E, D, F, scale=F**-0.5),
        "w3_EFD": draw(E, F, D, scale=D**-0.5),
    }
    if shared:
        width = F if shared_F is None else shared_F
        params["shared_w1_FD"] = draw(width, D, scale=D**-0.5)
        params["shared_w2_DF"] = draw(D, width, scale=width**-0.5)
        params["shared_w3_FD"] = draw(width, D, scale=D**-0.5)
    grad_out_BLD = draw(B, L, D)
    bias_E = _regime_bias(routing, draw(E, scale=bias_scale), K, ep, hot_rank, num_expert_groups)
    if routing == "equal_scores":
        params["gate_ED"].zero_()
    else:
        for x_D in params["x_BLD"].view(-1, D):
            while _is_near_tie(params["gate_ED"] @ x_D, score_func, bias_E, num_expert_groups):
                x_D.copy_(draw(D))
    return Case(
        params={name: t.to(dtype).requires_grad_() for name, t in params.items()},
        expert_bias_E=bias_E.to(dtype) if bias_E.any() else None,
        grad_out_BLD=grad_out_BLD.to(dtype),
        options={
            "top_k": K,
            "score_func": score_func,
            "route_norm": route_norm,
            "route_scale": route_scale,
            "num_expert_groups": num_expert_groups,
            "num_limited_groups": num_limited_groups,
        },
    )


def _regime_bias(
    routing: Routing, random_E: Tensor, top_k: int, ep: int, hot_rank: int, num_expert_groups: int | None
) -> Tensor:
    """The selection bias that forces a regime; all zeros when none is needed."""
    num_experts = random_E.numel()
    bias_E = torch.zeros_like(random_E)
    if routing == "random":
        bias_E = random_E
    elif routing == "one_expert":
        # The last K experts: a bug that defaults to expert 0 shows, and the hot ones fill whole groups.
        bias_E[num_experts - top_k :] = _HOT_BIAS
    elif routing == "one_rank":
        per_rank = num_experts // ep
        if top_k > per_rank:
            raise ValueError(f"one_rank needs top_k ({top_k}) <= experts per EP rank ({per_rank})")
        bias_E[hot_rank * per_rank : (hot_rank + 1) * per_rank] = _HOT_BIAS
    return bias_E


def _is_near_tie(
    logits_E: Tensor, score_func: Literal["sigmoid", "softmax"], bias_E: Tensor, num_expert_groups: int | None
) -> bool:
    """Whether a rounding error could change which experts a token chooses, or their order."""
    scores_E = torch.sigmoid(logits_E) if score_func == "sigmoid" else torch.softmax(logits_E, dim=0)
    # A small part of the mean distance between two scores: above fp32 rounding, rarely undercut by chance.
    margin = 0.005 * float(scores_E.max() - scores_E.min()) / scores_E.numel()
    selection_E = scores_E + bias_E
    rankings = [selection_E]
    if num_expert_groups is not None:
        best = selection_E.view(num_expert_groups, -1).sort(dim=1, descending=True).values[:, :2]
        rankings.append(best.sum(dim=1))
    return any(bool((ranking.sort().values.diff() < margin).any()) for ranking in rankings)
