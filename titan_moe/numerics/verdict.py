"""What makes two runs different: one rule each, in the order of causes before consequences."""

import math
from collections.abc import Callable

from titan_moe.numerics.observed import Observed
from titan_moe.numerics.sublayers import is_sublayer
from titan_moe.numerics.tolerance import relative


def problems(found: Observed) -> list[str]:
    """What is beyond tolerance."""
    return [problem for rule in RULES if (problem := rule(found)) is not None]


def sentence(found: Observed) -> str:
    """The verdict in one sentence."""
    steps = f"{len(found.losses)} step{'s' if len(found.losses) != 1 else ''}"
    if wrong := problems(found):
        return f"different: {'; '.join(wrong)}"
    if found.bitwise:
        return f"bitwise equal over {steps}"
    worst = f"losses differ by {found.worst_loss:.2g} at most"
    return f"within {found.dtype} tolerance over {steps}: {worst}"


def on_every_mesh(key: str) -> bool:
    """Whether a module's tokens are whole on every mesh, so that each run must have written them down."""
    module, what = key.rsplit("|", 1)
    is_block = module.startswith("layers.") and module.count(".") == 1
    return what == "route" or (what == "out" and (is_block or is_sublayer(module)))


def _alone(found: Observed) -> str | None:
    if not found.alone:
        return None
    more = f" and {len(found.alone) - 1} more" if len(found.alone) > 1 else ""
    return f"only one run has {found.alone[0]}{more}"


def _nothing_to_compare(found: Observed) -> str | None:
    kinds = {"modules": found.modules, "routes": found.flips, "gradients": found.gradients}
    empty = [name for name, there in kinds.items() if not there]
    return f"no {' and no '.join(empty)} were captured in both" if empty else None


def _rates(found: Observed) -> str | None:
    rate = next((rate for rate in found.rates if rate[1] != rate[2]), None)
    return None if rate is None else f"learning rates at step {rate[0]}: {rate[1]} and {rate[2]}"


def _replicas(found: Observed) -> str | None:
    both = [(m.step, m.module, m.replicas) for m in found.modules]
    both += [(f.step, f.layer, f.replicas) for f in found.flips]
    wrong = next((place for place in both if place[2]), None)
    if wrong is None:
        return None
    return f"ranks of one run do not agree on {wrong[1]} at step {wrong[0]}, {wrong[2]} tokens"


def _place(found: Observed) -> str | None:
    place = found.first_beyond
    if place is None:
        return None
    missing = f", {place.missing} tokens only in one run" if place.missing else ""
    return f"{place.module} at step {place.step} by {place.relative:.2g} ({place.beyond}){missing}"


def _scores(found: Observed) -> str | None:
    first = [f for f in found.flips if f.step == found.first_step]
    moved = next((f for f in first if not f.moved <= found.tolerance.module), None)
    if moved is None:
        return None
    return f"scores of {moved.layer} at step {moved.step} by {moved.moved:.2g}, the median token"


def _suspicious(found: Observed) -> str | None:
    flips = next((flips for flips in found.flips if flips.suspicious), None)
    if flips is None:
        return None
    return (
        f"{flips.layer} at step {flips.step} sends {flips.suspicious} of {flips.tokens} tokens to other "
        f"experts against a clear margin, first token {flips.first_suspicious}"
    )


def _biases(found: Observed) -> str | None:
    """The balance of experts follows the routes: while no token flips, biases are the same."""
    last = math.inf if found.first_flip is None else found.first_flip.step
    step, layer = next((bias for bias in found.expert_biases if bias[0] <= last), (0, None))
    return None if layer is None else f"{layer} at step {step}, before any route flips"


def _gradient(found: Observed) -> str | None:
    limit = found.tolerance.gradient
    wrong = {name: off for name, (off, _) in found.gradients.items() if not off <= limit}
    if not wrong:
        return None
    worst = max(wrong, key=lambda name: wrong[name])
    ratio, others = found.gradients[worst][1], f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
    return f"gradient of {worst}{others} by {wrong[worst]:.2g} of its norm, norm ratio {ratio:.4g}"


def _gradient_norms(found: Observed) -> str | None:
    for step in sorted({step for by_step in found.gradient_norms.values() for step in by_step}):
        limit = _gradient_limit(found, step)
        ratios = {name: by[step] for name, by in found.gradient_norms.items() if step in by}
        wrong = {name: ratio for name, ratio in ratios.items() if not abs(ratio - 1) <= limit}
        if wrong:
            name, ratio = max(wrong.items(), key=lambda item: _far(item[1]))
            return f"gradient norm of {name} at step {step}, ratio {ratio:.4g}"
    return None


def _grad_norm(found: Observed) -> str | None:
    for step, base, candidate in found.grad_norms:
        if not relative(base, candidate) <= _gradient_limit(found, step):
            return f"grad_norm at step {step}: {base:.6g} and {candidate:.6g}"
    return None


def _loss(found: Observed) -> str | None:
    for step, base, candidate in found.losses:
        limit = found.tolerance.first_loss if step == found.losses[0][0] else found.tolerance.loss
        if not relative(base, candidate) <= limit:
            return f"loss at step {step}: {base:.6g} and {candidate:.6g}"
    return None


def _gradient_limit(found: Observed, step: int) -> float:
    return found.tolerance.gradient if step == found.first_step else found.tolerance.later_gradient


def _far(ratio: float) -> float:
    return abs(math.log(max(ratio, 1e-30))) if math.isfinite(ratio) else math.inf


RULES: tuple[Callable[[Observed], str | None], ...] = (
    _nothing_to_compare,
    _alone,
    _rates,
    _replicas,
    _place,
    _scores,
    _suspicious,
    _biases,
    _gradient,
    _gradient_norms,
    _grad_norm,
    _loss,
)
