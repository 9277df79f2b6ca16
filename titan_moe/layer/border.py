"""Where MoE's DTensor world ends and its local-token world begins, and back.

Inside the border every tensor is a plain local shard and every token is real. The legend is in
``titan_moe/layer/moe.py``; the rows of the placement table are in ``titan_moe/parallel/sharding.py``.
"""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from titan_moe.layer.layout import TokenLayout


@dataclass(frozen=True, kw_only=True)
class TokenBorder:
    """The placements on the TP axis at the border of the local region.

    Attributes:
        tokens: of what the region reads: ``Shard(1)``, or ``Replicate()`` when EP is off.
        token_grads: of what its backward hands back.
        outputs: of what each rank has when the region is done.
    """

    tokens: Placement
    token_grads: Placement
    outputs: Placement

    def enter(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Returns the ``(T, D)`` local tokens, and where they lie in the (B, L) grid.

        Args:
            x_BLD: a plain tensor (no TP), or a DTensor on the TP mesh, ``Shard(1)`` or replicated; L
                need not divide by the mesh.
        """
        local_BLD, sp_rank, sp_size = x_BLD, 0, 1
        if isinstance(x_BLD, DTensor):
            local_BLD = x_BLD.redistribute(placements=[self.tokens])
            local_BLD = local_BLD.to_local(grad_placements=[self.token_grads])
            if self.tokens.is_shard():
                sp_rank, sp_size = x_BLD.device_mesh.get_local_rank(), x_BLD.device_mesh.size()
        batch_size, seq_len, dim = local_BLD.shape
        layout = TokenLayout(
            local_batch_size=batch_size,
            local_seq_len=seq_len,
            dim=dim,
            global_seq_len=x_BLD.shape[1],
            sp_rank=sp_rank,
            sp_size=sp_size,
        )
        return local_BLD.reshape(-1, dim), layout

    def leave(self, out_TD: torch.Tensor, layout: TokenLayout, like: torch.Tensor) -> torch.Tensor:
        """Returns ``out_TD`` as a tensor of the kind and the placements of ``like``.

        The global shape is stated: DTensor would infer ``local * sp_size``, which is wrong for an
        uneven shard (pytorch/torchtitan#3577).
        """
        out_BLD = out_TD.view(layout.local_shape)
        if not isinstance(like, DTensor):
            return out_BLD
        _, global_seq_len, dim = layout.global_shape
        out_BLD = DTensor.from_local(
            out_BLD,
            like.device_mesh,
            [self.outputs],
            run_check=False,
            shape=torch.Size(layout.global_shape),
            stride=(global_seq_len * dim, dim, 1),
        )
        return out_BLD.redistribute(placements=like.placements)


# EP on: each TP rank routes its own shard of the sequence. EP off: each TP rank routes every token
# through its slice of the experts' hidden dim, so results and gradients are parts of a sum.
SHARDED_TOKENS = TokenBorder(tokens=Shard(1), token_grads=Shard(1), outputs=Shard(1))
SHARDED_HIDDEN = TokenBorder(tokens=Replicate(), token_grads=Partial(), outputs=Partial())
