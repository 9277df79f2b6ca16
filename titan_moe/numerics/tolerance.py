"""What is still the same, by the dtype that forwards run in."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """All relative. "Later" steps start from other weights, so they are held to what grows in a few steps.

    Attributes:
        first_loss, loss: of the first step's loss, and of later ones.
        gradient: a gradient's difference, of its norm, at the first step; that of the total norm, too.
        later_gradient: the same norms, at later steps.
        module, later_module: the root mean square of a module's tokens' differences, of that of their norms.
        token: one token's difference, in multiples of ``module``'s.
    """

    first_loss: float
    loss: float
    gradient: float
    later_gradient: float
    module: float
    later_module: float
    token: float = 30.0

    @classmethod
    def of(cls, dtype: str, *, loss: float | None = None, module: float | None = None) -> "Tolerance":
        """For runs whose forwards use ``dtype``; ``loss`` and ``module`` replace that dtype's own."""
        chosen = FP32 if dtype in ("float32", "float64") else BF16
        given = {"loss": loss, "module": module}
        return replace(chosen, **{key: value for key, value in given.items() if value is not None})


FP32 = Tolerance(
    first_loss=1e-6, loss=1e-4, gradient=1e-5, later_gradient=1e-2, module=1e-5, later_module=1e-2
)
BF16 = Tolerance(
    first_loss=1e-4, loss=1e-3, gradient=1e-1, later_gradient=3e-1, module=1e-2, later_module=1e-1
)


def relative(base: float, candidate: float) -> float:
    """|difference| over |base|; 0 for the same, infinite where one is not a number."""
    if base == candidate or (math.isnan(base) and math.isnan(candidate)):
        return 0.0
    off = abs(base - candidate) / max(abs(base), 1e-30)
    return off if math.isfinite(off) else math.inf
