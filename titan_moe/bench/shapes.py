"""The sizes that are measured, and the fewest bytes that a layer can move.

The legend is in ``titan_moe/layer/moe.py``.
"""

from dataclasses import dataclass

BF16, FP32, INT64 = 2, 4, 8  # bytes


@dataclass(frozen=True)
class Shape:
    """One MoE layer on T tokens."""

    T: int
    D: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        return f"T{self.T} D{self.D} F{self.F} E{self.E} K{self.K}"

    @property
    def N(self) -> int:
        """Routed slots."""
        return self.T * self.K

    @property
    def gemm_flops(self) -> int:
        """Of the experts' 3 forward and 6 backward GEMMs."""
        return 9 * 2 * self.N * self.D * self.F


LAYER = (
    Shape(4096, 256, 256, 8, 3),
    Shape(4096, 512, 256, 64, 8),
    Shape(4096, 1024, 512, 64, 8),
    Shape(2048, 1024, 512, 16, 2),
)
ON_A_GPU = (  # besides: in LAYER's it waits for Python
    Shape(16384, 2048, 1408, 64, 6),
    Shape(16384, 4096, 1536, 16, 8),
)
OVER_RANKS = (  # tokens of each rank
    Shape(2048, 256, 256, 8, 3),
    Shape(1024, 512, 256, 64, 8),
    Shape(1024, 1024, 512, 64, 8),
    Shape(1024, 1024, 512, 16, 2),
)
QUICK = (Shape(256, 64, 32, 8, 2), Shape(256, 64, 64, 16, 4))


def least_bytes(shape: Shape) -> dict[str, int]:
    """Bytes that a layer in bf16 with fp32 scores cannot help but read and write beside its GEMMs, by pass.

    One pass over inputs and outputs each; what a GEMM itself reads and writes is not in it.
    """
    T, D, F, E, K, N = shape.T, shape.D, shape.F, shape.E, shape.K, shape.N
    scores_TE, picks_TK = T * E * FP32, T * K * (INT64 + FP32)
    return {
        "permute": BF16 * (T * D + N * D),
        "swiglu": BF16 * (2 * N * F + N * F),
        "combine": BF16 * (N * D + T * D),
        "combine, backward": BF16 * (T * D + N * D + N * D),
        "swiglu, backward": BF16 * (3 * N * F + 2 * N * F),
        "permute, backward": BF16 * (2 * N * D + T * D),
        "scores": BF16 * T * D + scores_TE,
        "select": scores_TE + picks_TK,
        "router, backward": 2 * scores_TE + BF16 * T * D,
    }
