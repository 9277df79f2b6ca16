"""How far two runs may differ and still count as the same, by the dtype that their forwards run in."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest relative differences. Later steps start from other weights, so they have wider limits.

    Attributes:
        first_loss, loss: for the loss of the first step, and for those of later steps.
        gradient: for the norm of a gradient's difference divided by the gradient's norm, at the first step;
            also for the difference of the total gradient norm.
        later_gradient: for the same at later steps.
        module, later_module: for the RMS of the difference divided by the RMS of the value, over the tokens
            of a module's output.
        token: for the difference of a single token, in multiples of ``module``.
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
