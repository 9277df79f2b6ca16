"""What is still the same, by the dtype that forwards run in."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Relative, all of them.

    Attributes:
        first_loss: of the first step's loss.
        loss: of later ones.
        gradient: a gradient's difference, of its norm, at the first step.
        module: root mean square of the differences of a module's tokens, of that of their norms.
        near_tie: of router scores: a token that changes experts at a smaller margin may be rounding.
    """

    first_loss: float
    loss: float
    gradient: float
    module: float
    near_tie: float

    @classmethod
    def of(cls, dtype: str, *, loss: float | None = None, module: float | None = None) -> "Tolerance":
        """For runs whose forwards use ``dtype``; ``loss`` and ``module`` replace that dtype's own."""
        chosen = FP32 if dtype in ("float32", "float64") else BF16
        given = {"loss": loss, "module": module}
        return replace(chosen, **{key: value for key, value in given.items() if value is not None})


FP32 = Tolerance(first_loss=1e-6, loss=1e-4, gradient=1e-5, module=1e-5, near_tie=1e-3)
BF16 = Tolerance(first_loss=1e-4, loss=1e-3, gradient=5e-2, module=1e-2, near_tie=1e-2)
